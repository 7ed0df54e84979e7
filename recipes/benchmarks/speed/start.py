"""How long it takes from `ptr-train` to its first step on the bundled demonstrations, and what takes it; and its `--help`.

    python recipes/benchmarks/speed/start.py          # results/speed_start.json

Wall time in seconds since the command, so that it says something of a quiet machine alone; the load before it is written too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any
from unittest.mock import patch

MARKS = ("imported", "opened and inspected", "first step")


def start(folder: Path, launcher: tuple[str, ...]) -> dict[str, float]:
    """Start the command in a process of its own, which ends at its first step.

    Args:
        folder: for its output.
        launcher: the words before the script.
    """
    marks = folder / "marks.json"
    environment = os.environ | {"PTR_MARKS": str(marks), "PTR_SINCE": str(time.time())}
    subprocess.run(
        [*launcher, __file__, "--child", str(folder / "out")], env=environment, check=True, capture_output=True
    )
    return {name: round(seconds, 2) for name, seconds in json.loads(marks.read_text()).items()}


def help_time() -> float:
    """Seconds that `ptr-train --help` takes."""
    since = time.time()
    subprocess.run([sys.executable, "-m", "ptr_hf.cli.train", "--help"], check=True, capture_output=True)
    return round(time.time() - since, 2)


def child(folder: str) -> None:
    """Run `ptr-train` up to its first step."""
    since = float(os.environ["PTR_SINCE"])
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.setdefault(name, time.time() - since)

    from ptr_hf import PTRTrainer
    from ptr_hf.cli import train_run
    from ptr_hf.training import trainer

    mark(MARKS[0])
    opened = trainer.open_run

    def open_run(*args: Any, **kwargs: Any) -> Any:
        found = opened(*args, **kwargs)
        mark(MARKS[1])
        return found

    def training_step(*args: Any, **kwargs: Any) -> Any:
        mark(MARKS[2])
        Path(os.environ["PTR_MARKS"]).write_text(json.dumps(marks))
        os._exit(0)

    with patch.object(trainer, "open_run", open_run), patch.object(PTRTrainer, "training_step", training_step):
        train_run.main(["--output_dir", folder])


def main() -> None:
    """Measure by turns, and write what was found."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    options.add_argument("--output", type=Path, default=Path("results/speed_start.json"), help="where the result goes")
    options.add_argument("--child", help="for the script itself: folder of the run")
    given = options.parse_args()
    if given.child:
        child(given.child)
        return
    launchers = {"ptr-train": (sys.executable,), "accelerate launch": ("accelerate", "launch")}
    found: dict[str, Any] = {
        "command": f"python recipes/benchmarks/speed/start.py --rounds {given.rounds}",
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "help": [],
        "starts": {name: [] for name in launchers},
    }
    for _ in range(given.rounds):
        found["help"].append(help_time())
        for name, launcher in launchers.items():
            with tempfile.TemporaryDirectory() as folder:
                found["starts"][name].append(start(Path(folder), launcher))
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
