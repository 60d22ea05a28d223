"""Every way of running gives the same bytes: jobs per round, kills, another J in the midst; the DAG; what stays."""

import os
import random
import re
import resource
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
    ("jobs", "config"),
    [("-j1", {"segment": 1}), ("-j2", {"jobs_per_round": 3}), ("-j1", {"jobs_per_round": 1})],
    ids=["a job a round", "three train jobs a round", "one train job a round"],
)
def test_jobs_change_no_bit(jobs: str, config: dict[str, int], short: Path, digest: str) -> None:
    """Per-round jobs, and J train jobs a round with fewer groups than J in some round and stacks in another."""
    route = io.read_table(run_of(short.parent / "here", short, "scaffold").route).to_pylist()
    groups = [len({r["group"] for r in route if r["kind"] == "train" and r["round"] == t}) for t in range(3)]
    assert min(groups) < 3 and max(sum(r["round"] == t and r["kind"] == "train" for r in route) for t in range(3)) >= 3
    out = short.parent / "-".join(config) / str(*config.values())
    said = snakemake(short, out, jobs, worker=True, **config)
    trained = 9 * config.get("jobs_per_round", 0)
    wanted = {"train": trained, "aggregate": 6, "aggregate_kept": 3} if trained else {"segment": 6, "segment_kept": 3}
    for rule, count in wanted.items():
        assert re.search(rf"^{rule} +{count}$", said, re.MULTILINE), said[:3000]
    assert fingerprint(out) == digest
    p = run_of(out, short, "scaffold")
    assert sorted(f.name for f in (p.folder / "state").iterdir()) == ["000000", "000003"]
    assert not list(p.folder.glob("train/*/*")) and list(p.folder.glob("rounds/*.peaks.obs.parquet"))


def start(study: Path, out: Path, *config: str) -> "subprocess.Popen[bytes]":
    """The workflow in a process group of its own."""
    command = [sys.executable, "-m", "snakemake", "-c2", "--directory", str(out.parent)]
    command += ["--config", f"study={study}", f"out={out}", *config]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=quiet, stderr=quiet)


def kill(job: "subprocess.Popen[bytes]") -> None:
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@pytest.mark.slow
def test_kills_leave_nothing_to_clean_up(tmp_path: Path) -> None:
    """kill -9 of the whole process group at five random moments, each time the same command again."""
    study, out = write(tmp_path, methods=["scaffold"]), tmp_path / "killed"
    assert main(["run", str(study), "--out", str(tmp_path / "whole"), "--segment", "5"]) == 0
    draw = random.Random(0)
    for _ in range(5):
        job = start(study, out, "segment=2")
        time.sleep(draw.uniform(4, 9))
        assert job.poll() is None, "the study ended before it was killed five times"
        kill(job)
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


@pytest.mark.slow
def test_another_number_of_jobs_in_the_midst(short: Path, tmp_path: Path) -> None:
    """Killed after three rounds of two jobs, then three jobs a round: only what is left is run, to the same bytes."""
    study, out = write(tmp_path, rounds=8, methods=["scaffold"]), tmp_path / "midst"
    assert main(["run", str(study), "--out", str(tmp_path / "whole")]) == 0
    p = run_of(out, study, "scaffold")
    job = start(study, out, "jobs_per_round=2", "worker=true")
    while not p.rounds(3).is_file():
        assert job.poll() is None, "the study ended before it was killed"
        time.sleep(0.01)
    kill(job)
    done = max(t for t in range(9) if p.rounds(t).is_file())
    before = {t: p.rounds(t).stat().st_mtime_ns for t in range(1, done)}
    half = {"run": p.spec, "data": p.data, "partition": p.partition, "plans": p.plans, "route": p.route}
    half |= {"state": p.state(done), "own": p.own(done), "out": p.train(done, 0), "job": 0, "jobs": 2}
    assert main(["train", *(str(x) for k, v in half.items() for x in (f"--{k}", v))]) == 0  # of the next round
    said = snakemake(study, out, "-j2", workdir=tmp_path, jobs_per_round=3, worker=True)
    assert f"{p.train(done, 0)}: one of 2 jobs of its round, not 3" in said
    jobs = counted(said)
    rest = jobs["aggregate"] + jobs["aggregate_kept"]
    assert rest in (8 - done, 9 - done), "the round at work when killed may have to be made again"
    assert jobs == {"train": 3 * rest, "aggregate": rest - 1, "aggregate_kept": 1} | dict.fromkeys(
        ("evaluate", "table", "report", "all"), 1
    )
    assert before == {t: p.rounds(t).stat().st_mtime_ns for t in before}
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_disk_of_a_long_run(tmp_path: Path) -> None:
    """500 rounds in segments at default retention, by Snakemake: the first and last model, metrics, and with SCAFFOLD
    one file of each client that has taken part."""
    keys = {"methods": ["fedavg", "scaffold"], "rounds": 500, "cohort": 1, "evaluate": {"every": 100}}
    study, out = write(tmp_path, **{**keys, "data": {**IDENT["data"], "rows": 80}}), tmp_path / "out"
    snakemake(study, out, "-c2", segment=20, worker=True)
    for method in ("fedavg", "scaffold"):
        p = run_of(out, study, method)
        kept = {f.relative_to(p.folder).as_posix() for f in p.folder.rglob("*.safetensors")}
        trained = {r["client"] for r in io.read_table(p.route).to_pylist() if r["kind"] == "train"}
        models = {"state/000000/server@0.safetensors", "state/000500/server@500.safetensors"}
        own = {f for f in kept if f.startswith("own/")}
        assert kept - own == models and len(trained) == 5
        clients = sorted(int(f.split("/")[2].partition("@")[0]) for f in own)
        assert clients == (sorted(trained) if method == "scaffold" else [])
        assert len(list(p.folder.glob("rounds/*[0-9].parquet"))) == 25 and not list(p.folder.glob("train/*"))


