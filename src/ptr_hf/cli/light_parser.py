"""A parser of command lines that needs neither torch nor LeRobot, and the look of every command's help."""

from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter
from collections.abc import Sequence
from typing import Any, NoReturn

from ptr_hf.cli.option_names import unknown_options
from ptr_hf.cli.refusals import UsageError

WIDTH = 110
KINDS = {"int": "N", "float": "X", "Path": "PATH", "string_to_bool": "true|false", "dict": "JSON"}
"""What stands for the value of an option in the help, by the name of its type."""


class CommandHelp(HelpFormatter):
    """One spelling of every option, the kind of its value, and its default."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 36, "width": WIDTH, **kwargs})

    def default_of(self, action: Action) -> Any:
        """What counts where the option is not given; None where that is nothing, or the help has it in words."""
        return None if action.default == SUPPRESS or action.nargs == 0 else action.default

    def _get_help_string(self, action: Action) -> str:
        default = self.default_of(action)
        if action.dest == "help":
            return "Show this help and exit."
        if default is None:
            return action.help or ""
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{action.help} Default: {shown.lower() if isinstance(default, bool) else shown}."

    def _format_action_invocation(self, action: Action) -> str:
        name = next(name for name in action.option_strings if name.startswith("--"))
        if action.nargs == 0:
            return name
        kind = KINDS.get(getattr(action.type, "__name__", ""), "TEXT")
        if action.choices and len(list(action.choices)) <= 4:
            kind = "|".join(map(str, action.choices))
        value = str(action.metavar or kind)
        return f"{name} [{value}]" if action.nargs == "?" else f"{name} {value}{' ...' if action.nargs == '+' else ''}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # as it is written: examples keep their lines
        return "".join(f"{indent}{line}\n" for line in text.strip().splitlines())


class LightParser(ArgumentParser):
    """argparse's parser with whole names only, suggestions for others, and no usage before an error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": CommandHelp, "allow_abbrev": False, **kwargs})

    def parse(self, argv: Sequence[str]) -> Any:
        """The namespace of a command line.

        Args:
            argv: without the program's name.

        Raises:
            UsageError: an option is unknown, malformed or missing.
            SystemExit: help was asked for and printed.
        """
        given, rest = self.parse_known_args(argv)
        if rest:
            raise UsageError(unknown_options(rest, sorted(vars(given))))
        return given

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line."""
        raise UsageError(f"{message}.")
