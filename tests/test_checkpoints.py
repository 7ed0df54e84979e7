"""`checkpoints`: what stands in a run's folder is whole, and what is not whole is never picked up."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_policies import ptr_policy
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ptr_hf.artifacts.checks import PTR_SCORER_NAME
from ptr_hf.training.checkpoint_contents import BLOCK, checksums
from ptr_hf.training.checkpoint_files import (
    MANIFEST_NAME,
    Manifest,
    SaveError,
    checkpoints,
    commit,
    discard,
    fault,
    last_complete,
    partial_folder,
    remove_leftovers,
    rotate,
    write_failure,
    written_aside,
)


def manifest(step: int, resumable: bool = True) -> Manifest:
    return Manifest(step=step, world_size=1, batch_size=4, accumulation=2, global_batch=8, resumable=resumable)


@pytest.fixture(scope="module")
def sound(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of step 4: a real policy, and stand-ins for the Trainer's own files."""
    target = tmp_path_factory.mktemp("runs") / "checkpoint-4"
    partial = partial_folder(target)
    ptr_policy("smolvla", points, segment_length=2, num_belief_tokens=0).save_pretrained(partial)
    TrainerState(global_step=4, max_steps=200, epoch=0.5).save_to_json(str(partial / "trainer_state.json"))
    (partial / "shards").mkdir()
    (partial / "shards" / "optimizer.pt").write_bytes(bytes(100))
    commit(target, manifest(4))
    return target


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    """A run's folder with the complete checkpoints of steps 4, 20 and 100."""
    for step in (4, 20, 100):
        shutil.copytree(sound, tmp_path / f"checkpoint-{step}")
        edit_manifest(tmp_path / f"checkpoint-{step}", step=step)
        edit_state(tmp_path / f"checkpoint-{step}", global_step=step)
    return tmp_path


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(folder: Path, without: str = "", **changes: object) -> None:
    """As if it had been written so: the manifest agrees."""
    path = folder / "trainer_state.json"
    content = json.loads(path.read_text()) | changes
    content.pop(without, None)
    path.write_text(json.dumps(content))
    agree(folder, path.name)


def agree(folder: Path, name: str) -> None:
    """Let the manifest say of a file what it is now."""
    known = Manifest.read(folder)
    edit_manifest(
        folder,
        files=known.files | {name: (folder / name).stat().st_size},
        checksums=known.checksums | checksums(folder, [name]),
    )


class TestCommit:
    def test_a_checkpoint_is_not_there_until_it_is_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "checkpoint-40"
        partial = partial_folder(target)
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        assert checkpoints(tmp_path) == []
        assert get_last_checkpoint(str(tmp_path)) is None
        assert sort_checkpoints(str(tmp_path)) == []
        commit(target, manifest(40))
        assert checkpoints(tmp_path) == [target]
        assert get_last_checkpoint(str(tmp_path)) == str(target)
        assert not partial.exists()

    def test_the_manifest_lists_every_file_with_its_size(self, sound: Path) -> None:
        found = Manifest.read(sound)
        present = {path.relative_to(sound).as_posix() for path in sound.rglob("*") if path.is_file()}
        assert found.files.keys() == present - {MANIFEST_NAME}
        assert found.files["shards/optimizer.pt"] == 100
        assert (found.step, found.layout, found.global_batch) == (4, (1, 4, 2), 8)

    def test_an_older_one_of_the_same_name_gives_way(self, tmp_path: Path) -> None:
        target = tmp_path / "checkpoint-40"
        for content in ("old", "new"):
            partial_folder(target).mkdir()
            (partial_folder(target) / content).write_text(content)
            commit(target, manifest(40))
        assert {path.name for path in target.iterdir()} == {"new", MANIFEST_NAME}
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]

    def test_leftovers_of_killed_runs_go_and_nothing_else(self, tmp_path: Path) -> None:
        kept = ["checkpoint-40", "runs", ".push_abc", "checkpoint-notes"]
        gone = [".checkpoint-50.partial", ".checkpoint-30.discarded", ".unfinished"]
        for name in kept + gone:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("x")
        (tmp_path / ".ptr_dynamics.4711.parquet").write_text("x")
        (tmp_path / "ptr_dynamics.parquet").write_text("x")
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "ptr_dynamics.parquet"])


class TestWrittenAside:
    def test_files_are_replaced_together_in_the_end(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("old")
        (tmp_path / "other").write_text("other")
        with written_aside(tmp_path) as aside:
            (aside / "a").write_text("new")
            (aside / "b").write_text("new")
            assert (tmp_path / "a").read_text() == "old"
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
            "a": "new",
            "b": "new",
            "other": "other",
        }

    def test_an_error_leaves_the_old_ones(self, tmp_path: Path) -> None:
        def write() -> None:
            with written_aside(tmp_path) as aside:
                (aside / "a").write_text("new")
                (aside / "no" / "folder").write_text("new")

        (tmp_path / "a").write_text("old")
        with pytest.raises(FileNotFoundError):
            write()
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


