"""The corruption protocol of METHOD.md section 12, and the label faults that section 13 adds to it.

Every function is pure and seeded: an :class:`Episode` goes in, a new one comes out. Labels change (actions, the instruction),
or the pictures of one camera alone; states stay what the robot did. Truncation alone cuts every stream.

    noise               N(0, std^2) on every action channel                     paper: ANI, std 0.1, share 0.30
    truncation          the first 40-70 % of the steps                          paper: TT, share 0.25
    wrong_instruction   the instruction of another task                         paper: LN, share 0.20
    wrong_convention    the sign of some action axes flipped                    another robot's frame of reference
    delay               each action written down some steps too late            unsynchronised logging
    scaled              actions multiplied by a factor                          another controller gain
    zeroed              actions lost
    noise_in_part       noise on a stretch of the episode
    camera_moved        one camera's pictures shifted                           a camera that was knocked
    wrong_camera        one camera shows another, or the episode beside it      swapped cables or files
    frozen_frames       one camera's picture stands still for a stretch         a stream that hung
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from jaxtyping import UInt8

from episodes import Episode, Pictures
from ptr_hf.data.demonstrations import CLEAN, TruthRecord

KINDS = (
    "noise",
    "truncation",
    "wrong_instruction",
    "wrong_convention",
    "delay",
    "scaled",
    "zeroed",
    "noise_in_part",
    "camera_moved",
    "wrong_camera",
    "frozen_frames",
)
IMAGE_KINDS = ("camera_moved", "wrong_camera", "frozen_frames")
"""These need a camera, and leave everything but its pictures as it was."""
PAPER_SHARES = {"noise": 0.30, "truncation": 0.25, "wrong_instruction": 0.20}


def add_action_noise(
    episode: Episode, seed: int, std: float | Sequence[float] = 0.1, bounds: Sequence[float] | None = None
) -> Episode:
    """Adds N(0, std^2) to every action channel, or each its own std; ``bounds`` (low, high) clips it to the action space."""
    noise = np.random.default_rng(seed).normal(0.0, std, size=episode.actions.shape)
    noisy = episode.actions + noise
    return episode.with_actions(noisy if bounds is None else np.clip(noisy, bounds[0], bounds[1]))


def truncate(episode: Episode, steps: int) -> Episode:
    """Keeps the first ``steps`` steps of every stream."""
    if not 1 <= steps <= episode.length:
        raise ValueError(f"Cannot keep {steps} steps of an episode of {episode.length}; give 1 to {episode.length}.")
    return Episode({key: value[:steps] for key, value in episode.frames.items()}, episode.task)


def draw_truncation(length: int, seed: int, keep: Sequence[float] = (0.4, 0.7)) -> int:
    """The number of steps to keep, uniform over those within the shares ``keep`` of ``length``.

    Raises:
        ValueError: if no whole number of steps lies in that range.
    """
    low, high = int(np.ceil(keep[0] * length)), int(np.floor(keep[1] * length))
    if not 1 <= low <= high:
        raise ValueError(f"No number of steps lies within {keep} of an episode of {length} steps; widen the range.")
    return int(np.random.default_rng(seed).integers(low, high, endpoint=True))


def replace_instruction(episode: Episode, instruction: str) -> Episode:
    """The same motion under another instruction."""
    return Episode(episode.frames, instruction)


def draw_instruction(task: str, instructions: Sequence[str], seed: int) -> str:
    """One of ``instructions`` that is not ``task``.

    Raises:
        ValueError: if there is none.
    """
    others = sorted(set(instructions) - {task})
    if not others:
        raise ValueError(f"There is no instruction other than '{task}' to draw from; name alternatives for this task.")
    return others[int(np.random.default_rng(seed).integers(len(others)))]


def flip_convention(episode: Episode, axes: Sequence[int] = (0, 1)) -> Episode:
    """Negates the action channels ``axes``: x and y of an end-effector delta, as if the base frame were turned by 180 deg."""
    actions = episode.actions.copy()
    actions[:, list(axes)] *= -1
    return episode.with_actions(actions)


def delay_actions(episode: Episode, steps: int = 8) -> Episode:
    """Writes each action ``steps`` steps late; the first one fills the gap."""
    if steps < 0:
        raise ValueError(f"A delay is a number of steps from 0 on, not {steps}.")
    source = np.maximum(np.arange(episode.length) - steps, 0)
    return episode.with_actions(episode.actions[source])


def scale_actions(episode: Episode, factor: float = 0.5, axes: Sequence[int] | None = None) -> Episode:
    """Multiplies the action channels ``axes`` (default: all) by ``factor``."""
    actions = episode.actions.copy()
    actions[:, slice(None) if axes is None else list(axes)] *= factor
    return episode.with_actions(actions)


def zero_actions(episode: Episode, axes: Sequence[int] | None = None) -> Episode:
    """Sets the action channels ``axes`` (default: all) to zero."""
    return scale_actions(episode, 0.0, axes)


def add_noise_in_part(
    episode: Episode, start: int, steps: int, seed: int, std: float = 0.1, bounds: Sequence[float] | None = None
) -> Episode:
    """`add_action_noise` on ``steps`` steps from ``start`` on; the others stay as they are."""
    noisy = add_action_noise(episode, seed, std, bounds).actions
    inside = (np.arange(episode.length) >= start) & (np.arange(episode.length) < start + steps)
    return episode.with_actions(np.where(inside[:, None], noisy, episode.actions))


def shifted(pictures: Pictures, down: int, right: int) -> Pictures:
    """Every picture moved by so many pixels, as if the camera had been turned; its edge fills what comes into view."""
    rows = np.clip(np.arange(pictures.shape[1]) - down, 0, pictures.shape[1] - 1)
    columns = np.clip(np.arange(pictures.shape[2]) - right, 0, pictures.shape[2] - 1)
    return pictures[:, rows][:, :, columns]


def draw_shift(size: Sequence[int], seed: int, shift: float) -> tuple[int, int]:
    """Pixels down and right, in a drawn direction, as far as a share `shift` of the shorter side of (height, width)."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    far = shift * min(size)
    return round(far * np.sin(angle)), round(far * np.cos(angle))


