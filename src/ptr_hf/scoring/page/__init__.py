"""One self-contained HTML page about an inspected dataset: who is bad, what it looks like, and what to do next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from ptr_hf.report.files import beside_the_run, replacing
from ptr_hf.report.page import page_templates
from ptr_hf.report.text import readable, without_local_paths
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.next_steps import PAGE_FILE, commands, recommendation
from ptr_hf.scoring.page.drawings import distribution, motion, score_curve
from ptr_hf.scoring.page.filmstrips import filmstrips
from ptr_hf.scoring.page.moments import Moment, moments
from ptr_hf.scoring.recordings import Recordings, read_recordings, single

MOST_CARDS, MOST_CELLS, MOST_MOTIONS = 12, 3000, 6
MOST_VALUES = 20
"""A column with more values is shown with those that lose most weight; one in which hardly two episodes agree is not shown."""


def write_page(
    scores: DatasetScores,
    sources: Sequence[Any],
    folder: str | Path,
    *,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    mixture: str | None = None,
    most: int = MOST_CARDS,
) -> Path:
    """Write ptr_scores.html: it needs no network and no script.

    Pictures that cannot be decoded are left out with a warning.

    Args:
        scores: of these datasets.
        sources: Hub ids, folders, open LeRobotDatasets or sources of a mixture, in the order of the inspection.
        folder: for the page.
        episodes: the subset of a single dataset that was inspected.
        revision: of a single Hub dataset.
        mixture: the YAML file that named the sources.
        most: bad episodes that are shown with pictures.

    Returns:
        the page's path.
    """
    several = "source" in scores.episodes
    read = [read_recordings(source, episodes=episodes, revision=revision) for source in sources]
    cards: list[dict[str, Any]] = []
    for number, (source, recordings) in enumerate(zip(sources, read, strict=True)):
        of = number if several else None
        window = scores.settings["window_frames"][number]
        found = moments(scores, recordings, window, most, of)
        camera, pictures = _pictures(source, recordings, found, revision)
        cards += [_card(moment, recordings, scores, window, camera, pictures, of) for moment in found]
    cards.sort(key=lambda card: card["z"])
    said = recommendation(scores)
    names = [settings["repo_id"] for settings in scores.settings["datasets"]]
    flagged = scores.episodes["weight"].to_numpy() < 1
    environment = page_templates()
    page = environment.get_template("inspection.html.j2").render(
        names=names,
        said=said,
        episodes=len(scores.episodes),
        frames=len(scores.chunks),
        flagged=int(flagged.sum()),
        excluded=len(scores.excluded),
        moved=scores.moved,
        cells=_cells(scores, {card["anchor"] for card in cards[:most]}),
        cards=cards[:most],
        distributions=[
            (title, distribution(scores.episodes[name].to_numpy(np.float64), flagged))
            for name, title in scores.settings["questions"].items()
            if scores.episodes[name].notna().any() and scores.episodes[name].std() > 0.01
        ],
        tables=_tables(scores.episodes, _columns(scores, read, names)),
        notes=scores.notes,
        commands=commands(scores, [str(single(source)[0]) for source in sources], Path(folder), mixture),
        settings=sorted((name, readable(value)) for name, value in without_local_paths(dict(scores.settings)).items()),
    )
    path = Path(folder) / PAGE_FILE
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _pictures(
    source: Any, recordings: Recordings, found: Sequence[Moment], revision: str | None
) -> tuple[str, dict[tuple[int, int], str]]:
    wanted: dict[int, set[int]] = {}
    for moment in found:
        wanted.setdefault(int(recordings.episode_index[moment.row]), set()).update(moment.frames.tolist())
        if moment.companion is not None:
            number = int(recordings.episode_index[moment.companion])
            wanted.setdefault(number, set()).update(moment.companion_frames.tolist())
    with beside_the_run(f"The page shows no pictures of {recordings.name}"):
        return filmstrips(source, {number: sorted(frames) for number, frames in wanted.items()}, revision)
    return "", {}


def _card(
    moment: Moment,
    recordings: Recordings,
    scores: DatasetScores,
    window: int,
    camera: str,
    pictures: dict[tuple[int, int], str],
    source: int | None,
) -> dict[str, Any]:
    """One bad episode as the page shows it."""
    number = int(recordings.episode_index[moment.row])
    rows = scores.episodes["episode_index"] == number
    if source is not None:
        rows &= scores.episodes["source"] == source
    row = scores.episodes[rows].iloc[0]
    companion = None if moment.companion is None else int(recordings.episode_index[moment.companion])
    curve = Markup("")
    if moment.curve is not None:
        marked = moment.frames.tolist() if pictures else []
        curve = score_curve(
            moment.curve, moment.flagged, window, recordings.fps, moment.worst, marked, moment.companion_curve
        )
    return {
        "anchor": _anchor(source, number),
        "name": f"Episode {number}" if source is None else f"{recordings.name}, episode {number}",
        "z": float(row["z"]),
        "weight": float(row["weight"]),
        "reason": str(row["reason"]),
        "task": str(row["task"]),
        "question": scores.settings["questions"][moment.question],
        "camera": camera,
        "pictures": _strip(pictures, number, moment.frames, recordings.fps),
        "companion": "" if companion is None else f"episode {companion}",
        "companion_pictures": []
        if companion is None
        else _strip(pictures, companion, moment.companion_frames, recordings.fps),
        "curve": curve,
        "motions": _motions(moment, recordings),
    }


def _strip(pictures: dict[tuple[int, int], str], episode: int, frames: np.ndarray, fps: float) -> list[tuple[str, str]]:
    """Frames of a filmstrip: data URLs, and their times in the episode."""
    return [
        (pictures[episode, frame], f"{frame / fps:.1f} s") for frame in frames.tolist() if (episode, frame) in pictures
    ]


def _motions(moment: Moment, recordings: Recordings) -> tuple[Markup, ...]:
    """The actions and states that differ most from the good episode's in their course."""
    own = slice(recordings.first[moment.row], recordings.last[moment.row] + 1)
    other = None
    if moment.companion is not None:
        other = slice(recordings.first[moment.companion], recordings.last[moment.companion] + 1)
    found: list[tuple[float, Markup]] = []
    for kind, values, names in (
        ("action", recordings.action, recordings.action_names),
        ("state", recordings.state, recordings.state_names),
    ):
        spread = recordings.deviation(values)
        drawn = []
        for column in np.flatnonzero(spread > 0):
            mine, its = values[own, column], None if other is None else values[other, column]
            apart = float(mine.std()) if its is None else _apart(mine, its)
            drawn.append((apart / float(spread[column]), motion(mine, its, f"{kind} {names[column]}")))
        found += sorted(drawn, key=lambda pair: -pair[0])[: MOST_MOTIONS // 2]
    return tuple(drawing for _, drawing in found)


def _apart(mine: np.ndarray, its: np.ndarray) -> float:
    places = np.linspace(0, 1, 50)
    course = [np.interp(places, np.linspace(0, 1, len(series)), series) for series in (mine, its)]
    return float(np.abs(course[0] - course[1]).mean())


def _cells(scores: DatasetScores, anchors: set[str]) -> list[dict[str, str]]:
    """Every episode, in order, of the kind "good", "part" or "bad"; none where there are too many to show."""
    if len(scores.episodes) > MOST_CELLS:
        return []
    cells = []
    for row in scores.episodes.itertuples():
        source = getattr(row, "source", None)
        anchor = _anchor(source, row.episode_index)
        kind = "good" if row.weight == 1 else "bad" if row.weight <= scores.settings["weight_min"] else "part"
        says = f"episode {row.episode_index}: {row.reason or 'nothing found'} (z {row.z:.1f})"
        cells.append({"anchor": anchor if anchor in anchors else "", "kind": kind, "says": says})
    return cells


def _anchor(source: int | None, episode: int) -> str:
    return f"episode-{episode}" if source is None else f"episode-{source}-{episode}"


def _columns(scores: DatasetScores, read: Sequence[Recordings], names: Sequence[str]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {"task": scores.episodes["task"].to_numpy()}
    if len(read) > 1:
        columns["source"] = np.asarray(names, dtype=object)[scores.episodes["source"]]
    shared = set.intersection(*(set(recordings.attributes) for recordings in read))
    for name in sorted(shared - columns.keys()):
        columns[name] = np.concatenate([np.asarray(recordings.attributes[name], dtype=object) for recordings in read])
    return columns


def _tables(episodes: pd.DataFrame, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Who is flagged, by the values (episodes,) of each column: those tables that are worth showing."""
    lost = episodes["frames"] * (1 - episodes["weight"])
    about = episodes.assign(flagged=episodes["weight"] < 1, moved=lost)
    found = []
    for name, values in columns.items():
        texts = pd.Series([str(value) for value in values], index=episodes.index, name="name")
        number = texts.nunique()
        if number < 2 or (number > MOST_VALUES and number > len(texts) / 2):
            continue
        groups = about.groupby(texts)
        rows = groups[["flagged", "frames", "moved"]].sum().assign(episodes=groups.size(), z=groups["z"].median())
        rows["moved"] /= rows["frames"].clip(lower=1)
        rows = rows.reset_index().sort_values(["moved", "name"], ascending=[False, True])
        shown = list(rows.head(MOST_VALUES).itertuples())
        found.append({"name": name, "rows": shown, "left_out": max(number - MOST_VALUES, 0)})
    return found
