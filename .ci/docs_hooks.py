"""For `mkdocs build`: pages link to files of the clone, which the site has only where they are pictures."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "results/figures"


def on_files(files: Files, config: Any) -> Files:
    """Take the pictures of the results into the site."""
    for path in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File(f"{PICTURES}/{path.name}", str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pictures are linked where they lie in the site, and other files of the clone are named."""
    markdown = markdown.replace(f"](../{PICTURES}/", f"]({PICTURES}/")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
