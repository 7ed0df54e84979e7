"""The policy shipped with the package: whole, the same wherever its files lie, and named by nobody's folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.demonstrations import BUNDLED, bundled_demonstrations
from ptr_hf.policies import bundled
from ptr_hf.policies.bundled import BUNDLED_POLICY, bundled_policy


def test_it_predicts_actions_from_states_and_instructions(tmp_path: Path) -> None:
    policy = bundled_policy(tmp_path)
    assert Path(policy.config.vlm_model_name).parent == tmp_path.resolve()
    stats = dataset_metadata(bundled_demonstrations("states")).stats
    before, after = make_pre_post_processors(policy.config, dataset_stats=stats)
    policy.eval()
    seen = {"observation.state": torch.zeros(2, 39), "task": ["reach the goal on the left", "open the faucet"]}
    with torch.inference_mode():
        chunk = after(policy.predict_action_chunk(before(seen)))
    assert chunk.shape == (2, 16, 4)
    assert chunk.isfinite().all()


def test_no_file_of_it_or_of_its_data_names_a_folder_of_a_machine() -> None:
    files = [file for name in ("metaworld_policy", "metaworld_combined") for file in (BUNDLED / name).rglob("*")]
    read = [file for file in files if file.is_file()]
    assert {file.name for file in read} >= {"config.json", "model.safetensors", "tokenizer.json", "info.json"}
    for file in read:
        content = file.read_bytes()
        assert not any(place in content for place in (b"/tmp/", b"/home/", b"/root/", b"/work/")), file.name
        assert file.stat().st_mode & 0o044 == 0o044


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_POLICY", tmp_path / BUNDLED_POLICY.name)
    with pytest.raises(
        FileNotFoundError, match="The bundled policy metaworld_policy is missing; reinstall the package"
    ):
        bundled_policy(tmp_path)


@pytest.mark.full
def test_a_process_that_has_imported_nothing_else_loads_it(tmp_path: Path) -> None:
    program = "import sys; from ptr_hf.policies.bundled import bundled_policy; print(bundled_policy(sys.argv[1]).name)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["smolvla_state"], done.stderr[-500:]
