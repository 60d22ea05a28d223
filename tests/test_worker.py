"""The warm worker: the bytes of a cold job, whatever happened to the job before; who may use it, and from where."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import pytest
from conftest import TINY

from fedpipe import worker
from fedpipe.config import Study
from fedpipe.local import Job, run_jobs
from fedpipe.paths import StudyPaths

ROOT = Path(__file__).parent.parent


def fedpipe_worker(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedpipe.worker", *map(str, arguments)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def client(root: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpipe.worker", "run", str(root), "--", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def taken(root: Path) -> bool:
    """Whether a worker takes a job of this folder; the job ends at once, as nobody waits for it."""
    try:
        worker.ask(root, [["show", "nowhere"], "/", dict(os.environ)]).close()
    except worker.LOST:
        return False
    return True


def process_of(root: Path) -> psutil.Process:
    [found] = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["start", str(root)]]
    return found


def working(root: Path) -> list[psutil.Process]:
    """The children of the fork server: jobs at work."""
    return [job for server in process_of(root).children() for job in server.children()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A results folder with a worker."""
    root = tmp_path_factory.mktemp("warm")
    done = fedpipe_worker("start", root)
    assert (done.returncode, done.stderr) == (0, "")
    yield root
    fedpipe_worker("stop", root)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs of a run of two rounds in one segment, done up to `assign`."""
    paths = StudyPaths(tmp_path_factory.mktemp("made"), Study.model_validate(TINY))
    paths.write_specs()
    jobs = {j.step: j for j in run_jobs(paths.runs[0], 2)}
    for step in ("data", "partition", "measure", "assign"):
        importlib.import_module(f"fedpipe.steps.{step}").run(**jobs[step].reads, **jobs[step].writes)
    return jobs


@pytest.fixture(autouse=True)
def no_worker_stays(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no worker behind."""
    yield
    with suppress(*worker.LOST):
        worker.ask(tmp_path, worker.STOP)


def segment(made: dict[str, Job], out: Path) -> list[str]:
    """The command of both rounds, writing into a folder."""
    values = {**made["segment"].reads, **{k: out / p.name / k for k, p in made["segment"].writes.items()}}
    return ["segment", *(str(x) for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v))]


def contents(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file() and ".obs" not in f.name]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def blocked(root: Path, made: dict[str, Job], folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A client whose job is in the midst of loading a user's model, and what lets it go on when closed."""
    folder.mkdir()
    os.mkfifo(folder / "gate")
    (folder / "slow.py").write_text(f"open({str(folder / 'gate')!r}).read()\nraise ValueError('no model')\n")
    spec = json.loads(made["segment"].reads["run"].read_text())
    (folder / "run.json").write_text(json.dumps({**spec, "model": {"name": f"{folder}/slow.py:net"}}))
    command = ["measure", "--run", folder / "run.json", "--data", made["data"].writes["data"], "--prediction", "none"]
    waiting = client(root, *command)
    for _ in range(300):
        try:
            return waiting, os.open(folder / "gate", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.1)
    raise AssertionError(waiting.communicate(timeout=1))


def test_same_bytes_cold_warm_and_after_a_crash(root: Path, made: dict[str, Job], tmp_path: Path) -> None:
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    done = fedpipe_worker("run", tmp_path / "no_worker_here", "--", *segment(made, cold))
    assert done.returncode == 0 and "round 2/2" in done.stderr
    crashed, end = blocked(root, made, tmp_path / "a")
    going_on, other = blocked(root, made, tmp_path / "b")
    [job, *_] = sorted(working(root), key=lambda p: p.create_time())
    job.kill()
    line = crashed.communicate(timeout=20)[1]
    assert crashed.returncode == 2
    assert line == "fedpipe: error: measure: the process of this job was killed, or out of memory; run it again\n"
    # From another directory and with other threads in the environment than the worker's, as a workflow's jobs have.
    done = fedpipe_worker("run", root, "--", *segment(made, Path("warm")), cwd=tmp_path, OMP_NUM_THREADS="2",
                          PYTHONPATH=str(ROOT))  # fmt: skip
    assert done.returncode == 0 and "round 2/2" in done.stderr, "progress is seen"
    assert len(contents(cold)) >= 3 and contents(warm) == contents(cold)
    os.close(other)
    os.close(end)
    line = going_on.communicate(timeout=20)[1]
    assert going_on.returncode in (1, 2) and "no model" in line and "killed" not in line, "an error of its own"


def test_a_job_ends_with_its_client(root: Path, made: dict[str, Job], tmp_path: Path) -> None:
    waiting, end = blocked(root, made, tmp_path / "slow")
    jobs = working(root)
    waiting.kill()
    waiting.communicate()
    assert not psutil.wait_procs(jobs, timeout=20)[1]
    os.close(end)


def test_key_and_folder_are_private(root: Path) -> None:
    folder = worker.place(root)
    assert (folder.stat().st_mode & 0o777, (folder / "key").stat().st_mode & 0o777) == (0o700, 0o600)
    with pytest.raises(AuthenticationError):
        Client(str(folder / "socket"), "AF_UNIX", authkey=b"another")
    assert taken(root), "the worker is there for those who hold the key"
    folder.chmod(0o755)
    assert not taken(root), "a folder that others can read is not trusted"
    folder.chmod(0o700)


@pytest.mark.slow
def test_killed_worker_fails_its_job_alone(made: dict[str, Job], tmp_path: Path) -> None:
    fedpipe_worker("start", tmp_path)
    waiting, end = blocked(tmp_path, made, tmp_path / "slow")
    os.killpg(process_of(tmp_path).pid, signal.SIGKILL)
    assert waiting.communicate(timeout=20)[1].count("\n") == 1 and waiting.returncode == 2
    os.close(end)
    done = fedpipe_worker("run", tmp_path, "--", "show", "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and "killed" not in done.stderr, "started cold"


@pytest.mark.slow
def test_edited_code_ends_the_worker(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fedpipe", tmp_path / "fedpipe", ignore=shutil.ignore_patterns("__pycache__"))
    fedpipe_worker("start", tmp_path, cwd=tmp_path)
    assert taken(tmp_path)
    (tmp_path / "fedpipe/steps/table.py").touch()
    ending = process_of(tmp_path)
    assert not taken(tmp_path)
    assert not psutil.wait_procs([ending], timeout=20)[1]


@pytest.mark.slow
def test_start_replaces_and_stop_ends_it(tmp_path: Path) -> None:
    fedpipe_worker("start", tmp_path)
    first = process_of(tmp_path)
    fedpipe_worker("start", tmp_path)
    assert taken(tmp_path)
    assert fedpipe_worker("stop", tmp_path).returncode == 0 and not taken(tmp_path)
    assert fedpipe_worker("stop", tmp_path).returncode == 0
    assert not psutil.wait_procs([first], timeout=20)[1]


def test_long_path(tmp_path: Path) -> None:
    root = tmp_path / ("results" * 16)
    try:
        assert fedpipe_worker("start", root).returncode == 0
        assert worker.place(root).parent == Path(tempfile.gettempdir()) and (worker.place(root) / "socket").exists()
        fedpipe_worker("stop", root)
    finally:
        shutil.rmtree(worker.place(root), ignore_errors=True)
    root.mkdir()
    done = fedpipe_worker("start", root, TMPDIR=str(root))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "wanted a path of 103 bytes at most" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("start",), ("run", "results", "segment"), ("run", "results", "--")])
def test_bad_command_is_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.command(list(arguments)) == 2
    assert capsys.readouterr().err.startswith("fedpipe: error: worker: wanted start FOLDER, ")
