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
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ptr_hf.artifact import PTR_SCORER_NAME
from ptr_hf.checkpoints import (
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
    (partial / "trainer_state.json").write_text("{}")
    (partial / "shards").mkdir()
    (partial / "shards" / "optimizer.pt").write_bytes(bytes(100))
    commit(target, manifest(4))
    return target


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    """A run's folder with the complete checkpoints of steps 4, 20 and 100."""
    for step in (4, 20, 100):
        shutil.copytree(sound, tmp_path / f"checkpoint-{step}")
        named = json.loads((sound / MANIFEST_NAME).read_text())
        text = json.dumps(named | {"step": step})
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).write_text(text)
    return tmp_path


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


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    "no state": (lambda folder: edit_manifest(folder, files={}), r"does not list trainer_state.json"),
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
