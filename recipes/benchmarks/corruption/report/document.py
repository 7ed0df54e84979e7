"""A page as a list of sections, written as HTML or as Markdown with the same words and numbers."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import FileSystemLoader
from matplotlib.figure import Figure

from ptr_hf.report.files import replacing
from ptr_hf.report.page import page_templates
from ptr_hf.report.style import save_figure

MISSING = "missing"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Command lines."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows. `words` is set where the other columns hold text."""

    kind: ClassVar[str] = "table"
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is its file's, without the ending."""

    kind: ClassVar[str] = "picture"
    name: str
    caption: str
    figure: Figure


Block = Text | Points | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `level` 2 is the page's highest."""

    title: str
    blocks: tuple[Block, ...] = ()
    level: int = 2
    anchor: str = field(default="")


def write_html(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page with its figures inside, and the figures once more as `figures/*.png` beside it.

    Returns:
        `path`.
    """
    pictures = {}
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Picture):
            file = save_figure(block.figure, path.parent / "figures" / f"{block.name}.png", dpi=110)
            pictures[block.name] = base64.b64encode(file.read_bytes()).decode("ascii")
    environment = page_templates()
    environment.loader = FileSystemLoader(Path(__file__).parent)
    page = environment.get_template("page.html.j2").render(title=title, sections=sections, pictures=pictures)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def markdown(title: str, sections: Sequence[Section], figures: str) -> str:
    """The page in Markdown; `figures` is the path from it to the folder of the figures."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"{'#' * section.level} {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block, figures), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text whose characters mean nothing to Markdown or HTML."""
    return (
        html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("`", "\\`").replace("[", "\\[")
    )


def _lines(block: Block, figures: str) -> list[str]:
    match block:
        case Text():
            return [escape(block.text)]
        case Points():
            return [f"- {escape(item)}" for item in block.items]
        case Code():
            return ["```", *block.text.splitlines(), "```"]
        case Picture():
            return [f"![{escape(block.name)}]({figures}/{block.name}.png)", "", escape(block.caption)]
        case Table():
            rule = "|---|" + ("---|" if block.words else "--:|") * (len(block.header) - 1)
            table = ["| " + " | ".join(map(escape, row)) + " |" for row in (block.header, *block.rows)]
            return [*([escape(block.caption), ""] if block.caption else []), table[0], rule, *table[1:]]
