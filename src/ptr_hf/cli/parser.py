"""The parser of every command: options from dataclasses, real defaults in the help, one line of error."""

from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ptr_hf.cli.option_names import meant, unknown_options
from ptr_hf.cli.refusals import UsageError, refusals
from ptr_hf.hyperparameters import DEFAULT_PRESET, DEFAULTS, PRESETS


class OptionParser(HfArgumentParser):
    """transformers' parser of dataclasses with whole names only, suggestions for others, and no usage before an error.

    Args:
        dataclass_types: a dataclass or several, whose fields are the options.
        kwargs: as for `argparse.ArgumentParser`.

    Example:
        >>> (arguments,) = OptionParser(ExportArguments, prog="ptr-export").parse(sys.argv[1:])
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, **{"formatter_class": _Defaults, "allow_abbrev": False, **kwargs})

    def parse(self, argv: Sequence[str], files: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, ...]:
        """The dataclasses of a command line.

        Args:
            argv: without the program's name.
            files: options of YAML files, by file; later ones override earlier ones, and `argv` overrides them all.

        Returns:
            one instance of every dataclass.

        Raises:
            SystemExit: help was asked for, or an option is unknown, malformed or refused; one line has been printed.
        """
        with refusals(self.prog, self._known):
            words = self._words(files or {})
            _, rest = self.parse_known_args([*words, *argv])
            if rest:
                raise UsageError(unknown_options(rest, self._known))
            return tuple(self.parse_args_into_dataclasses([*words, *argv], look_for_args_file=False))

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line."""
        raise UsageError(f"{message}.")

    @property
    def _known(self) -> list[str]:
        return sorted({action.dest for action in self._actions} - {"help"})

    def _words(self, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The options of YAML files as words of a command line, so that they are parsed alike."""
        actions = {action.dest: action for action in self._actions}
        words: dict[str, str] = {}
        # what the command line has no spelling for
        structures: dict[str, Any] = {}
        for file, options in files.items():
            for name, value in options.items():
                if name not in self._known or name == "config":
                    hint = meant(name, [known for known in self._known if known != "config"])
                    raise UsageError(f"--config {file}: unknown options {name}" + (f"; {hint}" if hint else "."))
                words.pop(name, None)
                structures.pop(name, None)
                if isinstance(value, list | dict):
                    structures[name] = value
                elif value is not None:
                    words[name] = f"--{name}={_word(file, actions[name], value)}"
                    try:
                        self.parse_known_args([words[name]])
                    except UsageError as error:
                        raise UsageError(f"--config {file}: {error}") from error
        self.set_defaults(**structures)
        return list(words.values())


def _word(file: str, action: Action, value: Any) -> str:
    if isinstance(value, bool):
        if action.type is not string_to_bool:
            raise UsageError(
                f"--config {file}: {action.dest} is read as {str(value).lower()}, as YAML does with yes, no, on and off: "
                f'write it in quotes, {action.dest}: "{"yes" if value else "no"}".'
            )
        return str(value).lower()
    return str(value)


class _Defaults(HelpFormatter):
    """Every option's default: the method's as the presets set it."""

    def _get_help_string(self, action: Action) -> str:
        help = action.help or ""
        usual = DEFAULTS.get(action.dest)
        if usual is not None and action.default is None:
            here = PRESETS[DEFAULT_PRESET].get(action.dest, usual)
            return f"{help} (default: {here}" + (f"; {usual} with --preset ptr)" if here != usual else ")")
        if action.default is None or action.default is SUPPRESS or "%(default)" in help:
            return help
        return f"{help} (default: %(default)s)"
