"""Ctrl-C ends a command with exit code 130 and one line that says how to go on, without a traceback."""

import os
import shlex
import sys
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

EXIT_CODE = 130
"""What a shell reports for a program that Ctrl-C ended."""
LAUNCHERS = ("accelerate", "torchrun")
CHECKPOINTS = ("checkpoint-*", "*/checkpoint-*")
"""Of a run, and of the two runs that a comparison with SFT makes."""
_OUTPUT: list[Path] = []


def writes_to(output_dir: str | Path) -> None:
    """Say where the run's checkpoints go, so that an interruption can tell whether there are any."""
    _OUTPUT[:] = [Path(output_dir)]


def end_quietly(program: str, resumable: bool = False) -> None:
    """Let Ctrl-C end this program with one line from now on, also while modules are still being imported.

    Args:
        program: name that the line begins with.
        resumable: whether the program takes ``--resume_from_checkpoint``.
    """
    before, command = sys.excepthook, _command()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{program}: interrupted. {_how_to_go_on(command) if resumable else ''}".rstrip(), file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(EXIT_CODE)

    sys.excepthook = hook


def _how_to_go_on(command: list[str]) -> str:
    if not any(any(folder.glob(pattern)) for folder in _OUTPUT for pattern in CHECKPOINTS):
        return "No checkpoint was written; --save_strategy steps --save_steps N writes them on the way."
    if any(word.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint" for word in command):
        return f"Go on with the same command: {shlex.join(command)}"
    return f"Go on with: {shlex.join(command)} --resume_from_checkpoint last"


def _command() -> list[str]:
    """How this program was started: by its launcher, where there is one."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    for place, word in enumerate(words):
        if Path(word).name in LAUNCHERS and sys.argv[0] in words[place:]:
            return [Path(word).name, *words[place + 1 :]]
    return [Path(sys.executable).name, *sys.argv]
