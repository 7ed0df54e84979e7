"""Every shape written in a signature is checked while the tests run; small real datasets for all of them."""

import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest runs two workers (pyproject.toml): one thread each, also in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
# each process that a test starts would compile all it imports anew, in 25 s instead of the 10 s of importing it
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# mujoco chooses its GL when it is first imported, whichever test does that
os.environ.setdefault("MUJOCO_GL", "egl")

from jaxtyping import install_import_hook

sys.dont_write_bytecode = False

# transformers' argument dataclasses change their own types after initialisation, so those modules stay unchecked
CHECKED = (
    "method",
    "policies",
    "data",
    "envs",
    "report",
    "modeling_ptr",
    "pathway",
    "training.metrics",
    "scoring",
    "training.trainer",
    "training.policy_sources",
    "artifacts.checkpoint",
)
BENCHMARKS = ("benchmarks.corruption", "benchmarks.experts", "benchmarks.fast_writer")
install_import_hook([*(f"ptr_hf.{name}" for name in CHECKED), *BENCHMARKS], "beartype.beartype")
# no example has to be drawn or tried within some milliseconds
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
DEAREST = ("test_train_ptr.py", "test_exact_distribution.py")
"""Files with a test that takes longest: they come first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in DEAREST)


@pytest.fixture(autouse=True)
def root_log_level() -> None:
    """LeRobot's commands, and importing its policy server, leave the root logger at DEBUG; benchmarks leave warnings off."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset with four episodes (30, 24, 40 and 18 frames) and one camera of image files."""
    from demonstrations import write_dataset

    return write_dataset(tmp_path_factory.mktemp("datasets") / "points")


@pytest.fixture(scope="session")
def point_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same episodes with the camera as video."""
    from demonstrations import write_dataset

    return write_dataset(tmp_path_factory.mktemp("datasets") / "point_videos", use_videos=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--capabilities", help="write what each policy family can do, as the tests found it, to this JSON file"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--capabilities")
    if path and not os.environ.get("PYTEST_XDIST_WORKER"):
        from capabilities import CapabilityRecorder

        config.pluginmanager.register(CapabilityRecorder(Path(path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the capability that a test shows in its report, which crosses from the workers."""
    report = yield
    marker, callspec = item.get_closest_marker("capability"), vars(item).get("callspec")
    if marker is not None and callspec is not None and report.when == "call":
        report.user_properties.append(("capability", [callspec.params["family"].name, marker.args[0]]))
    return report
