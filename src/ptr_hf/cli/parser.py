"""The parser of every command: options from dataclasses, real defaults in the help, one line of error."""

from argparse import SUPPRESS, Action, Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ptr_hf.cli.light_parser import CommandHelp
from ptr_hf.cli.option_names import meant, unknown_options
from ptr_hf.cli.refusals import UsageError, refusals
from ptr_hf.hyperparameters import DEFAULT_PRESET, DEFAULTS
from ptr_hf.presets import PRESETS


class OptionParser(HfArgumentParser):
    """transformers' parser of dataclasses with whole names only, suggestions for others, and no usage before an error.

    Args:
        dataclass_types: a dataclass or several, whose fields are the options.
        groups: names of the options that `--help` shows, by heading; `--help_all` shows the others too. Without it `--help`
            shows all.
        words: help of options that replaces their fields', by name.
        kwargs: as for `argparse.ArgumentParser`.

    Example:
        >>> (arguments,) = OptionParser(ExportArguments, prog="ptr-export").parse(sys.argv[1:])
    """

    def __init__(
        self,
        dataclass_types: Any,
        groups: Mapping[str, Sequence[str]] | None = None,
        words: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataclass_types, **{"formatter_class": _Defaults, "allow_abbrev": False, **kwargs})
        self._groups = groups or {}
        if self._groups:
            self.add_argument(
                "--help_all",
                "--help-all",
                action=_HelpAll,
                nargs=0,
                default=SUPPRESS,
                help="Show every option and exit.",
            )
        for action in self._actions:
            if words and action.dest in words:
                # argparse reads % as a placeholder
                action.help = words[action.dest].replace("%", "%%")

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

    def format_help(self, all: bool = False) -> str:
        """The help, its options under the headings of the groups.

        Args:
            all: whether options outside the groups are shown too, under the names of the dataclasses that have them.
        """
        if not self._groups:
            return super().format_help()
        actions = {action.dest: action for action in reversed(self._actions)}
        sections = {title: list(names) for title, names in self._groups.items()}
        sections |= {"help": ["help", "help_all"]}
        if all:
            shown = {name for names in sections.values() for name in names}
            for kind in (kind for chosen in self.dataclass_types for kind in chosen.__mro__[::-1]):
                own = [name for name in vars(kind).get("__annotations__", ()) if name in actions.keys() - shown]
                sections |= {f"more of {kind.__name__}": own} if own else {}
                shown |= set(own)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, names in sections.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        return formatter.format_help()

    @property
    def _known(self) -> list[str]:
        return sorted({action.dest for action in self._actions} - {"help", "help_all"})

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


class _HelpAll(Action):
    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> NoReturn:
        print(parser.format_help(all=True), end="")
        raise SystemExit(0)


class _Defaults(CommandHelp):
    """Every option's default: the method's as the presets set it."""

    def default_of(self, action: Action) -> Any:
        """What counts where the option is not given."""
        if action.default is not None or action.dest not in DEFAULTS:
            default = super().default_of(action)
            return getattr(default, "value", default)
        usual = DEFAULTS[action.dest]
        here = PRESETS[DEFAULT_PRESET].fields.get(action.dest, usual)
        return f"{here}; {'none' if usual is None else usual} with --preset ptr" if here != usual else usual