class TestRotation:
    @pytest.mark.parametrize(
        ("limit", "keep", "left"),
        [
            (None, {100}, {4, 20, 100}),
            (0, {100}, {4, 20, 100}),
            (3, {100}, {4, 20, 100}),
            (2, {100}, {20, 100}),
            (2, {4, 100}, {4, 100}),
            (1, {4, 100}, {4, 100}),
            # the run was resumed from step 4 and has just written 20: the 100 of its first life is no reason to delete that
            (1, {20}, {20}),
        ],
    )
    def test_the_newest_and_the_best_stay(
        self, output: Path, limit: int | None, keep: set[int], left: set[int]
    ) -> None:
        rotate(output, limit, {output / f"checkpoint-{step}" for step in keep})
        assert {path.name for path in output.iterdir()} == {f"checkpoint-{step}" for step in left}

    def test_a_checkpoint_loses_its_name_before_its_files(self, output: Path) -> None:
        stubborn = output / ".checkpoint-20.discarded"
        # a folder that cannot be emptied stands for a deletion that was killed half way
        stubborn.mkdir()
        discard(output / "checkpoint-20")
        assert [path.name for path in checkpoints(output)] == ["checkpoint-100", "checkpoint-4"]
        assert not stubborn.exists()


def shorten(folder: Path) -> None:
    with (folder / PTR_SCORER_NAME).open("r+b") as file:
        file.truncate((folder / PTR_SCORER_NAME).stat().st_size - 1)


def swap_header(folder: Path) -> None:
    with (folder / PTR_SCORER_NAME).open("r+b") as file:
        file.write(bytes(8))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    """A symlink to the very same bytes, elsewhere."""
    outside = path.parents[1] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (shorten, r"ptr_scorer.safetensors has \d+ bytes instead of \d+"),
    "garbled": (swap_header, r"ptr_scorer.safetensors is damaged"),
    "file gone": (lambda folder: (folder / "shards" / "optimizer.pt").unlink(), r"shards/optimizer.pt is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), r"no ptr_checkpoint.json"),
    "half a manifest": (lambda folder: (folder / MANIFEST_NAME).write_text('{"step": 4'), r"does not parse"),
    "foreign manifest": (
        lambda folder: (folder / MANIFEST_NAME).write_text('{"a": 4}'),
        r"no manifest of a checkpoint",
    ),
    "numbers that are none": (lambda folder: edit_manifest(folder, files={"x": "big"}), r"no counts"),
    "weights alone": (lambda folder: edit_manifest(folder, resumable=False), r"save_only_model"),
    "no state": (
        lambda folder: edit_manifest(folder, files={}, checksums={}),
        r"does not list trainer_state.json",
    ),
    "one bit of the weights": (
        lambda folder: flip(folder / "model.safetensors"),
        r"model.safetensors: damaged since it was written",
    ),
    "one bit of what torch wrote": (
        lambda folder: flip(folder / "shards" / "optimizer.pt"),
        r"shards/optimizer.pt: damaged since it was written",
    ),
    "a checksum for a file that is not listed": (
        lambda folder: edit_manifest(folder, checksums={"../x": "00000000"}),
        r"checksums of files that it does not list",
    ),
    "a file outside": (
        lambda folder: edit_manifest(folder, files={**Manifest.read(folder).files, "../checkpoint-20/config.json": 1}),
        r"\.\./checkpoint-20/config.json is missing",
    ),
    "a symlink": (
        lambda folder: replace_by_link(folder / PTR_SCORER_NAME),
        r"ptr_scorer.safetensors is a symlink that leads out",
    ),
    "a folder that is a symlink": (
        lambda folder: replace_by_link(folder / "shards"),
        r"shards is a symlink that leads out",
    ),
    "a named pipe": (
        lambda folder: replace_by_pipe(folder / "shards" / "optimizer.pt"),
        r"optimizer.pt is a named pipe",
    ),
    "a manifest that is a named pipe": (
        lambda folder: replace_by_pipe(folder / MANIFEST_NAME),
        r"ptr_checkpoint.json is a named pipe",
    ),
    "another step than its name": (lambda folder: edit_manifest(folder, step=99), r"says that it is of step 99"),
    "state of another step": (lambda folder: edit_state(folder, global_step=10**9), r"cannot be|is of step 1000000000"),
    "a negative step": (lambda folder: edit_state(folder, global_step=-1), r"global_step cannot be -1"),
    "a step that is no number": (lambda folder: edit_state(folder, global_step="100"), r"global_step cannot be '100'"),
    "no step": (lambda folder: edit_state(folder, without="global_step"), r"trainer_state.json .*lacks global_step"),
    "an end before its step": (
        lambda folder: edit_state(folder, max_steps=99),
        r"max_steps is 99, but it is of step 100",
    ),
    "an epoch that is none": (lambda folder: edit_state(folder, epoch=float("inf")), r"epoch cannot be inf"),
    "a log that is none": (lambda folder: edit_state(folder, log_history={"loss": 1}), r"log_history cannot be"),
    "a best metric that is none": (lambda folder: edit_state(folder, best_metric="good"), r"best_metric cannot be"),
    "a best step to come": (lambda folder: edit_state(folder, best_global_step=101), r"best_global_step is 101"),
    "a field of something else": (lambda folder: edit_state(folder, surprise=1), r"another transformers.*surprise"),
    "a state that is no JSON": (
        lambda folder: ((folder / "trainer_state.json").write_text("[" * 10**5), agree(folder, "trainer_state.json")),
        r"trainer_state.json does not parse as JSON",
    ),
}


