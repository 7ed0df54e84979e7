"""Command lines that are wrong end in one line, before anything is loaded; Ctrl-C says how to go on."""

import inspect
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from lerobot.utils.import_utils import get_safe_default_video_backend

from ptr_hf import PTRTrainingArguments
from ptr_hf.cli.first_look import FOREIGN, first_look
from ptr_hf.cli.option_names import ELSEWHERE, unknown_options
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import UsageError, as_options
from ptr_hf.log_filters import FALLBACK, DecoderWarning

RECIPE = Path(__file__).parents[2] / "recipes" / "train_ptr.py"
NO_TORCH = (
    "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dataset", "me/demos"], "--dataset needs a --policy_path, the policy to fine-tune"),
        (["--normalize_over", "window"], "it was taken out in 0.2: every micro-batch is divided by its own Σw"),
        (["--batch_size", "4"], "did you mean --per_device_train_batch_size (segments on each device)?"),
    ],
)
def test_refused_before_torch_is_imported(options: list[str], sentence: str) -> None:
    command = [sys.executable, "-c", NO_TORCH, str(RECIPE), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "real"),
    [
        ("--steps", "--max_steps"),
        ("--lr=1e-4", "--learning_rate"),
        ("--policy.path=lerobot/smolvla_base", "--policy_path"),
        ("--dataset.repo_id=me/demos", "--dataset"),
        ("--batch-size", "--per_device_train_batch_size"),
        ("--policy.type=act", "--policy_type"),
        ("--resume", "--resume_from_checkpoint (`last`, or a checkpoint's folder)"),
    ],
)
def test_names_of_other_programs(option: str, real: str) -> None:
    with pytest.raises(UsageError) as refusal:
        first_look([option, "4"])
    assert f"{option.partition('=')[0]} is no option here" in str(refusal.value)
    assert real in str(refusal.value)


def test_every_suggestion_is_an_option_and_no_option_is_taken_for_another(recipe_options: set[str]) -> None:
    assert set(ELSEWHERE) <= recipe_options
    assert not FOREIGN & recipe_options


@pytest.fixture(scope="module")
def recipe_options() -> set[str]:
    own = {"config", "policy_path", "policy_type", "dataset", "eval_dataset", "output_dir"}
    return own | {item.name for item in fields(PTRTrainingArguments)}


@dataclass
class Arguments(PTRTrainingArguments):
    """Those of PTR with an option for several words."""

    names: list[str] | None = field(default=None, metadata={"help": "Several."})