def test_disk_in_process(tmp_path: Path) -> None:
    """At default retention: the first and the last state, nothing else."""
    study, out = write(tmp_path, methods=["fedavg", "scaffold"]), tmp_path / "out"
    assert main(["run", str(study), "--out", str(out), "--segment", "4"]) == 0
    for method in ("fedavg", "scaffold"):
        p = run_of(out, study, method)
        for kind in ("state", "own"):
            assert sorted(f.name for f in (p.folder / kind).iterdir()) == ["000000", "000020"]
        assert len(list(p.folder.glob("state/*/*.safetensors"))) == 2
    trained = {r["client"] for r in io.read_table(p.route).to_pylist() if r["kind"] == "train"}
    assert len(list(p.own(20).iterdir())) == len(trained) == 5
    before = fingerprint(out)
    for f in sorted(p.state(20).iterdir()):
        f.unlink()  # a file of a kept folder, which no workflow engine looks into
    assert main(["run", str(study), "--out", str(out), "--segment", "4"]) == 0
    assert fingerprint(out) == before


def counted(said: str) -> dict[str, int]:
    """Jobs by rule, as a run or a dry run lists them."""
    table = said.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_a_long_chain_is_planned_fast(tmp_path: Path) -> None:
    """500 rounds of ten jobs from nothing, then of a finished run; the same in segments of 20. The runs are made in
    this process, as the workflow takes their files for its own: what is planned is the same."""
    study = write(tmp_path, methods=["fedavg"], rounds=500, cohort=2, evaluate={"every": 500})
    begin = time.monotonic()
    jobs = counted(snakemake(study, tmp_path / "1", "-n", jobs_per_round=10))
    assert (jobs["train"], jobs["aggregate"], jobs["aggregate_kept"]) == (5000, 499, 1)
    assert time.monotonic() - begin < 40, "15 s on an idle machine"
    jobs = counted(snakemake(study, tmp_path / "20", "-n", segment=20))
    assert (jobs["segment"], jobs["segment_kept"]) == (24, 1)
    for every, way, limit in ((20, {"segment": 20}, 10), (1, {"jobs_per_round": 10}, 20)):
        out = tmp_path / str(every)
        assert main(["run", str(study), "--out", str(out), "--segment", str(every)]) == 0
        begin = cpu()
        assert "Nothing to be done" in snakemake(study, out, "-c1", **way)
        assert cpu() - begin < limit, "about half of it on an idle machine"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("segment=0", "--config segment: wanted a whole number, at least 1, got 0"),
        ("jobs_per_round=0", "--config jobs_per_round: wanted a whole number, at least 1, or none, got 0"),
        ("jobs_per_round=-1", "--config jobs_per_round: wanted a whole number, at least 1, or none, got -1"),
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
    assert lasting(study, 20, "last") == {50}
    assert lasting(study, 20, "segments") == {15, 20, 30, 40, 45, 50}
    assert lasting(study, 20, "all") == set(range(1, 51))
