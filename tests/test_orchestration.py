"""What a way of running may cost beside plain rounds in one process: measured by the benchmark itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

WAYS = "in process,segments of 20,worker"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a worker's CPU time is known on Linux only")
def test_cost_of_a_job(tmp_path: Path) -> None:
    """100 rounds: segments at most 1.15 times the time in process and 4 s for each of at most 12 jobs, a job of the
    worker at most 0.15 CPU-seconds, its client, its shell and its share of the worker included.

    Others at work on the machine cost time and, by its caches, CPU time as well: the best of three is judged.
    """
    for attempt in range(3):
        file = tmp_path / f"{attempt}.json"
        command = ["benchmarks/orchestration/run.py", "--rounds", "100", "--repeat", "1", "--ways", WAYS, "--out", file]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found = json.loads(file.read_text())["medians"]
        plain, cut, warm = (found[way] for way in WAYS.split(","))
        assert cut["jobs"] <= 12 and warm["jobs"] == 100 + 7, done.stdout
        if cut["seconds"] <= 1.15 * plain["seconds"] + 4 * cut["jobs"] and warm["cpu_job"] <= 0.15:
            return
    pytest.fail(done.stdout)
