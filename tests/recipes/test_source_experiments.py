"""The experiments on a mixture: their options are real, and they differ in what they are meant to differ in."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ptr_hf import PTRTrainingArguments
from ptr_hf.data.mixture.action_space import LAYOUTS, ActionSpace
from ptr_hf.data.mixture.config import MixtureConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "experiments"
DATA = ("policy_path", "dataset", "mixture", "rename_map")


def options(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["specialist", "generalist", "ptr_generalist"])
def test_every_option_is_one(name: str) -> None:
    given = options(name)
    args = PTRTrainingArguments(
        use_cpu=True, report_to="none", **{key: value for key, value in given.items() if key not in DATA}
    )
    assert args.preset == given["preset"]
    assert args.segment_length == 4
    assert (ROOT / given["mixture"]).is_file() if "mixture" in given else given["dataset"]


def test_the_generalists_differ_in_their_weights_alone() -> None:
    plain, weighed = options("generalist"), options("ptr_generalist")
    assert {key for key in plain | weighed if plain.get(key) != weighed.get(key)} == {
        "preset", "standardize_by", "output_dir"
    }  # fmt: skip
    args = PTRTrainingArguments(output_dir="unused", use_cpu=True, preset="ptr_calibrated", standardize_by="source")
    assert (args.score, args.standardize_by) == ("consequence_log_loss", "source")


def test_the_mixture() -> None:
    mixture = MixtureConfig.from_yaml(FOLDER / "mixture.yaml")
    assert len(mixture.names) == 3
    assert {camera for source in mixture.sources for camera in source.rename.values()} == {
        "observation.images.camera1", "observation.images.camera2"
    }  # fmt: skip
    layouts = [LAYOUTS[source.embodiment] for source in mixture.sources]
    assert len(ActionSpace.standard().compact(layouts)) == 14
    specialist = options("specialist")
    (own,) = [source for source in mixture.sources if source.dataset == specialist["dataset"]]
    assert specialist["rename_map"] == own.rename
    # a generalist trains as long as the specialists together
    assert options("generalist")["max_steps"] == len(mixture.sources) * specialist["max_steps"]
