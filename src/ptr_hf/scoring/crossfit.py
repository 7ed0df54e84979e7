"""Small networks that judge only episodes they have not learned from, and learn mostly from episodes that others trust.

The episodes are dealt into folds. For each fold one network learns from all others; the networks lie side by side in one
batched product. After each stage every episode is judged by the network that has not seen it, and episodes that were judged
badly are drawn less often in the next stage: weight σ(2 (z + 3)) (METHOD: cross-fitted, self-weighted).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.recordings import Recordings

BLOCK = 8192
"""Frames that are judged at once."""

type Reweigh = Callable[[np.ndarray], np.ndarray]
"""(episodes, parts) scores -> (episodes,) how much each episode is trusted, in [0, 1]."""


@dataclass(frozen=True)
class FitSettings:
    """How the questions' networks are fitted.

    Attributes:
        folds: groups of episodes; each is judged by a network that learned from the others.
        stages: after each of them the episodes' weights are found anew.
        steps: of the optimiser in a stage.
        batch_size: frames a step and fold.
        hidden: width of the two hidden layers.
        learning_rate: at the start; it falls to zero along a cosine.
        max_frames: the networks learn from at most so many frames, drawn evenly; all are judged.
        seed: of folds, drawn frames and networks.
        device: where the networks are.
        progress: whether to show a progress bar.
    """

    folds: int = 4
    stages: int = 4
    steps: int = 150
    batch_size: int = 192
    hidden: int = 128
    learning_rate: float = 2e-3
    max_frames: int = 100_000
    seed: int = 0
    device: str = "cpu"
    progress: bool = True


class FoldedMLP(nn.Module):
    """One multilayer perceptron a fold, computed together: two SiLU layers beside a linear path.

    Args:
        folds: how many networks.
        inputs, hidden, outputs: widths.
        generator: draws the first weights.
    """

    def __init__(self, folds: int, inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
            values = torch.randn(folds, rows, columns, generator=generator)
            return nn.Parameter(values * gain / math.sqrt(max(rows, 1)))

        self.weights = nn.ParameterList([drawn(inputs, hidden), drawn(hidden, hidden), drawn(hidden, outputs, 0.1)])
        self.biases = nn.ParameterList(
            [nn.Parameter(torch.zeros(folds, 1, size)) for size in (hidden, hidden, outputs)]
        )
        self.linear = nn.Parameter(torch.zeros(folds, inputs, outputs))

    def forward(self, inputs: Float[Tensor, "folds batch inputs"]) -> Float[Tensor, "folds batch outputs"]:
        """The outputs of every fold's own network on its own rows."""
        hidden = functional.silu(torch.baddbmm(self.biases[0], inputs, self.weights[0]))
        hidden = functional.silu(torch.baddbmm(self.biases[1], hidden, self.weights[1]))
        return torch.baddbmm(self.biases[2], hidden, self.weights[2]).baddbmm(inputs, self.linear)

    def of_fold(self, fold: int, inputs: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """The outputs of one fold's network."""
        hidden = functional.silu(torch.addmm(self.biases[0][fold], inputs, self.weights[0][fold]))
        hidden = functional.silu(torch.addmm(self.biases[1][fold], hidden, self.weights[1][fold]))
        return torch.addmm(self.biases[2][fold], hidden, self.weights[2][fold]).addmm(inputs, self.linear[fold])


def standardized(recordings: Recordings, values: np.ndarray, rows: np.ndarray) -> Float[Tensor, "frames size"]:
    """Values (frames, size) at mean 0 and deviation 1 over some rows, `on_disk`; a dimension that does not change there is 0."""
    found = on_disk(values.shape, np.float32)
    if values.shape[1]:
        known = torch.as_tensor(values[rows])
        center, scale = known.mean(dim=0), known.std(dim=0, correction=0)
        still = scale <= 1e-6 * known.abs().amax(dim=0).clamp(min=1e-12)
        for _, span in recordings.blocks:
            moved = (torch.as_tensor(values[span]) - center) / torch.where(still, 1.0, scale)
            found[span] = torch.where(still, 0.0, moved).clamp(-20, 20).numpy()
    return torch.from_numpy(found)


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table that lies `on_disk`, on the device of their numbers."""
    return values[rows.cpu()].to(rows.device)


class CrossFit:
    """Which episodes are in which fold, and which frames are learned from.

    Args:
        recordings: of the dataset.
        settings: of the fits.

    Attributes:
        folds: at most as many as there are episodes with a frame that holds numbers; one judges no other below two.
        fold: (episodes,) of each episode; -1 of those without such a frame.
        rows: (n,) the frames that are learned from.
        state, action: (frames, size) of the recordings, standardised over these frames, `on_disk`; networks read the rows that
            they need with `taken`.
    """

    def __init__(self, recordings: Recordings, settings: FitSettings) -> None:
        self.recordings, self.settings = recordings, settings
        draws = np.random.default_rng(settings.seed)
        usable = recordings.means(recordings.finite[:, None])[:, 0] > 0
        self.folds = min(settings.folds, int(usable.sum()))
        self.fold = _dealt(recordings.task, usable, self.folds, draws)
        self.rows = _drawn(recordings, settings.max_frames, draws)
        self.state = standardized(recordings, recordings.state, self.rows)
        self.action = standardized(recordings, recordings.action, self.rows)
        self._episode = torch.as_tensor(recordings.episode)
        self._first, self._last = (
            torch.as_tensor(edge, device=settings.device) for edge in (recordings.first, recordings.last)
        )

    def at(self, rows: Int[Tensor, " frames"], steps: Sequence[int]) -> Int[Tensor, "frames steps"]:
        """The rows of the frames so many steps on (or back), held at the episode's ends."""
        episode = taken(self._episode, rows)
        first, last = self._first[episode][:, None], self._last[episode][:, None]
        return torch.clamp(rows[:, None] + torch.tensor(steps, device=rows.device), first, last)

    def fit(
        self,
        network: nn.Module,
        loss: Callable[[Tensor], Tensor],
        judge: Callable[[int, Tensor], Tensor],
        reweigh: Reweigh,
        label: str,
        effort: float = 1.0,
    ) -> np.ndarray:
        """Fit one network a fold, and judge every frame by the one that has not seen its episode.

        Args:
            network: of all folds.
            loss: of the frames (folds, batch), given by their rows.
            judge: of a fold's network, on the rows of frames (n,): scores (n, parts), higher is better.
            reweigh: how much to trust the episodes, from their mean scores.
            label: of the progress bar.
            effort: share of the settings' steps.

        Returns:
            (frames, parts) float32, `on_disk`; NaN for frames that hold no numbers.
        """
        settings, recordings = self.settings, self.recordings
        network.to(settings.device)
        steps = max(1, round(settings.steps * effort))
        total = settings.stages * steps
        optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total))
        )
        draws = np.random.default_rng([settings.seed, 1])
        trust = np.ones(len(recordings.length))
        fold = self.fold[recordings.episode[self.rows]]
        own = np.arange(self.folds)[:, None] == fold
        bar = tqdm(total=total, desc=label, disable=not settings.progress, leave=False, unit="step")
        for stage in range(settings.stages):
            chance = np.cumsum(np.where(own, 0.0, trust[recordings.episode[self.rows]]), axis=1)
            with one_thread():
                for _ in range(steps):
                    ball = draws.random((self.folds, settings.batch_size)) * chance[:, -1:]
                    drawn = np.stack(
                        [np.searchsorted(line, thrown, "right") for line, thrown in zip(chance, ball, strict=True)]
                    )
                    value = loss(torch.as_tensor(self.rows[drawn], device=settings.device))
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
            if stage < settings.stages - 1:
                judged = list(self._judged(judge, lambda number: [self.rows[fold == number]]))
                rows, scores = (np.concatenate(column) for column in zip(*judged, strict=True))
                order = rows.argsort()
                trust = np.clip(reweigh(recordings.means_at(rows[order], scores[order])), 1e-3, 1)
        bar.close()
        found: np.ndarray | None = None
        for rows, scores in self._judged(judge, self._finite_of):
            if found is None:
                found = on_disk((len(recordings), scores.shape[1]), np.float32)
                found[:] = np.nan
            found[rows] = scores
        assert found is not None, "some frame is finite"
        return found

    def _judged(
        self, judge: Callable[[int, Tensor], Tensor], of_fold: Callable[[int], Iterable[np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of frames, and their scores by the network of their fold, `BLOCK` at a time."""
        for number in range(self.folds):
            for rows in _in_blocks(of_fold(number)):
                with torch.no_grad():
                    scores = judge(number, torch.as_tensor(rows, device=self.settings.device))
                yield rows, scores.float().cpu().numpy()

    def _finite_of(self, number: int) -> Iterator[np.ndarray]:
        """The rows of a fold's frames that hold numbers."""
        for _, span in self.recordings.blocks:
            own = self.fold[self.recordings.episode[span]] == number
            yield span.start + np.flatnonzero(own & self.recordings.finite[span])


def _in_blocks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same numbers, `BLOCK` at a time."""
    left: np.ndarray = np.empty(0, np.int64)
    for part in parts:
        left = np.concatenate([left, part])
        while len(left) >= BLOCK:
            yield left[:BLOCK]
            left = left[BLOCK:]
    if len(left):
        yield left


def _drawn(recordings: Recordings, most: int, draws: np.random.Generator) -> np.ndarray:
    """(n,) rows of at most so many frames that hold numbers, drawn evenly."""
    number = int(recordings.finite.sum())
    if number <= most:
        return np.flatnonzero(recordings.finite)
    chosen, before, rows = np.sort(draws.choice(number, most, replace=False)), 0, []
    for _, span in recordings.blocks:
        finite = span.start + np.flatnonzero(recordings.finite[span])
        first, last = np.searchsorted(chosen, [before, before + len(finite)])
        rows.append(finite[chosen[first:last] - before])
        before += len(finite)
    return np.concatenate(rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """The steps' products are small: several threads gain nothing, and wait for each other where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _dealt(task: np.ndarray, usable: np.ndarray, folds: int, draws: np.random.Generator) -> np.ndarray:
    """(episodes,) folds of equal size, with each task's episodes spread over all of them; -1 of what is not usable."""
    order = draws.permutation(len(task))
    order = order[np.argsort(task[order], kind="stable")]
    order = order[usable[order]]
    fold = np.full(len(task), -1)
    fold[order] = np.arange(len(order)) % max(folds, 1)
    return fold
