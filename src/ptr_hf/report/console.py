"""The terminal that the recipes write to."""

from typing import Any

from rich.console import Console
from rich.text import Text

from ptr_hf.report.text import visible


class PlainConsole(Console):
    """Prints text as it is: brackets in a path are no markup, and control or direction characters are left out.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        """Text for a cell, a title or a line."""
        lines = text.split("\n")
        return super().render_str("\n".join(map(_printable, lines)), *args, **options)


def _printable(line: str) -> str:
    """The line as given, unless it holds what no terminal should be sent."""
    return line if line.isprintable() else visible(line)
