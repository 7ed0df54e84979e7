"""The questions dealt to the processes of a launch: each asks its share, and gets the answers of all."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object

from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings


def asked_by_all(
    questions: Sequence[Question], ask: Callable[[Question], Answer | str], recordings: Recordings
) -> list[Answer | str]:
    """The answers to all questions, or why there is none; every process of the launch has to call this.

    Args:
        questions: to ask.
        ask: gives the answer, or a sentence.
        recordings: that they are about.
    """
    state = PartialState()
    rank, ranks = state.process_index, state.num_processes
    own = {number: ask(questions[number]) for number in range(rank, len(questions), ranks)}
    told: dict[int, Answer | str] = {}
    for part in gather_object([{number: _without_frames(answer) for number, answer in own.items()}]):
        told |= part
    for number in range(len(questions)):
        answer, mine = told[number], own.get(number)
        if isinstance(answer, str) or answer.episodes is not None:
            continue
        frames = on_disk((len(recordings), len(answer.parts)), np.float32)
        for _, span in recordings.blocks:
            if isinstance(mine, Answer) and mine.frames is not None:
                frames[span] = mine.frames[span]
            block = torch.as_tensor(frames[span], device=state.device)
            frames[span] = broadcast(block, from_process=number % ranks).cpu().numpy()
        told[number] = replace(answer, frames=frames)
    return [told[number] for number in range(len(questions))]


def _without_frames(answer: Answer | str) -> Answer | str:
    return answer if isinstance(answer, str) else replace(answer, frames=None)
