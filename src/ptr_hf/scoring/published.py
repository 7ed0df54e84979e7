"""Scores of a dataset as a dataset repo on the Hub: its files and a card."""

import html
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ptr_hf.report.text import visible
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE, DatasetScores
from ptr_hf.scoring.next_steps import EXCLUDE_FILE, KEEP_FILE, PAGE_FILE, recommendation

FILES = (CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE, KEEP_FILE, EXCLUDE_FILE, PAGE_FILE)
OWN_BRANCH = "ptr_scores"
CARD_FILE = "README.md"
MOST_ROWS = 20


def push_scores(scores: DatasetScores, sources: Sequence[str], folder: Path, repo_id: str) -> str:
    """Publish what an inspection has written.

    Into the inspected dataset's own repo it goes on a branch `ptr_scores`, without a card, so that the dataset's own stays.

    Args:
        scores: that were saved in the folder.
        sources: of the datasets, as the user named them; local paths are cut to their last part.
        folder: with the files.
        repo_id: of a dataset repo, made if need be.

    Returns:
        the address of what was pushed.

    Raises:
        ValueError: the Hub refused or did not answer; everything is still in the folder.
    """
    own = repo_id in sources
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        for file in FILES:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, staged / file)
        if (staged / PAGE_FILE).is_file():
            page = staged / PAGE_FILE
            page.write_text(_without_paths(page.read_text(encoding="utf-8"), [*sources, str(folder)]), encoding="utf-8")
        if not own:
            (staged / CARD_FILE).write_text(card(scores, repo_id, sources), encoding="utf-8")
        api = HfApi()
        try:
            repo_id = api.create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id
            if own:
                api.create_branch(repo_id, branch=OWN_BRANCH, repo_type="dataset", exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=staged,
                revision=OWN_BRANCH if own else None,
                commit_message="Scores of the demonstrations (ptr-score)",
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.TransportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The scores were not pushed to {repo_id}: {reason} Everything is in {folder}; log in with `hf auth login` "
                f"or check the name, then run the command again."
            ) from error
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{OWN_BRANCH}" if own else "")


def card(scores: DatasetScores, repo_id: str, sources: Sequence[str]) -> str:
    """The card: what was inspected, what was found, and how to use it."""
    said = recommendation(scores)
    names = [settings["repo_id"] for settings in scores.settings["datasets"]]
    on_hub = [source for source in sources if "/" in source and not Path(source).exists()]
    head = {
        "pretty_name": f"Scores of {', '.join(names)}",
        "task_categories": ["robotics"],
        "tags": ["LeRobot", "ptr_hf", "data-quality"],
        "configs": [
            {"config_name": "episodes", "data_files": EPISODES_FILE},
            {"config_name": "chunks", "data_files": CHUNKS_FILE},
        ],
        **({"source_datasets": on_hub} if on_hub else {}),
    }
    rows = [
        f"| {row.episode_index} | {row.z:.1f} | {row.weight:.2f} | {_cell(row.reason)} | {_cell(row.task)} |"
        for row in scores.flagged.head(MOST_ROWS).itertuples()
    ]
    table = ["| episode | z | weight | reason | task |", "|---|---|---|---|---|", *rows] if rows else []
    notes = [f"- {_cell(note)}" for note in scores.notes]
    lines = [
        f"# Scores of {', '.join(map(_cell, names))}",
        f"**{said.headline}.** {said.sentence}",
        f"{len(scores.episodes)} episodes and {len(scores.chunks)} frames were inspected from their states, actions and "
        f"instructions; at most {scores.settings['false_alarms']:.1%} of good episodes should be flagged.",
        "\n".join(table),
        "\n".join(notes),
        "```bash\n"
        f"hf download {repo_id} {CHUNKS_FILE} --repo-type dataset --local-dir scores\n"
        "ptr-train --policy_path lerobot/smolvla_base "
        f"--dataset {on_hub[0] if on_hub else names[0]} --weights scores/{CHUNKS_FILE} --output_dir out\n"
        "```",
        f"`{PAGE_FILE}` shows the worst episodes; `{KEEP_FILE}` and `{EXCLUDE_FILE}` list episodes by number.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(filter(None, lines)) + "\n"


def _without_paths(text: str, paths: Sequence[str]) -> str:
    for path in sorted((path for path in paths if Path(path).exists()), key=len, reverse=True):
        whole = str(Path(path).parent)
        for shown in (path, whole) if whole not in (".", "/") else (path,):
            last = Path(path).name if shown == path else "."
            text = text.replace(html.escape(shown), html.escape(last))
    return text


def _cell(text: object) -> str:
    return visible(text).replace("|", "\\|")
