"""What the card templates print: every value escaped for Markdown, sources as links, and where the templates lie."""

import json
import math
import re
import shlex
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ptr_hf.artifacts.sources import Source, named_source
from ptr_hf.report.evaluation import number, titled
from ptr_hf.report.text import visible

LONGEST_TEXT = 1000
"""Characters; no sentence of ours is longer, and a name that is would fill the card."""
TABLE_ROWS = 20


def fill_card(header: str, template: str, **context: Any) -> str:
    """README.md: the metadata (YAML without its fences) and a filled template of `model_cards/`."""
    body = _environment().get_template(template).render(**context, limit=TABLE_ROWS)
    return f"---\n{header}\n---\n\n{body.strip()}\n"


@cache
def _environment() -> Environment:
    """Everything a template prints is escaped for Markdown, except what a filter here has made safe."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        finalize=_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"source": named_source, "link": _link, "code": _code, "literal": _literal, "number": number}
    environment.filters |= {"percent": percent, "titled": titled, "value": _value, "shell": _shell}
    return environment


def _template(name: str) -> str:
    """A template from inside the installed package, or from beside src/ in a checkout."""
    shipped = resources.files("ptr_hf") / "model_cards" / name
    if not shipped.is_file():
        shipped = Path(__file__).parents[3] / "model_cards" / name
    return shipped.read_text(encoding="utf-8")


def plain(value: object) -> str:
    """One line of visible text: no control or direction characters, at most `LONGEST_TEXT` characters."""
    text = visible(value) or "(no name)"
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def _escape(value: object) -> Markup:
    """Text that Markdown, HTML and a table's cells show as it is; character references work in all three."""
    if isinstance(value, Markup):
        return value
    marks = r"[\\`*\[\]<>|~#$&@]|(?<![a-z0-9])_|_(?![a-z0-9])|:(?=//)|(?<=www)\."
    return Markup(re.sub(marks, lambda mark: f"&#{ord(mark[0])};", plain(value), flags=re.IGNORECASE))


def _code(value: object) -> Markup:
    """A code span for an identifier; anything else as escaped text."""
    text = str(value)
    return Markup(f"`{text}`") if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else _escape(text)


def _literal(value: object) -> Markup:
    """A string literal for a line of Python inside a fenced block."""
    return Markup(json.dumps(plain(value), ensure_ascii=False))


def _shell(value: object) -> Markup:
    """A word of a command line inside a fenced block."""
    return Markup(shlex.quote(plain(value)))


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100.0 * value:.{digits}f} %"


def _link(source: Source, revision: str | None = None, kind: str = "") -> Markup:
    """A source with its revision: a link into the Hub, or the name of a folder that is said to be local."""
    if not source.on_hub:
        return _escape(source.name) + Markup(" (a local folder)")
    at = f"/tree/{quote(plain(revision), safe='')}" if revision else ""
    link = Markup(f"[`{source.name}`]({constants.ENDPOINT}/{kind}{source.name}{at})")
    return link + (Markup(" at revision ") + _code(plain(revision)) if revision else Markup(", revision not recorded"))
