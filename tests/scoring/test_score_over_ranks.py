"""`ptr-score` over two processes finds what one does, bit for bit; one of them writes and prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from meeting import meeting_place

from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE


@pytest.mark.full
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    questions = ["action_from_consequence", "consequence_from_action", "instruction", "completeness", "roughness"]
    found = {}
    for ranks in (1, 2):
        _store, place = meeting_place()
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **place}
            folder = tmp_path / f"{rank}-of-{ranks}"
            folder.mkdir()
            command = [sys.executable, "-m", "ptr_hf.cli.score", "--dataset", str(bundled_demonstrations())]
            command += ["--output_dir", "out", "--device", "cpu", "--questions", *questions, "--fail_over", "0.05"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | (own if ranks > 1 else {})
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
        try:
            for rank, process in enumerate(processes):
                printed, errors = process.communicate()
                assert process.returncode == 1, errors[-3000:]
                assert ("exit code 1" in printed) == (rank == 0), printed
                found[rank, ranks] = tmp_path / f"{rank}-of-{ranks}" / "out"
        finally:
            for process in processes:
                process.kill()
    assert not found[1, 2].exists()
    for name in (CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE):
        assert (found[0, 2] / name).read_bytes() == (found[0, 1] / name).read_bytes(), name