class TestChoice:
    def test_the_newest_by_number(self, output: Path) -> None:
        assert [path.name for path in checkpoints(output)] == ["checkpoint-100", "checkpoint-20", "checkpoint-4"]
        assert last_complete(output) == (output / "checkpoint-100", [])
        assert all(fault(path) is None for path in checkpoints(output))

    @pytest.mark.parametrize("name", DAMAGES)
    def test_a_damaged_one_is_passed_over_and_named(self, output: Path, name: str) -> None:
        damage, reason = DAMAGES[name]
        damage(output / "checkpoint-100")
        found, skipped = last_complete(output)
        assert found == output / "checkpoint-20"
        assert len(skipped) == 1
        assert skipped[0].startswith(f"{output / 'checkpoint-100'} is skipped: ")
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(skipped[0])

    def test_sizes_alone_are_compared_where_no_checksum_is_known_or_asked_for(self, output: Path) -> None:
        flip(output / "checkpoint-100" / "shards" / "optimizer.pt")
        assert fault(output / "checkpoint-100", contents=False) is None
        # as earlier versions wrote it
        edit_manifest(output / "checkpoint-100", checksums={})
        assert last_complete(output) == (output / "checkpoint-100", [])

    def test_the_policy_alone(self, output: Path) -> None:
        edit_manifest(output / "checkpoint-4", resumable=False)
        assert fault(output / "checkpoint-4", to_resume=False) is None
        flip(output / "checkpoint-4" / "model.safetensors")
        assert "model.safetensors" in str(fault(output / "checkpoint-4", to_resume=False))

    def test_checksums_see_every_block(self, tmp_path: Path) -> None:
        (tmp_path / "large").touch()
        (tmp_path / "empty").touch()
        os.truncate(tmp_path / "large", BLOCK + 6)
        found = [checksums(tmp_path, ["large", "empty"])]
        for place in (BLOCK - 1, BLOCK + 5):
            with (tmp_path / "large").open("r+b") as file:
                file.seek(place)
                file.write(b"\1")
            found.append(checksums(tmp_path, ["large", "empty"]))
        assert len({sums["large"] for sums in found}) == 3
        assert len({sums["empty"] for sums in found}) == 1

    def test_none_left(self, output: Path) -> None:
        for path in checkpoints(output):
            os.unlink(path / "model.safetensors")
        found, skipped = last_complete(output)
        assert found is None
        assert len(skipped) == 3
        assert last_complete(output / "nowhere") == (None, [])


class TestFailures:
    def test_which_errors_are_writes(self, tmp_path: Path) -> None:
        nowhere = tmp_path / "no" / "folder"
        found = {}
        writers: dict[str, Callable[[], object]] = {
            "text": lambda: nowhere.write_text("x"),
            "safetensors": lambda: save_file({"a": torch.zeros(1)}, nowhere),
            "small": lambda: torch.save({"a": torch.zeros(1)}, "/dev/full"),
            "large": lambda: torch.save({"a": torch.zeros(3_000_000)}, "/dev/full"),
            "elsewhere": lambda: torch.save({"a": torch.zeros(1)}, nowhere),
        }
        for name, write in writers.items():
            with pytest.raises(Exception) as caught:  # noqa: PT011  three libraries, three types
                write()
            found[name] = write_failure(caught.value)
        assert "No such file" in str(found["text"])
        assert "No such file" in str(found["safetensors"])
        assert {found[name] for name in ("small", "large", "elsewhere")} == {
            "torch.save could not write its file to the end"
        }
        assert write_failure(SaveError("a long message", "no room")) == "no room"
        assert write_failure(RuntimeError("Connection closed by peer")) is None
        assert write_failure(torch.OutOfMemoryError("CUDA out of memory")) is None
