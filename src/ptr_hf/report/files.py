"""Files beside a run: whole or not there, and never a reason for the run to end."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPORT_FILE = "ptr_report.html"
FIGURES_FOLDER = "figures"
DAMAGED = ".damaged"
"""Ending of a file that could not be read and was put aside; such files are not published."""

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` unless the block raises, then it is removed.

    The suffix of `path` is kept, so writers that choose a format by the name still do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        # On the disk before the rename: a crash in between must not leave an empty file under the final name.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def beside_the_run(what: str) -> Iterator[None]:
    """What is written or read beside a run may fail, the run may not: an error is reported in a sentence.

    Args:
        what: went wrong, as the beginning of that sentence, e.g. "The report could not be written".
    """
    try:
        yield
    # figures, fonts, parquet and JSON raise whatever a damaged input makes them stumble over
    except Exception as error:
        reason = " ".join(str(error).split())
        logger.warning("%s (%s: %s); everything else goes on.", what, type(error).__name__, reason)
        logger.debug("%s", what, exc_info=error)


def put_aside(path: Path, reason: object) -> None:
    """Keep a file that cannot be read under another name, say so, and let a new one be begun in its place."""
    kept = path.with_name(path.name + DAMAGED)
    with suppress(OSError):
        os.replace(path, kept)
    logger.warning("%s cannot be read (%s). It is kept as %s, and a new one is begun.", path, reason, kept.name)
