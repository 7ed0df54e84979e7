"""What is refused ends a command with one sentence in the command line's spelling, without a traceback."""

import ast
import json
import re
import shlex
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_PYTHON = re.compile(r"\b([a-z]\w*)=('[^']*'|\"[^\"]*\"|\{[^{}]*\}|True\b|False\b)")


class UsageError(ValueError):
    """A command line that cannot be; exit code 2, as argparse's."""


@contextmanager
def refusals(program: str, options: Collection[str] = (), code: int = 1) -> Iterator[None]:
    """End the program with the sentence of what is refused inside; other errors pass.

    Args:
        program: name that the sentence begins with.
        options: of the program, without dashes.
        code: exit code of errors that are none of the command line's.
    """
    try:
        yield
    except UsageError as error:
        print(f"{program}: {as_options(str(error), options)} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError, ImportError) as error:
        sentence = f"{program}: {as_options(' '.join(str(error).split()), options)}"
        if code == 1:
            raise SystemExit(sentence) from error
        print(sentence, file=sys.stderr)
        raise SystemExit(code) from error


def as_options(sentence: str, options: Collection[str]) -> str:
    """A sentence with Python's spelling of arguments turned into the command line's.

    Args:
        sentence: that an error says.
        options: names to look for.

    Example:
        >>> as_options("leave use_cpu=True out, or give rename_map={'top': 'camera1'}", ("use_cpu", "rename_map"))
        'leave --use_cpu true out, or give --rename_map \\'{"top": "camera1"}\\''
    """

    def spelled(found: re.Match[str]) -> str:
        if found[1] not in options:
            return found[0]
        try:
            value = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):
            return found[0]
        text = value if isinstance(value, str) else json.dumps(value)
        return f"--{found[1]} {shlex.quote(text)}"

    return _PYTHON.sub(spelled, sentence)
