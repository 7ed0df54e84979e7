"""Checkpoints from anyone: sound ones pass, every other gets one error that names the file, and no memory is taken."""

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_policies import base_policy, ptr_policy, stats_of

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts import checkpoint
from ptr_hf.artifacts.checks import PTR_SCORER_NAME, check_artifact, check_tensors, expected_tensors
from ptr_hf.artifacts.peft import wrap_with_peft
from ptr_hf.files.reading import MAX_HEADER_BYTES, MAX_JSON_BYTES
from ptr_hf.processor_ptr import make_ptr_pre_post_processors

CONFIG, BASE, SCORER = "ptr_config.json", "model.safetensors", "ptr_scorer.safetensors"
ADAPTER, ADAPTER_CONFIG, PREPROCESSOR = "adapter_model.safetensors", "adapter_config.json", "policy_preprocessor.json"
HEAD, QUEUE = "model.action_head.weight", "objective.queue.targets"
SMALL = {"segment_length": 2, "num_belief_tokens": 0, "queue_size": 32, "queue_negatives": 8}
CASES: dict[str, dict[str, Any]] = {
    "act": {},
    "smolvla-belief": {"num_belief_tokens": 2},
    "act-consequence": {"preset": "ptr_consequence"},
    "act-sft": {"preset": "sft"},
}
Damage = Callable[[Path], object]


def with_processors(policy: PTRPolicy, points: Path, folder: Path) -> Path:
    policy.save_pretrained(folder)
    for name, pipeline in zip(
        (PREPROCESSOR, "policy_postprocessor.json"),
        make_ptr_pre_post_processors(policy.config, stats_of(points)),
        strict=True,
    ):
        pipeline.save_pretrained(folder, config_filename=name)
    return folder