BASE = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max_step", "2"], "--max_step is no option here; did you mean --max_steps?"),
        (["--batch_size", "2"], "--batch_size is no option here; did you mean --per_device_train_batch_size"),
        (["--qqqqqq"], "--qqqqqq is no option here."),
        (["stray"], "stray belongs to no option: every option begins with --."),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'."),
        (["--preset", "sft", "--alpha", "1"], "--preset sft sets alpha=0.0, but alpha=1.0 was given"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 is out of range: it must be 0 or more."),
        (["--learning_rate", "nan"], "learning_rate=nan is out of range: it must be finite."),
        (
            ["--per_device_train_batch_size", "0"],
            "per_device_train_batch_size=0 is out of range: it must be 1 or more.",
        ),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 is out of range"),
        (["--seed", "-1"], "seed=-1 is out of range: it must be between 0 and 4294967295."),
        (["--adam_beta2", "1"], "adam_beta2=1.0 is out of range: it must be in [0, 1)."),
        (["--warmup_steps", "-5"], "warmup_steps=-5.0 is out of range: it must be 0 or more."),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers=-1 is out of range"),
        (["--max_steps", "2", "--num_train_epochs", "3"], "max_steps=2 and num_train_epochs=3 were both given"),
        (["--rename_map", "{'a': 'b'}"], "rename_map is no JSON"),
        (["--rename_map", "a:b"], "--rename_map a:b is no mapping: give JSON"),
        (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType"),
    ],
)
def test_one_line_and_no_usage(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        OptionParser(Arguments, prog="program").parse([*BASE, *options])
    shown = capsys.readouterr().err if refusal.value.code == 2 else str(refusal.value.code)
    assert shown.startswith("program: ")
    assert sentence in shown
    assert "usage:" not in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_steps: 10.5", "argument --max_steps/--max-steps: invalid int value: '10.5'."),
        ("weight_map: none", "invalid choice: 'none'"),
        (
            "save_strategy: no",
            "save_strategy is read as false, as YAML does with yes, no, on and off: write it in quotes",
        ),
        ("batch_size: 4", "unknown options batch_size; did you mean --per_device_train_batch_size"),
    ],
)
def test_a_wrong_value_in_a_file_is_named_with_the_file(
    text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = text.partition(": ")
    options = {name: {"no": False}.get(value, float(value) if "." in value else value)}
    with pytest.raises(SystemExit):
        OptionParser(Arguments, prog="program").parse(BASE, {"run.yaml": options})
    shown = capsys.readouterr().err
    assert "--config run.yaml: " in shown
    assert sentence in shown


def test_files_are_read_as_the_command_line_is() -> None:
    first = {"rename_map": {"a": "b"}, "names": ["x", "y"], "beta": 2, "scorer_warmup_steps": "1e1", "in_memory": True}
    first["preset"] = "ptr_calibrated"
    (args,) = OptionParser(Arguments).parse(BASE, {"first.yaml": first, "second.yaml": {"beta": None}})
    assert (args.rename_map, args.names, args.in_memory) == ({"a": "b"}, ["x", "y"], True)
    assert (args.beta, args.scorer_warmup_steps) == (1.5, 10.0)
    assert args.given == {"preset": "ptr_calibrated", "scorer_warmup_steps": 10.0}


def test_help_shows_the_defaults_that_count(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        OptionParser(Arguments).parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Default: task; all with --preset ptr." in shown
    assert "(start value). Default: 0.12." in shown
    assert "one of ptr, sft_belief" in shown
    assert "Default: ptr_offline." in shown
    assert "Default: None" not in shown


def test_python_spelling_becomes_the_command_lines() -> None:
    said = "leave use_cpu=True out, or give rename_map={'top': 'camera1'}; dtype='video' stays"
    expected = """leave --use_cpu true out, or give --rename_map '{"top": "camera1"}'; dtype='video' stays"""
    assert as_options(said, ("use_cpu", "rename_map")) == expected


def test_several_unknown_options_are_all_named() -> None:
    assert unknown_options(["--aplha", "1", "--stps=2"], ["alpha", "max_steps"]) == (
        "--aplha is no option here; did you mean --alpha? --stps is no option here."
    )


WAITS = """
import signal, sys, time
from ptr_hf.cli import interrupts
# a test run in the background of a shell hands on that it is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.end_quietly("train_ptr.py", resumable=True)
interrupts.writes_to(sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, saved: bool) -> None:
    script, output = tmp_path / "train.py", tmp_path / "my out"
    script.write_text(WAITS)
    (output / "ptr_calibrated" / "checkpoint-4" if saved else output).mkdir(parents=True)
    command = [sys.executable, str(script), str(output)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    _, shown = run.communicate()
    assert run.returncode == 130
    (line,) = shown.strip().splitlines()
    assert line.startswith("train_ptr.py: interrupted. ")
    again = f"Go on with: {Path(sys.executable).name} {script} '{output}' --resume_from_checkpoint last"
    assert line.endswith(again if saved else "--save_strategy steps --save_steps N writes them on the way.")


def test_lerobots_warning_about_its_decoder_is_one_line_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lerobot.utils.import_utils")
    (own,) = [known for known in logger.filters if isinstance(known, DecoderWarning)]
    own.said = False
    for _ in range(2):
        logger.warning(
            "Could not load\nlibtorchcodec\n'torchcodec' is installed but cannot be loaded. Falling back to 'pyav'."
        )
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == [FALLBACK, "something else"]


def test_lerobots_warning_is_still_the_one_that_is_shortened() -> None:
    source = inspect.getsource(get_safe_default_video_backend)
    assert "torchcodec" in source
    assert "Falling back to 'pyav'" in source
    assert get_safe_default_video_backend.__module__ == "lerobot.utils.import_utils"