def frozen(pictures: Pictures, start: int, steps: int) -> Pictures:
    """The picture of step `start` for `steps` steps; after them the camera shows the present again."""
    source = np.arange(len(pictures))
    source[start : start + steps] = start
    return pictures[source]


def held(pictures: Pictures, steps: int) -> UInt8[np.ndarray, "held height width 3"]:
    """The first `steps` pictures, or all and then the last one again and again."""
    return pictures[np.minimum(np.arange(steps), len(pictures) - 1)]


def draw_stretch(length: int, seed: int, share: float) -> tuple[int, int]:
    """First step and number of steps of a stretch of an episode, as long as a share of its `length`.

    Raises:
        ValueError: if the share is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"A stretch is a share of the episode above 0 and at most 1, not {share}.")
    steps = max(1, round(share * length))
    return int(np.random.default_rng(seed).integers(0, length - steps, endpoint=True)), steps


def corrupt(
    episode: Episode,
    kind: str,
    seed: int,
    instructions: Sequence[str] = (),
    beside: Episode | None = None,
    **parameters: Any,
) -> tuple[Episode, dict[str, Any]]:
    """Applies one corruption and says exactly what was done.

    Args:
        episode: the clean demonstration.
        kind: one of :data:`KINDS`.
        seed: decides every draw.
        instructions: what ``wrong_instruction`` may pick from.
        beside: another episode, whose pictures ``wrong_camera`` takes where there is no second camera of the same size.
        parameters: the keyword arguments of the kind's function.

    Returns:
        The corrupted episode and the values used, drawn ones included.

    Raises:
        ValueError: for an unknown kind.
    """
    match kind:
        case "noise":
            values = {"std": 0.1, "bounds": None} | parameters
            return add_action_noise(episode, seed, **values), values
        case "truncation":
            steps = draw_truncation(episode.length, seed, **parameters)
            return truncate(episode, steps), {"steps": steps, "recorded_steps": episode.length}
        case "wrong_instruction":
            instruction = draw_instruction(episode.task, instructions, seed)
            return replace_instruction(episode, instruction), {"instruction": instruction}
        case "wrong_convention":
            values = {"axes": (0, 1)} | parameters
            return flip_convention(episode, **values), values
        case "delay":
            values = {"steps": 8} | parameters
            return delay_actions(episode, **values), values
        case "scaled":
            values = {"factor": 0.5, "axes": None} | parameters
            return scale_actions(episode, **values), values
        case "zeroed":
            values = {"axes": None} | parameters
            return zero_actions(episode, **values), values
        case "noise_in_part":
            values = {"std": 0.1, "bounds": None, "share": 0.25} | parameters
            start, steps = draw_stretch(episode.length, seed, values.pop("share"))
            return add_noise_in_part(episode, start, steps, seed, **values), values | {"start": start, "steps": steps}
        case "camera_moved":
            camera = _draw_camera(episode, seed)
            shown = episode.frames[camera]
            down, right = draw_shift(shown.shape[1:3], seed, **{"shift": 0.15} | parameters)
            values = {"camera": camera, "down": down, "right": right}
            return episode.with_pictures(camera, shifted(shown, down, right)), values
        case "wrong_camera":
            camera = _draw_camera(episode, seed)
            shows, shown = _other_pictures(episode, camera, beside)
            return episode.with_pictures(camera, held(shown, episode.length)), {"camera": camera, "shows": shows}
        case "frozen_frames":
            camera = _draw_camera(episode, seed)
            start, steps = draw_stretch(episode.length, seed, **{"share": 0.3} | parameters)
            values = {"camera": camera, "start": start, "steps": steps}
            return episode.with_pictures(camera, frozen(episode.frames[camera], start, steps)), values
    raise ValueError(f"Unknown corruption '{kind}'; the known ones are {', '.join(KINDS)}.")


def _draw_camera(episode: Episode, seed: int) -> str:
    if not episode.cameras:
        raise ValueError(
            f"{', '.join(IMAGE_KINDS)} change pictures, and the episodes have no colour camera, but {sorted(episode.frames)}."
        )
    return episode.cameras[int(np.random.default_rng(seed).integers(len(episode.cameras)))]


def _other_pictures(episode: Episode, camera: str, beside: Episode | None) -> tuple[str, Pictures]:
    """Pictures of the next camera of the same size, or of the same camera in another episode, and which of the two."""
    size = episode.frames[camera].shape[1:]
    place = episode.cameras.index(camera)
    for other in episode.cameras[place + 1 :] + episode.cameras[:place]:
        if episode.frames[other].shape[1:] == size:
            return other, episode.frames[other]
    if beside is None:
        raise ValueError("wrong_camera takes a second camera of the same size, or a second episode; there is neither.")
    return "the episode beside it", beside.frames[camera]


@dataclass(frozen=True)
class CorruptionPlan:
    """Which episodes get which corruption.

    Args:
        shares: kind -> share of all episodes, spread evenly over the tasks.
        seed: decides which episodes, and every draw inside a corruption.
        parameters: kind -> keyword arguments of that corruption.
        alternatives: instruction -> the wrong instructions that are plausible in its scene; default: all others.
        overlapping: draw every kind independently, so that an episode may get several. Otherwise each gets at most one.

    Raises:
        ValueError: for unknown kinds, shares outside [0, 1], or shares that cannot be disjoint.
    """

    shares: Mapping[str, float]
    seed: int = 0
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alternatives: Mapping[str, Sequence[str]] | None = None
    overlapping: bool = False

    def __post_init__(self) -> None:
        unknown = sorted((set(self.shares) | set(self.parameters)) - set(KINDS))
        if unknown:
            raise ValueError(f"Unknown corruptions {unknown}; the known ones are {', '.join(KINDS)}.")
        if any(not 0.0 <= share <= 1.0 for share in self.shares.values()):
            raise ValueError(f"Every share lies between 0 and 1; got {dict(self.shares)}.")
        if not self.overlapping and sum(self.shares.values()) > 1.0 + 1e-9:
            raise ValueError(f"The shares {dict(self.shares)} add up to more than 1; lower them or allow overlapping.")

    def assign(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """The kinds of every episode, given the episodes' tasks; () for the clean ones."""
        rng = np.random.default_rng([self.seed, len(tasks)])
        kinds: list[tuple[str, ...]] = [() for _ in tasks]
        queue = _interleaved(tasks, rng)
        for kind in (name for name in KINDS if name in self.shares):
            count = min(round(self.shares[kind] * len(tasks)), len(queue))
            for index in queue[:count]:
                kinds[index] += (kind,)
            queue = _interleaved(tasks, rng) if self.overlapping else queue[count:]
        return kinds

    def apply(self, episodes: Iterable[Episode], tasks: Sequence[str]) -> Iterator[tuple[Episode, list[TruthRecord]]]:
        """Yields every episode as it is to be written, with its truth; ``tasks`` are the episodes' instructions in order.

        Raises:
            ValueError: if an episode's instruction is not the one announced in ``tasks``.
        """
        for index, ((episode, beside), kinds) in enumerate(
            zip(_side_by_side(episodes), self.assign(tasks), strict=True)
        ):
            if episode.task != tasks[index]:
                raise ValueError(f"Episode {index} is '{episode.task}', but the plan was made for '{tasks[index]}'.")
            source = episode.task
            choices = tasks if self.alternatives is None else self.alternatives.get(source, ())
            applied: list[tuple[str, int, dict[str, Any]]] = []
            for kind in kinds:
                seed = int(np.random.SeedSequence([self.seed, index, KINDS.index(kind)]).generate_state(1)[0])
                episode, values = corrupt(episode, kind, seed, choices, beside, **self.parameters.get(kind, {}))
                applied.append((kind, seed, values))
            records = [TruthRecord(index, kind, source, episode.task, values, seed) for kind, seed, values in applied]
            yield episode, records or [TruthRecord(index, CLEAN, source, source)]