@pytest.fixture(scope="module")
def folders(points: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    made = {}
    for case, own in CASES.items():
        settings = own if case == "act-sft" else {**SMALL, **own}
        made[case] = with_processors(ptr_policy(case.split("-")[0], points, **settings), points, root / case)
    base = base_policy("smolvla", points)
    base.save_pretrained(root / "base")
    base.config.pretrained_path = root / "base"
    adapted = wrap_with_peft(base, LoraConfig(r=2, target_modules=r".*(action_in_proj|action_out_proj)"))
    made["adapter"] = with_processors(
        PTRPolicy(PTRConfig(device="cpu", preset="ptr", **SMALL), base_policy=adapted), points, root / "adapter"
    )
    return made


@pytest.fixture
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage, of `act` or the case that the test asks for."""
    source = folders[vars(request).get("param", "act")]
    return Path(shutil.copytree(source, tmp_path / "damaged", copy_function=os.link))


def write(path: Path, whole: bytes) -> None:
    """In place of a file that is linked to the sound one."""
    path.unlink(missing_ok=True)
    path.write_bytes(whole)


@contextmanager
def little_memory(room: int = 96 * 2**20) -> Iterator[None]:
    """Let this process map no more than `room` bytes on top of what it has, so that anything larger fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check(folder: Path) -> None:
    """What loading does before it builds anything."""
    artifact = check_artifact(folder)
    assert check_tensors(artifact.config, artifact, PTRPolicy)


class TestSoundFolders:
    @pytest.mark.parametrize("case", [*CASES, "adapter"])
    def test_every_file_and_tensor_fits(self, folders: dict[str, Path], case: str) -> None:
        folder = folders[case]
        before = torch.get_rng_state()
        artifact = check_artifact(folder)
        assert check_tensors(artifact.config, artifact, PTRPolicy)
        assert torch.equal(torch.get_rng_state(), before)
        assert artifact.config.device == "cpu"
        assert artifact.adapter_alone == (case == "adapter")
        for name, file in artifact.files.items():
            stored = load_file(folder / name)
            assert {key: tuple(value.shape) for key, value in stored.items()} == {
                key: value.shape for key, value in file.tensors.items()
            }

    def test_nothing_is_allocated(self, folders: dict[str, Path]) -> None:
        expected = expected_tensors(*(lambda it: (it.config, it, PTRPolicy))(check_artifact(folders["smolvla-belief"])))
        assert expected is not None
        assert all(tensor.is_meta for tensors in expected[0].values() for tensor in tensors.values())

    def test_names_agree_with_the_writer(self) -> None:
        assert PTR_SCORER_NAME == checkpoint.PTR_SCORER_NAME

    @pytest.mark.parametrize("shared", [False, True], ids=["repo's blobs", "cache's blobs"])
    def test_a_snapshot_consists_of_symlinks_into_the_cache(
        self, folders: dict[str, Path], tmp_path: Path, shared: bool
    ) -> None:
        cache = tmp_path / "hub"
        repo = cache / "models--me--policy"
        snapshot = repo / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (cache / "blobs" / "ab").mkdir(parents=True)
        for number, path in enumerate(sorted(folders["act"].iterdir())):
            blob = repo / "blobs" / f"{number:040d}"
            if shared:
                shutil.copyfile(path, cache / "blobs" / "ab" / f"{number:064d}")
                blob.symlink_to(Path("../../blobs/ab") / f"{number:064d}")
            else:
                shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        check(snapshot)
        outside = tmp_path / "other.safetensors"
        shutil.copyfile(folders["act"] / BASE, outside)
        (snapshot / BASE).unlink()
        (snapshot / BASE).symlink_to(outside)
        with pytest.raises(ValueError, match=rf"{BASE} is a symlink that leads out of the checkpoint's folder"):
            check_artifact(snapshot)


def edit_json(name: str, change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        write(folder / name, json.dumps(content).encode())

    return damage


def config(**values: Any) -> Damage:
    return edit_json(CONFIG, lambda content: content.update(values))


def base_config(**values: Any) -> Damage:
    return edit_json(CONFIG, lambda content: content["base"].update(values))


def content(name: str, text: str | bytes) -> Damage:
    return lambda folder: write(folder / name, text.encode() if isinstance(text, str) else text)


def header(name: str, entries: Any, data: bytes = b"", length: int | None = None) -> Damage:
    text = json.dumps(entries).encode()
    return content(name, struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        stored = load_file(folder / name)
        change(stored)
        (folder / name).unlink()
        save_file(stored, folder / name)

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        write(folder / name, whole[: int(share * len(whole))])

    return damage


def replaced(name: str, by: str) -> Damage:
    return lambda folder: (folder / name).rename(folder / by)


def linked(name: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(to)

    return damage


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


DEEP = '{"a":' * 200_000
LARGE, WIDE = 10**6, 2**16
DAMAGES: dict[str, tuple[Damage, str]] = {
    "scorer cut short": (cut(SCORER, 0.7), f"{SCORER} is damaged"),
    "base cut in its header": (cut(BASE, 0.0001), f"{BASE} is damaged: it is truncated or no safetensors"),
    "empty base": (content(BASE, b""), f"{BASE} is damaged.*0 bytes"),
    "a web page": (content(BASE, "<!doctype html><title>404</title>"), f"{BASE} is damaged.*no safetensors"),
    "a zip of pickles": (content(BASE, b"PK\x03\x04" + bytes(64)), f"{BASE} is damaged"),
    "Git LFS pointer": (content(BASE, "version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "terabytes declared": (header(SCORER, entry([2**40], 2**42), bytes(8)), f"{SCORER} is damaged"),
    "overflowing shape": (header(SCORER, entry([2**62, 8], 32), bytes(32)), f"{SCORER} is damaged.*overflow"),
    "header of exabytes": (header(SCORER, {}, length=2**62), f"{SCORER} is damaged.*should take {2**62}"),
    "header longer than any": (
        header(SCORER, {"__metadata__": {"note": "x" * MAX_HEADER_BYTES}}),
        f"{SCORER} has a header of",
    ),
    "data that no tensor claims": (header(SCORER, entry([2], 8), bytes(16)), f"{SCORER} is damaged"),
    "overlapping tensors": (
        header(SCORER, {**entry([2], 8), "v": entry([2], 8)["w"]}, bytes(8)),
        f"{SCORER} is damaged.*offset",
    ),
    "strange element type": (header(SCORER, entry([2], 2, "F8_E4M3"), bytes(2)), "type F8_E4M3; policies hold F64"),
    "strange rank": (header(SCORER, entry([1] * 99, 4), bytes(4)), "has 99 dimensions"),
    "pickle in place of the base": (replaced(BASE, "pytorch_model.bin"), "pytorch_model.bin in place.*never opened"),
    "pickle in place of the scorer": (replaced(SCORER, "ptr_scorer.pt"), "ptr_scorer.pt in place of.*never opened"),
    "shards in place of the base": (replaced(BASE, f"{BASE}.index.json"), "in shards: save it as one file"),
    "no base": (lambda folder: (folder / BASE).unlink(), f"is no PTR checkpoint: it lacks {BASE}"),
    "symlink out of the folder": (linked(SCORER, "../elsewhere"), f"{SCORER} is a symlink that leads out"),
    "config linked elsewhere": (linked(CONFIG, "../elsewhere"), f"{CONFIG} is a symlink that leads out"),
    "missing tensor": (tensors(SCORER, lambda own: own.pop(QUEUE)), rf"{SCORER} lacks \['{QUEUE}'\]"),
    "unknown tensors": (
        tensors(BASE, lambda own: own.update({f"stray{i}": torch.zeros(1) for i in range(5)})),
        r"unknown \['stray0', 'stray1', 'stray2'\] and 2 more",
    ),
    "other shape": (
        tensors(SCORER, lambda own: own.update({QUEUE: torch.zeros(5, 5)})),
        rf"{QUEUE} has shape \(5, 5\), this policy needs \(32, ",
    ),
    "other kind": (tensors(BASE, lambda own: own.update({HEAD: own[HEAD].long()})), rf"{HEAD} has the type I64"),
    "truncated config": (cut(CONFIG, 0.5), f"{CONFIG} is not a PTR configuration"),
    "config of another kind": (content(CONFIG, "[1]"), "holds a list instead of an object"),
    "binary config": (content(CONFIG, b"\xff\xfe\x00"), f"{CONFIG} is not a PTR configuration"),
    "deep config": (content(CONFIG, DEEP[:400_000]), f"{CONFIG} is not.*nested deeper"),
    "rather deep config": (config(base_path=json.loads("[" * 99 + "]" * 99)), f"{CONFIG} is not.*nested deeper"),
    "huge config": (content(CONFIG, '{"a": "' + "x" * MAX_JSON_BYTES + '"}'), f"{CONFIG} has .* bytes, more than"),
    "repeated key": (content(CONFIG, '{"alpha": 1, "alpha": 0}'), "the key 'alpha' occurs twice"),
    "not a number": (config(alpha=float("nan")), f"{CONFIG} is not.*NaN is no number"),
    "unknown field": (config(temprature=0.1), r"the field 'temprature' is unknown; did you mean temperature\?"),
    "unknown field of the base": (
        base_config(chunk_sise=4),
        r"'base.chunk_sise' is unknown; did you mean base.chunk_size",
    ),
    "out of range": (config(alpha=2.0), "alpha=2.0 is out of range"),
    "no base policy": (config(base={}), "lacks the base policy's configuration"),
    "unknown base policy": (config(base={"type": "robodog"}), "'robodog' is unknown; LeRobot has act, "),
    "another base policy": (edit_json("config.json", lambda own: own.update(type="pi0")), "are of two checkpoints"),
    "endless chunk": (base_config(chunk_size=10**12), "base.chunk_size='1000000000000' is out of range"),
    "wide base": (base_config(dim_model=WIDE, dim_feedforward=WIDE), "asks for far more than is stored"),
    "many layers": (base_config(n_encoder_layers=500), "asks for far more than is stored"),
    "endless layers": (
        base_config(n_encoder_layers=LARGE),
        "n_encoder_layers='1000000' is out of range: the limit is 512",
    ),
    "endless queue": (config(queue_size=2**20), "asks for far more than is stored"),
    "impossible base": (base_config(dim_model=33), "describes a policy that cannot be built"),
    "config of another model": (config(num_belief_tokens=5), r"lacks \['belief"),
}
ADAPTER_DAMAGES: dict[str, tuple[Damage, str]] = {
    "adapter cut short": (cut(ADAPTER, 0.7), f"{ADAPTER} is damaged"),
    "other rank": (edit_json(ADAPTER_CONFIG, lambda own: own.update(r=3)), r"lora_A.weight has shape \(2, \d+\)"),
    "endless rank": (edit_json(ADAPTER_CONFIG, lambda own: own.update(r=10**9)), "r='1000000000' is out of range"),
    "unknown method": (edit_json(ADAPTER_CONFIG, lambda own: own.update(peft_type="EVIL")), "method .* 'EVIL' is none"),
    "strange source": (
        edit_json(ADAPTER_CONFIG, lambda own: own.update(base_model_name_or_path=[1])),
        "must be a Hub id",
    ),
    "pickled adapter": (replaced(ADAPTER, "adapter_model.bin"), "lacks model.safetensors|adapter_model.bin in place"),
}


class TestDamagedFolders:
    @pytest.mark.full
    @pytest.mark.parametrize("name", DAMAGES)
    def test_one_error_says_what_is_wrong(self, folder: Path, name: str) -> None:
        self.refuse(folder, *DAMAGES[name])

    @pytest.mark.parametrize("folder", ["adapter"], indirect=True)
    @pytest.mark.parametrize("name", ADAPTER_DAMAGES)
    def test_adapters(self, folder: Path, name: str) -> None:
        self.refuse(folder, *ADAPTER_DAMAGES[name])

    def refuse(self, folder: Path, damage: Damage, expected: str) -> None:
        damage(folder)
        started = time.process_time()
        with little_memory(), pytest.raises((ValueError, FileNotFoundError), match=f"(?s){expected}") as caught:
            check(folder)
        assert time.process_time() - started < 60
        message = str(caught.value)
        assert type(caught.value) in (ValueError, FileNotFoundError)
        assert str(folder) in message
        assert "\n" not in message
        assert len(message) < 1000

    def test_a_pickle_beside_the_files_is_ignored(self, folder: Path, tmp_path: Path) -> None:
        (folder / "optimizer.pt").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
        check_artifact(folder)
        assert not (tmp_path / "ran").exists()

    def test_a_configuration_that_lerobot_has_parsed_is_checked_too(self, folder: Path) -> None:
        artifact = check_artifact(folder)
        config = PTRConfig(device="cpu", base={**artifact.config.base, "chunk_size": 10**12})
        with little_memory(), pytest.raises(ValueError, match=r"base.chunk_size='1000000000000' is out of range"):
            check_tensors(config, artifact, PTRPolicy)

    def test_a_file_that_is_no_folder(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is no folder"):
            check_artifact(folder / BASE)
