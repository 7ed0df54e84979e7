"""Counts on how many starts the scripted experts solve each of LIBERO's tasks, and how often a blind motion does.

    python recipes/benchmarks/libero/measure_experts.py --suites libero_object libero_spatial --starts official --count 50

appends a row a task to `results/libero_experts.csv`, and goes on where it stopped. *replay*: the actions that solved the first
start are carried out on others, without looking at anything; where that works, a task does not test what is seen.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import cast

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.commits import commit
from benchmarks.libero.recordings import record
from benchmarks.libero.scene import MAX_STEPS, LiberoScene, Starts, Suite, instruction, num_tasks

COLUMNS = ("suite", "task", "instruction", "starts", "tried", "solved", "steps", "replay_tried", "replay_solved")


def measure(suite: Suite, task: int, starts: Starts, count: int, replays: int) -> dict[str, object]:
    """A row of the results."""
    scene = LiberoScene(suite, task)
    tries = [record(scene, start, starts) for start in range(count)]
    solved = [item for item in tries if item.success_step is not None]
    replayed = 0
    for start in range(count - replays, count) if solved else ():
        scene.reset(start, starts)
        for action in solved[0].actions:
            scene.step(action)
        replayed += scene.success
    return {
        "suite": suite,
        "task": task,
        "instruction": instruction(suite, task),
        "starts": starts,
        "tried": count,
        "solved": len(solved),
        "steps": statistics.median(cast(int, item.success_step) for item in solved) if solved else MAX_STEPS,
        "replay_tried": replays if solved else 0,
        "replay_solved": replayed,
    }


def main(argv: list[str]) -> None:
    """Measure what is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--suites", nargs="+", default=["libero_object", "libero_spatial"])
    options.add_argument("--tasks", nargs="+", type=int, help="all by default")
    options.add_argument("--starts", default="official", choices=("official", "sampled", "wide"))
    options.add_argument("--count", type=int, default=50, help="starts of each task, from the first on")
    options.add_argument("--replays", type=int, default=10, help="of them, from the last on, for the blind motion")
    options.add_argument("--results", type=Path, default=Path("results/libero_experts.csv"))
    given = options.parse_args(argv)
    columns = (*COLUMNS, "commit", "command")
    done: set[tuple[str, ...]] = set()
    if given.results.is_file():
        with given.results.open(newline="") as file:
            done = {(row["suite"], row["task"], row["starts"], row["tried"]) for row in csv.DictReader(file)}
    cells = [(suite, task) for suite in given.suites for task in given.tasks or range(num_tasks(suite))]
    for suite, task in tqdm(cells, unit="task"):
        if (suite, str(task), given.starts, str(given.count)) in done:
            continue
        row = measure(suite, task, given.starts, given.count, given.replays)
        command = (
            f"python recipes/benchmarks/libero/measure_experts.py --suites {suite} --tasks {task} "
            f"--starts {given.starts} --count {given.count} --replays {given.replays}"
        )
        fresh = not given.results.is_file()
        with given.results.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row | {"commit": commit(), "command": command})


if __name__ == "__main__":
    main(sys.argv[1:])
