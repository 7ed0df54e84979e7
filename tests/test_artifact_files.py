"""Bytes of any kind: a header or a JSON file is refused with one error, or read as it is, in little memory."""

import os
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ptr_hf.files.reading import MAX_JSON_BYTES, read_header, read_json
from ptr_hf.files.regular import inside, regular_file

FEW_MB = 8 * 2**20


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    save_file({"weight": torch.ones(3, 4), "count": torch.tensor(1), "mask": torch.ones(5, dtype=torch.bool)}, path)
    return path


FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class TestAnyBytes:
    @pytest.mark.full
    @FUZZ
    @given(data=st.data())
    def test_a_header_is_refused_or_true(self, small_file: Path, data: st.DataObject) -> None:
        whole = bytearray(small_file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(whole) - 1))
            byte = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"{}[],:-')))
            whole[place : place + data.draw(st.integers(0, 2))] = bytes([byte])
        path = small_file.with_name("fuzzed.safetensors")
        path.write_bytes(whole)
        self.outcome(path)

    @FUZZ
    @given(length=st.integers(0, 2**64 - 1), rest=st.binary(max_size=200))
    def test_any_file(self, small_file: Path, length: int, rest: bytes) -> None:
        path = small_file.with_name("any.safetensors")
        path.write_bytes(struct.pack("<Q", length) + rest)
        self.outcome(path)

    def outcome(self, path: Path) -> None:
        tracemalloc.start()
        file, refusal = None, ""
        try:
            file = read_header(path)
        except ValueError as error:
            refusal = str(error)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < path.stat().st_size + FEW_MB
        if file is None:
            assert refusal.startswith(f"{path} ")
            return
        loaded = load_file(path)
        assert {name: tuple(value.shape) for name, value in loaded.items()} == {
            name: tensor.shape for name, tensor in file.tensors.items()
        }

    @FUZZ
    @given(
        text=st.one_of(
            st.binary(max_size=300), st.text(alphabet='{}[]",:0123456789eE.-tfn ', max_size=300).map(str.encode)
        )
    )
    def test_any_json(self, small_file: Path, text: bytes) -> None:
        path = small_file.with_name("any.json")
        path.write_bytes(text)
        content, refusal = None, ""
        try:
            content = read_json(path)
        except ValueError as error:
            refusal = str(error)
        assert isinstance(content, dict) != refusal.startswith(f"{path} ")

    @pytest.mark.parametrize(
        "text", ["[" + "[]," * 174_000 + "0]", '{"a":[' + "{}," * 174_000 + "0]}"], ids=["lists", "dicts"]
    )
    def test_the_largest_json_takes_little(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "large.json"
        path.write_text(text)
        assert len(text) < MAX_JSON_BYTES
        tracemalloc.start()
        try:
            if text.startswith("{"):
                read_json(path)
            else:
                with pytest.raises(ValueError, match="holds a list"):
                    read_json(path)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2 * FEW_MB


NAMES = ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "C:x", "nul\0byte", None, 3, ["x"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="is no plain file name") as caught:
        inside(tmp_path, name)
    assert "\0" not in str(caught.value)


def test_a_symlink_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"leads nowhere|leads out"):
        inside(tmp_path, "loop")
    assert inside(tmp_path, "plain.json") == tmp_path / "plain.json"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(os.path.relpath(path))


STRANGE = {
    "named pipe": (os.mkfifo, "is a named pipe where a file should be"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "symlink that leads out"),
    "folder": (Path.mkdir, "is a folder where a file should be"),
    "socket": (_socket, "is a socket where a file should be"),
    "dangling": (lambda path: path.symlink_to("gone"), "symlink that leads nowhere"),
    "other file": (lambda path: path.symlink_to("/etc/hostname"), "symlink that leads out"),
    "too large": (lambda path: os.truncate(_made(path), 2**39), "more than the"),
}


def _made(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_regular_file_of_the_folder_is_never_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = STRANGE[kind]
    path = tmp_path / "config.json"
    make(path)
    for read in (lambda: regular_file(tmp_path, "config.json"), lambda: read_json(path), lambda: read_header(path)):
        with pytest.raises(ValueError, match=expected) as caught:
            read()
        assert str(path) in str(caught.value)


def test_a_file_below_a_snapshot_may_lie_in_the_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--me--policy"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "0").write_text("{}")
    folder = repo / "snapshots" / "abc" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to("../../../blobs/0")
    assert regular_file(folder, "config.json") == folder / "config.json"
    assert regular_file(folder, "other.json") is None
    assert regular_file(folder, "x" * 300) is None
