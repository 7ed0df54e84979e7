"""The command `ptr-score`: which demonstrations of a dataset are bad, why, and what to do next.

ptr-score --dataset me/my_demos
"""

import json
import os
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from ptr_hf.cli import interrupts
from ptr_hf.cli.refusals import refusals
from ptr_hf.cli.score_options import PROGRAM, parse

if TYPE_CHECKING:
    from rich.console import Console

    from ptr_hf.scoring.dataset_scores import DatasetScores

FAILED, REFUSED = 1, 2


def main() -> None:
    """Run the command; exit code 1 says that --fail_over was exceeded, 2 that something was refused."""
    interrupts.end_quietly(PROGRAM)
    with refusals(PROGRAM):
        options = parse(sys.argv[1:])
    with refusals(PROGRAM, vars(options), REFUSED):
        code = score(options)
    raise SystemExit(code)


def score(options: Namespace) -> int:
    """Inspect, show, write.

    Args:
        options: of a command line.

    Returns:
        the exit code.

    Raises:
        ValueError, OSError: a dataset cannot be read or a file not be written; the sentence says which and why.
    """
    if not options.json:
        return _score(options, sys.stdout)
    # libraries print as well, and stdout is for the JSON object alone
    with redirect_stdout(sys.stderr):
        return _score(options, sys.__stdout__ or sys.stdout)


def _score(options: Namespace, answers: object) -> int:
    from ptr_hf.report.console import PlainConsole
    from ptr_hf.scoring import next_steps
    from ptr_hf.scoring.inspection import inspect_dataset
    from ptr_hf.scoring.recordings import single, sources_of

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    main_process, device = True, options.device
    if several:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        main_process, device = state.is_main_process, device or str(state.device)
    console = PlainConsole(stderr=options.json, quiet=not main_process)
    given = options.dataset[0] if len(options.dataset) == 1 else list(options.dataset)
    read, _ = sources_of(given)
    sources = [str(single(source)[0]) for source in read]
    _show_plan(read, options, console)
    scores = inspect_dataset(
        given,
        episodes=options.episodes,
        revision=options.revision,
        false_alarms=options.false_alarms,
        weight_min=options.weight_min,
        group=options.group,
        questions=options.questions,
        policy=options.policy,
        images_per_episode=options.images_per_episode,
        max_frames=options.max_frames,
        seed=options.seed,
        device=device,
        progress=main_process,
        several_processes=several,
    )
    failed = options.fail_over is not None and scores.moved > options.fail_over
    if not main_process:
        return FAILED if failed else 0
    folder = scores.save(options.output_dir)
    next_steps.write_lists(scores, folder)
    if options.page:
        from ptr_hf.scoring.page import write_page

        write_page(scores, read, folder, episodes=options.episodes, revision=options.revision, mixture=options.mixture)
    _show(scores, sources, options, console)
    if options.write_dataset is not None:
        _write_copy(scores, sources[0], options, console)
    if options.export_lerobot is not None:
        from ptr_hf.scoring.lerobot_weights import export_lerobot, lerobot_options

        path = export_lerobot(scores, options.export_lerobot)
        console.print(
            f"{path} holds the weights for LeRobot's own sample weighting: lerobot-train ... {lerobot_options(path)}"
        )
    if options.scorer is not None:
        _ask_scorer(sources[0], options, console)
    if options.push_to_hub is not None:
        from ptr_hf.scoring.published import push_scores

        console.print(f"Pushed: {push_scores(scores, sources, folder, options.push_to_hub)}", soft_wrap=True)
    if failed:
        console.print(
            f"{scores.moved:.1%} of the weight moves, more than --fail_over {options.fail_over}: exit code {FAILED}."
        )
    if options.json:
        found = next_steps.summary(scores, folder, options.page) | {"failed": failed}
        print(json.dumps(found, indent=2), file=answers)  # type: ignore[call-overload]
    return FAILED if failed else 0


