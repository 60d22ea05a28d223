"""Every way of running gives the same bytes: jobs per round, kills, another J in the midst; the DAG; what stays."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_pipeline import IDENT, ROOT, run_of, snakemake

from fedpipe import guard, io
from fedpipe.__main__ import main
from fedpipe.errors import FedpipeError
from fedpipe.fingerprint import fingerprint
from fedpipe.studyfile import load_study


def write(folder: Path, **keys: object) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**IDENT, **keys}))
    return file


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("short"), rounds=3)


@pytest.fixture(scope="module")
def digest(short: Path) -> str:
    """Of the short study in this process."""
    assert main(["run", str(short), "--out", str(short.parent / "here")]) == 0
    return fingerprint(short.parent / "here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "config"), [("-j1", {"segment": 1, "worker": True}), ("-j2", {"jobs_per_round": 3, "worker": True})]
)
def test_jobs_change_no_bit(jobs: str, config: dict[str, int], short: Path, digest: str) -> None:
    """Per-round jobs, and J train jobs a round with fewer groups than J in some round and more in another."""
    route = io.read_table(run_of(short.parent / "here", short, "scaffold").route).to_pylist()
    groups = [len({r["group"] for r in route if r["kind"] == "train" and r["round"] == t}) for t in range(3)]
    assert min(groups) < 3 and max(sum(r["round"] == t and r["kind"] == "train" for r in route) for t in range(3)) >= 3
    out = short.parent / f"jobs{jobs}"
    said = snakemake(short, out, jobs, **config)
    wanted = {"train": 27, "aggregate": 6, "aggregate_kept": 3} if "jobs_per_round" in config else {"segment_kept": 6}
    for rule, count in wanted.items():
        assert re.search(rf"^{rule} +{count}$", said, re.MULTILINE), said[:3000]
    assert fingerprint(out) == digest
    p = run_of(out, short, "scaffold")
    assert sorted(f.name for f in (p.folder / "state").iterdir()) in (
        ["000000", "000002", "000003"],
        ["000000", "000003"],
    )
    assert not list(p.folder.glob("train/*/*")) and list(p.folder.glob("rounds/*.peaks.obs.parquet"))


@pytest.mark.slow
def test_kills_leave_nothing_to_clean_up(tmp_path: Path) -> None:
    """kill -9 of the whole process group at five random moments, each time the same command again."""
    study, out = write(tmp_path, methods=["scaffold"]), tmp_path / "killed"
    assert main(["run", str(study), "--out", str(tmp_path / "whole"), "--segment", "5"]) == 0
    command = [sys.executable, "-m", "snakemake", "-c2", "--directory", str(tmp_path)]
    command += ["--config", f"study={study}", f"out={out}", "segment=2"]
    draw, ended = random.Random(0), 0
    for _ in range(5):
        job = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(4, 9))
        ended += job.poll() is not None
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None else None
        job.wait()
    assert ended == 0, "the study ended before it was killed five times"
    snakemake(study, out, "-c2", workdir=tmp_path, segment=2)
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def test_a_second_command_on_a_live_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = write(tmp_path), tmp_path / "out"
    with guard.held(out):
        assert main(["run", str(study), "--out", str(out)]) == 2
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and f"pid {os.getpid()}" in said and f"{out}: another command" in said
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-c1", "--config", f"study={study}", f"out={out}"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode != 0 and f"pid {os.getpid()}" in done.stderr and "Traceback" not in done.stderr
    with guard.held(out):
        pass


def test_only_our_stale_locks_are_forgotten(tmp_path: Path) -> None:
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("results/mine/table.parquet\n")
    (locks / "1.output.lock").write_text("results/other/table.parquet\n")
    guard.forget_stale_locks(tmp_path, tmp_path / "results/mine")
    assert [f.name for f in locks.iterdir()] == ["1.output.lock"]


def test_no_lock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(guard.fcntl, "flock", without)
    with pytest.raises(FedpipeError, match=r"\.lock: no lock to be had on this file system"):
        guard.hold(tmp_path)


def test_disk_in_process(tmp_path: Path) -> None:
    """At default retention: states of the start and of the last two segment ends, nothing else."""
    study, out = write(tmp_path, methods=["fedavg", "scaffold"]), tmp_path / "out"
    assert main(["run", str(study), "--out", str(out), "--segment", "4"]) == 0
    for method in ("fedavg", "scaffold"):
        p = run_of(out, study, method)
        for kind in ("state", "own"):
            assert sorted(f.name for f in (p.folder / kind).iterdir()) == ["000000", "000016", "000020"]
        assert len(list(p.folder.glob("state/*/*.safetensors"))) == 3
    trained = {r["client"] for r in io.read_table(p.route).to_pylist() if r["kind"] == "train"}
    assert len(list(p.own(20).iterdir())) == len(trained) == 5
    before = fingerprint(out)
    for f in sorted(p.state(20).iterdir()):
        f.unlink()  # a file of a kept folder, which no workflow engine looks into
    assert main(["run", str(study), "--out", str(out), "--segment", "4"]) == 0
    assert fingerprint(out) == before


def dag(tmp_path: Path, **config: object) -> dict[str, int]:
    study = write(tmp_path, methods=["fedavg"], rounds=500, cohort=8)
    said = snakemake(study, tmp_path / "out", "-n", **config)
    table = said.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.mark.slow
def test_a_dry_run_lists_every_job_of_a_long_chain(tmp_path: Path) -> None:
    begin = time.monotonic()
    jobs = dag(tmp_path, jobs_per_round=10)
    assert (jobs["train"], jobs["aggregate"], jobs["aggregate_kept"]) == (5000, 498, 2)
    assert time.monotonic() - begin < 60, "about 13 s on an idle machine"
    jobs = dag(tmp_path, segment=20)
    assert (jobs["segment"], jobs["segment_kept"]) == (23, 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("segment=0", "--config segment: wanted a whole number, at least 1, got 0"),
        ("jobs_per_round=-1", "--config jobs_per_round: wanted a whole number, at least 0, got -1"),
        ("keep=some", "--config keep: wanted last or segments or all, got 'some'"),
    ],
)
def test_bad_ways_are_one_line(config: str, said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--config", f"out={tmp_path}", config],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and f"error: {said}" in done.stderr


def test_lasting_states(tmp_path: Path) -> None:
    from fedpipe.paths import lasting

    study = load_study(write(tmp_path, rounds=50, evaluate={"every": 15}))
    assert lasting(study, 20, "last") == {40, 50}
    assert lasting(study, 20, "segments") == {15, 20, 30, 40, 45, 50}
    assert lasting(study, 20, "all") == set(range(1, 51))
