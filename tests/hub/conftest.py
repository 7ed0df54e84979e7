"""A hub on loopback, and the client of this process connected to it."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub, connect
from safetensors.numpy import save_file

CARD = """---
library_name: lerobot
pipeline_tag: robotics
license: apache-2.0
base_model: lab/base
datasets:
- lab/points
tags:
- robotics
- post-training
model-index:
- name: policy
  results:
  - task:
      type: robotics
    dataset:
      name: Meta-World
      type: metaworld
    metrics:
    - type: success_rate
      value: 62.5
---

# A policy
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub of one test's own."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def online(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoopbackHub:
    """The hub, with this process's huggingface_hub connected to it as the user who may write."""
    connect(hub, monkeypatch, tmp_path / "home")
    return hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait between retries lasts a thousandth of its time; the full lengths in seconds."""
    lengths: list[float] = []
    sleep = time.sleep

    def short_sleep(seconds: float) -> None:
        lengths.append(seconds)
        sleep(seconds / 1000)

    monkeypatch.setattr(time, "sleep", short_sleep)
    return lengths


@pytest.fixture
def impatient() -> Iterator[Callable[[float, str], None]]:
    """Call with seconds and a pattern of paths: the client waits no longer for such an answer, by default for ever."""
    import httpx
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks

    def set_timeout(seconds: float, path_pattern: str) -> None:
        def limit(request: httpx.Request) -> None:
            # some calls ask for no timeout themselves, which a default of the client would not change
            if re.search(path_pattern, request.url.path):
                request.extensions["timeout"] = httpx.Timeout(60, read=seconds).as_dict()

        client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}

    yield set_timeout
    client.event_hooks = hooks


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to push: 11 MB of weights, a configuration, a valid card and a file in a subfolder."""
    folder = tmp_path_factory.mktemp("artifact")
    weights = np.random.default_rng(0).standard_normal(2_800_000, dtype=np.float32)
    save_file({"weights": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"type": "act"}))
    (folder / "README.md").write_text(CARD)
    (folder / "figures").mkdir()
    (folder / "figures" / "weights.txt").write_text("0.5 1.5\n")
    return folder
