"""Facts and hostile names for the tests of cards, and what a reader of a card's Markdown sees."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from synthetic_runs import ptr_rows, sft_rows

from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.publishing.card_facts import BasePolicy, CardFacts, Evaluation, TrainingData
from ptr_hf.report.dynamics import Dynamics, DynamicsLog, read_dynamics
from ptr_hf.report.evaluation import WeightShare

RANDOM_BASE = BasePolicy(policy_type="act", random_weights=True)
HOSTILE = (
    "a | b || c",
    "two\nlines\r\n---\n# heading",
    "<script>alert(1)</script>",
    "</details><img src=x onerror=alert(1)>",
    "[click](http://evil) ![x](y) <http://evil>",
    "**bold** _it_ `code` ~~gone~~ $x$ \\| &amp; {{ facts }} {% raw %}",
    "key: {a: [b]} # c & *d !e 'f' \"g\" %h @i",
    "- - - \t\x00\x1b[31m\u202eevil\u2028\ud800",
    "```\nfence",
    "__0__",
    "",
    "x" * 5000,
)


def config_of(preset: str = "ptr", **changes: Any) -> PTRHyperparameters:
    config = PTRHyperparameters(preset=preset, **changes)
    return config


def share(name: str, chunks: int = 10) -> WeightShare:
    return WeightShare(name, 2, chunks, 1.25, 0.5, 0.625)


def two_runs(path: Path) -> Dynamics:
    """An SFT run and a PTR run in one file."""
    DynamicsLog(path, run="sft").append(*sft_rows(rows=40))
    DynamicsLog(path, run="ptr").append(*ptr_rows(rows=40))
    return read_dynamics(path)


def everything_known(dynamics: Dynamics) -> CardFacts:
    """Facts of which none is missing."""
    return CardFacts(
        config=config_of(),
        base=BasePolicy(policy_type="smolvla", source="lerobot/smolvla_base", revision="abc123"),
        chunk_size=50,
        data=[
            TrainingData(source="me/demos", revision="v2.0", episodes=60, frames=4422),
            TrainingData(source="me/more", episodes=7),
        ],
        steps=6000,
        settings={
            "steps": 6000,
            "segments per step, all processes": 32,
            "processes": 4,
            "schedule": "cosine",
            "seed": 17,
        },
        dynamics=dynamics,
        task_shares=[share("pick the cube"), share("open the drawer", 30)],
        source_shares=[share("me/demos"), share("me/more")],
        effective_sample_size=0.734,
        evaluations=[
            Evaluation(environment="metaworld", task="push-v3", episodes=50, success=0.62, standard_error=0.069),
            Evaluation(environment="metaworld", task="reach-v3", episodes=50, success=0.9, step=6000),
            Evaluation(environment="metaworld", task="push-v3", episodes=50, success=0.31, step=3000),
        ],
        versions={"lerobot": "0.6.1", "torch": "2.11.0"},
        license="apache-2.0",
        repo_id="me/push_ptr",
    )


def tokens(markdown: str) -> Iterator[Token]:
    """All tokens of a document, also those inside lines, as the CommonMark parser with tables sees them."""
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        yield token
        yield from token.children or ()


def tables(markdown: str) -> list[list[list[str]]]:
    """Rows of every table, each cell as the text that a reader sees."""
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type in ("table_open", "table_close"):
            inside = token.type == "table_open"
            found += [[]] if inside else []
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            found[-1][-1].append("".join(part.content for part in token.children or () if part.type != "link_open"))
    return found


def blocks(card: ModelCard, language: str = "python") -> list[str]:
    return [token.content for token in tokens(card.text) if token.type == "fence" and token.info == language]
