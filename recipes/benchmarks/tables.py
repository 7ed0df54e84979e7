"""Tables of a page, between `<!-- begin NAME -->` and `<!-- end NAME -->`, that nobody writes by hand."""

import re
from collections.abc import Mapping, Sequence


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with every table between its marks.

    Args:
        page: its text.
        tables: Markdown by name.

    Raises:
        ValueError: the page lacks a table's marks.
    """
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        found = marks.search(page)
        if found is None:
            raise ValueError(
                f"The page has no '<!-- begin {name} -->' and '<!-- end {name} -->': put them where the table goes."
            )
        page = f"{page[: found.start()]}{found[1]}{table}\n{found[2]}{page[found.end() :]}"
    return page


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the header first."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))
