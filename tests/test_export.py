"""The plain policy of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from peft import LoraConfig, get_peft_model
from small_policies import base_policy, observation, ptr_policy, stats_of, tensors_equal

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.cli.export import export, main

SMALL: dict[str, Any] = {"segment_length": 2, "queue_size": 16, "queue_negatives": 4, "device": "cpu"}


def saved(policy: PTRPolicy, points: Path, folder: Path) -> Path:
    policy.save_pretrained(folder)
    pipelines = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(points))
    for name, pipeline in zip(("preprocessor", "postprocessor"), pipelines, strict=True):
        pipeline.save_pretrained(folder, config_filename=f"policy_{name}.json")
    return folder


def test_the_command_gives_what_lerobot_loads(
    points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = ptr_policy("act", points, num_belief_tokens=0, **SMALL).eval()
    source = saved(policy, points, tmp_path / "ptr")
    monkeypatch.setattr("sys.argv", ["ptr-export", "--source", str(source), "--output_dir", str(tmp_path / "plain")])
    main()
    assert "plain policy" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "plain").iterdir() if path.name.startswith("ptr_")]
    plain = ACTPolicy.from_pretrained(tmp_path / "plain").eval()
    assert tensors_equal(plain.state_dict(), policy.base.state_dict())
    pipelines = make_pre_post_processors(plain.config, pretrained_path=str(tmp_path / "plain"))
    assert len(pipelines) == 2
    seen = observation(policy, points, [0, 40])
    assert torch.equal(plain.predict_action_chunk(dict(seen)), policy.predict_action_chunk(dict(seen)))


def test_an_adapter_is_merged(points: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=r".*(action_head|linear1)", init_lora_weights=False)
    policy = PTRPolicy(
        PTRConfig(preset="ptr", num_belief_tokens=0, **SMALL),
        base_policy=get_peft_model(base_policy("act", points), lora),
    )
    policy.eval().export_base(tmp_path)
    plain = ACTPolicy.from_pretrained(tmp_path).eval()
    assert plain.state_dict().keys() == base_policy("act", points).state_dict().keys()
    seen = observation(policy, points, [0, 40])
    expected = policy.predict_action_chunk(dict(seen))
    torch.testing.assert_close(plain.predict_action_chunk(dict(seen)), expected, rtol=1e-5, atol=1e-6)
    assert any("lora_" in name for name in policy.base.state_dict()), "exporting leaves the policy alone"


def test_a_belief_is_not_dropped_unasked(points: Path, tmp_path: Path) -> None:
    source = saved(ptr_policy("act", points, num_belief_tokens=2, **SMALL), points, tmp_path / "ptr")
    with pytest.raises(ValueError, match=r"2 belief tokens.*without_belief=True"):
        export(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    export(source, tmp_path / "plain", without_belief=True)
    assert isinstance(ACTPolicy.from_pretrained(tmp_path / "plain"), ACTPolicy)


def test_something_else_than_a_checkpoint(points: Path, tmp_path: Path) -> None:
    base_policy("act", points).save_pretrained(tmp_path / "lerobot")
    with pytest.raises(FileNotFoundError, match=r"ptr_config.json"):
        export(tmp_path / "lerobot", tmp_path / "plain")
