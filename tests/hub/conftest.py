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
def impatient() -> Iterator[Callable[[str, int | None], None]]:
    """Call with a pattern of paths and a number: the client gives up so many of these requests (None: all) after a second.

    The hub has to leave those unanswered: it may take longer than that with an answer.
    """
    import httpx
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks

    def set_timeout(path_pattern: str, times: int | None) -> None:
        seen = 0

        def limit(request: httpx.Request) -> None:
            nonlocal seen
            # some calls ask for no timeout themselves, which a default of the client would not change
            if re.search(path_pattern, request.url.path):
                seen += 1
                seconds = 1 if times is None or seen <= times else 60
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