def _show_plan(sources: list[Any], options: Namespace, console: "Console") -> None:
    from ptr_hf.data.datasets import dataset_metadata
    from ptr_hf.scoring.inspection import IMAGE_QUESTIONS, QUESTIONS
    from ptr_hf.scoring.recordings import single

    for given in sources:
        source, episodes, revision = single(given, options.episodes, options.revision)
        meta = dataset_metadata(source, revision, episodes)
        number = meta.total_episodes if episodes is None else len(set(episodes))
        cameras = len(meta.camera_keys)
        read = "not read" if options.policy is None else f"with {options.images_per_episode} pictures an episode"
        seen = f"; {cameras} camera{'s' if cameras != 1 else ''} {read}" if cameras else ""
        console.print(
            f"{source}: {number} of {meta.total_episodes} episodes, {meta.total_frames} frames in all, "
            f"{meta.total_tasks} tasks{seen}."
        )
    possible = QUESTIONS if options.policy is None else QUESTIONS + IMAGE_QUESTIONS
    asked = [question.title for question in possible if options.questions is None or question.name in options.questions]
    console.print(f"{len(asked)} questions: {' '.join(asked)}")
    console.print(
        f"At most {options.false_alarms:.1%} of good episodes should be flagged; compared within {options.group}. "
        f"Files go to {options.output_dir}."
    )


def _show(scores: "DatasetScores", sources: list[str], options: Namespace, console: "Console") -> None:
    from ptr_hf.scoring import next_steps

    said = next_steps.recommendation(scores)
    if scores.flagged.empty:
        for note in scores.notes:
            console.print(note)
    else:
        console.print(scores)
    console.print(f"\n{said.headline}. {said.sentence}\n", style="bold")
    for command in next_steps.commands(scores, sources, options.output_dir, options.mixture):
        console.print(f"{command.does}:")
        console.print(f"  {command.line}\n", soft_wrap=True)
    first = f"{options.output_dir / next_steps.PAGE_FILE} shows it; " if options.page else ""
    console.print(f"{first}{options.output_dir} holds weights, scores, keep.txt and exclude.txt.", soft_wrap=True)


def _write_copy(scores: "DatasetScores", source: str, options: Namespace, console: "Console") -> None:
    from lerobot.datasets import LeRobotDataset, delete_episodes

    from ptr_hf.data.datasets import dataset_metadata
    from ptr_hf.scoring.next_steps import excluded_episodes, kept_episodes

    excluded = excluded_episodes(scores)
    if not excluded:
        console.print("No episode is bad from end to end, so no copy is written.")
        return
    if not kept_episodes(scores):
        raise ValueError("--write_dataset: every episode would be left out.")
    meta = dataset_metadata(source, options.revision)
    dataset = LeRobotDataset(meta.repo_id, root=meta.root, revision=options.revision)
    copy = delete_episodes(dataset, excluded, output_dir=options.write_dataset, repo_id=f"{meta.repo_id}_kept")
    console.print(f"{options.write_dataset} holds the other {copy.meta.total_episodes} episodes.", soft_wrap=True)


def _ask_scorer(source: str, options: Namespace, console: "Console") -> None:
    import numpy as np

    from ptr_hf.report.chunk_scores import SCORES_FILE, write_scores
    from ptr_hf.scoring import score_dataset

    known = score_dataset(options.scorer, source, episodes=options.episodes, seed=options.seed)
    path = write_scores(known, options.output_dir / SCORES_FILE)
    usable = known.usable
    episodes, rows = np.unique(known.episode_index[usable], return_inverse=True)
    means = np.bincount(rows, known.score[usable]) / np.bincount(rows)
    lowest = ", ".join(f"{episodes[place]} ({means[place]:.2f})" for place in means.argsort()[:10])
    console.print(
        f"{path} holds what the scorer of {options.scorer} says. Its lowest episodes: {lowest}.", soft_wrap=True
    )


if __name__ == "__main__":
    main()
