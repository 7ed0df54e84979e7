"""`--help` shows what matters at once, with the values that count, and imports nothing heavy for it."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ptr_hf import PTRTrainingArguments
from ptr_hf.cli.help_groups import GROUPS, HELP_FILE, WORDS
from ptr_hf.cli.train_options import RecipeArguments, train_parser

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "lerobot", "accelerate", "datasets", "pandas")
RUN = """
import runpy, sys
heavy, sys.argv = sys.argv[1].split(), sys.argv[2:]
try:
    run = runpy.run_module if sys.argv[0].startswith("ptr_hf") else runpy.run_path
    run(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(sys.modules.keys() & set(heavy)))
"""
IN_WORDS = {"policy_path", "dataset", "max_steps", "num_train_epochs", "chunk_size", "eval_dataset", "hub_model_id"}
"""Options whose default is filled in later, by the policy or the run."""
NOTHING = {
    *(
        "policy_type",
        "policy_overrides",
        "mixture",
        "rename_map",
        "cache_features",
        "config",
        "resume_from_checkpoint",
        "eval_env",
        "license",
    ),
}
"""Options that stand for nothing where they are not given."""


@pytest.mark.parametrize(
    ("program", "option"),
    [
        ("ptr_hf.cli.train", "--weights"),
        (str(ROOT / "recipes" / "train_ptr.py"), "--weights"),
        ("ptr_hf.cli.score", "--false_alarms"),
        ("ptr_hf.cli.export", "--without_belief"),
    ],
)
def test_help_imports_nothing_heavy(program: str, option: str) -> None:
    command = [sys.executable, "-c", RUN, " ".join(HEAVY), program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
    assert option in done.stdout
    assert "Default: " in done.stdout


def test_the_written_help_is_what_the_parser_says() -> None:
    again = "write it anew: python -m ptr_hf.cli.train_options > src/ptr_hf/cli/train_help.txt"
    assert train_parser().format_help() == HELP_FILE.read_text(), again


def test_every_option_of_the_help_exists_with_its_default(tmp_path: Path) -> None:
    text = HELP_FILE.read_text()
    shown = re.findall(r"^  --(\w+)(.*(?:\n {3,}.*)*)", text[text.index("what is trained") :], re.MULTILINE)
    assert [name for name, _ in shown] == [name for names in GROUPS.values() for name in names] + ["help", "help_all"]
    real = vars(RecipeArguments()) | vars(PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    # what a test needs, not what a user gets
    real["use_cpu"] = False
    for name, told in shown[:-2]:
        default = re.search(r"Default: (.*?)(?:; .* with --preset ptr)?\.$", " ".join(told.split()))
        if name in NOTHING | {"output_dir"}:
            assert default is None, name
            assert real[name] is None or name == "output_dir"
            continue
        assert default is not None, name
        if name not in IN_WORDS:
            value = real[name][0] if isinstance(real[name], list) else getattr(real[name], "value", real[name])
            assert default[1] == (str(value).lower() if isinstance(value, bool) else str(value)), name


def test_a_command_line_is_the_two_dataclasses(tmp_path: Path) -> None:
    recipe, args = train_parser().parse(["--output_dir", str(tmp_path), "--use_cpu", "true", "--max_steps", "3"])
    assert isinstance(recipe, RecipeArguments)
    assert args.max_steps == 3


def test_help_all_has_every_option() -> None:
    text = train_parser().format_help(all=True)
    shown = re.findall(r"^  --(\w+)", text[text.index("what is trained") :], re.MULTILINE)
    own = {item.name for kind in (RecipeArguments, PTRTrainingArguments) for item in fields(kind) if item.init}
    assert sorted(shown) == sorted(own | {"help", "help_all"})
    assert "more of PTRHyperparameters:" in text


def test_what_is_said_in_other_words_is_an_option_of_the_help() -> None:
    assert WORDS.keys() <= {name for names in GROUPS.values() for name in names}


def test_a_run_begins_without_what_draws() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ptr_hf.cli.train_run; print('matplotlib' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"]