def _side_by_side(episodes: Iterable[Episode]) -> Iterator[tuple[Episode, Episode | None]]:
    """Every episode as recorded, with the one before it; the first one with the second."""
    stream = iter(episodes)
    ahead = list(islice(stream, 2))
    beside = ahead[1] if len(ahead) > 1 else None
    for episode in chain(ahead, stream):
        yield episode, beside
        beside = episode


def draw_episodes(tasks: Sequence[str], share: float, seed: int) -> list[int]:
    """A share of the episodes, spread evenly over their tasks: those that a plan of the same seed would corrupt first.

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share lies between 0 and 1, not {share}.")
    return sorted(_interleaved(tasks, np.random.default_rng([seed, len(tasks)]))[: round(share * len(tasks))])


def _interleaved(tasks: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A random order of the episodes in which the tasks take turns, so that every prefix is balanced over the tasks."""
    shuffled = rng.permutation(len(tasks)).tolist()
    turn: dict[str, int] = {}
    place: dict[int, tuple[int, int]] = {}
    order = {task: position for position, task in enumerate(rng.permutation(sorted(set(tasks))).tolist())}
    for index in shuffled:
        turn[tasks[index]] = turn.get(tasks[index], -1) + 1
        place[index] = (turn[tasks[index]], order[tasks[index]])
    return sorted(place, key=place.__getitem__)
