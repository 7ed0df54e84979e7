"""Every shape written in a signature is checked while the tests run; small real datasets for all of them."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest runs two workers (pyproject.toml): one thread each, also in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# transformers' argument dataclasses change their own types after initialisation, so those modules stay unchecked
CHECKED = ("method", "policies", "data", "report", "modeling_ptr", "pathway", "metrics", "scoring", "trainer", "hub")
install_import_hook([f"ptr_hf.{name}" for name in CHECKED], "beartype.beartype")


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
