"""The warm worker: the bytes of a cold job, whatever happened to the job before; who may use it, and when it ends."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
KILLED = "fedpipe: error: measure: the process of this job was killed, or out of memory; run it again\n"


def client(root: Path, *argv: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", worker.__file__, str(root), *map(str, argv)]
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def ended(waiting: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and standard error of a client."""
    line = waiting.communicate(timeout=60)[1]
    return waiting.returncode, line


def taken(root: Path) -> bool:
    """Whether a worker takes a job of this folder; the job ends at once, as nobody waits for it."""
    if connection := worker.ask(str(root), [["show", "nowhere"], "/", dict(os.environ)]):
        connection.close()
    return connection is not None


def started(root: Path, code: Path = ROOT) -> psutil.Popen:
    """A worker that takes jobs, of the package in the folder `code`."""
    command = [sys.executable, "-c", "import sys; from fedpipe.worker import start; start(sys.argv[1])", str(root)]
    process = psutil.Popen(command, cwd=code, start_new_session=True, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if taken(root):
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.wait())


def working(process: psutil.Popen) -> list[psutil.Process]:
    """The children of the fork server: jobs at work."""
    return [job for server in process.children() for job in server.children()]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, psutil.Popen]]:
    """A results folder and its worker; the path is longer than a socket's may be."""
    root = tmp_path_factory.mktemp("warm") / ("results" * 16)
    process = started(root)
    yield root, process
    worker.ask(str(root), None)
    assert process.wait(20) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs of a run of two rounds in one segment, done up to `assign`."""
    paths = StudyPaths(tmp_path_factory.mktemp("made"), Study.model_validate(TINY))
    paths.write_specs()
    jobs = {j.step: j for j in run_jobs(paths.runs[0], 2)}
    for step in ("data", "partition", "measure", "assign"):
        importlib.import_module(f"fedpipe.steps.{step}").run(**jobs[step].reads, **jobs[step].writes)
    return jobs


def command(job: Job, **changed: Path) -> list[str]:
    values = {**job.reads, **job.writes, **changed}
    return [job.step, *(str(x) for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v))]


def segment(made: dict[str, Job], out: Path) -> list[str]:
    """The command of both rounds, writing into a folder."""
    return command(made["segment"], **{k: out / p.name / k for k, p in made["segment"].writes.items()})


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, without observations."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    return {name: f.read_bytes() for name, f in files.items() if ".obs." not in name}


def blocked(root: Path, made: dict[str, Job], folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A client whose job is in the midst of loading a user's model, and what lets it go on when closed."""
    folder.mkdir()
    os.mkfifo(folder / "gate")
    (folder / "slow.py").write_text(f"open({str(folder / 'gate')!r}).read()\nraise ValueError('no model')\n")
    spec = json.loads(made["segment"].reads["run"].read_text())
    (folder / "run.json").write_text(json.dumps({**spec, "model": {"name": f"{folder}/slow.py:net"}}))
    waiting = client(root, *command(made["measure"], run=folder / "run.json"))
    for _ in range(300):
        try:
            return waiting, os.open(folder / "gate", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.1)
    raise AssertionError(waiting.communicate(timeout=1))


def test_same_bytes_cold_warm_and_after_a_crash(
    warm: tuple[Path, psutil.Popen], made: dict[str, Job], tmp_path: Path
) -> None:
    root, process = warm
    status, lines = ended(client(tmp_path / "no_worker_here", *segment(made, tmp_path / "cold")))
    assert status == 0 and "round 2/2" in lines
    crashed, end = blocked(root, made, tmp_path / "a")
    going_on, other = blocked(root, made, tmp_path / "b")
    min(working(process), key=lambda p: p.create_time()).kill()
    assert ended(crashed) == (2, KILLED)
    # From another directory and with other threads in the environment than the worker's, as a workflow's jobs have.
    job = client(root, *segment(made, Path("warm")), cwd=tmp_path, OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT))
    status, lines = ended(job)
    assert status == 0 and "round 2/2" in lines, "progress is seen"
    assert len(contents(tmp_path / "cold")) >= 3 and contents(tmp_path / "warm") == contents(tmp_path / "cold")
    os.close(other)
    os.close(end)
    status, line = ended(going_on)
    assert status in (1, 2) and "no model" in line and "killed" not in line, "an error of its own"


def test_a_job_ends_with_its_client(warm: tuple[Path, psutil.Popen], made: dict[str, Job], tmp_path: Path) -> None:
    waiting, end = blocked(warm[0], made, tmp_path / "slow")
    jobs = working(warm[1])
    waiting.kill()
    waiting.communicate()
    assert jobs and not psutil.wait_procs(jobs, timeout=20)[1]
    os.close(end)


def test_key_and_folder_are_private(warm: tuple[Path, psutil.Popen], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = warm[0] / ".worker"
    assert (folder.stat().st_mode & 0o777, (folder / "key").stat().st_mode & 0o777) == (0o700, 0o600)
    monkeypatch.chdir(folder)
    with pytest.raises(AuthenticationError):
        Client("socket", authkey=b"another")
    assert taken(warm[0]), "the worker is there for those who hold the key"
    folder.chmod(0o755)
    assert not taken(warm[0]), "a folder that others can read is not trusted"
    folder.chmod(0o700)


@pytest.mark.slow
def test_killed_worker_fails_its_job_alone(made: dict[str, Job], tmp_path: Path) -> None:
    process = started(tmp_path)
    waiting, end = blocked(tmp_path, made, tmp_path / "slow")
    os.killpg(process.pid, signal.SIGKILL)
    assert ended(waiting) == (2, KILLED)
    assert process.wait(20) == -signal.SIGKILL
    os.close(end)
    status, line = ended(client(tmp_path, "show", "nowhere"))
    assert status == 2 and "nowhere" in line and "killed" not in line, "started cold"


@pytest.mark.slow
def test_edited_code_ends_the_worker(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fedpipe", tmp_path / "fedpipe", ignore=shutil.ignore_patterns("__pycache__"))
    process = started(tmp_path, tmp_path)
    (tmp_path / "fedpipe/kernels/__init__.py").touch()
    assert not taken(tmp_path)
    assert process.wait(20) == 0


@pytest.mark.slow
def test_ends_when_replaced_or_idle(made: dict[str, Job], tmp_path: Path) -> None:
    first = started(tmp_path)
    second = started(tmp_path)
    assert not psutil.wait_procs([first], timeout=20)[1] and second.is_running()
    waiting, end = blocked(tmp_path, made, tmp_path / "slow")
    second.send_signal(signal.SIGALRM)  # as time has it
    assert taken(tmp_path), "a job is at work"
    os.close(end)
    assert "no model" in ended(waiting)[1]
    time.sleep(1)
    second.send_signal(signal.SIGALRM)
    assert second.wait(20) == 0 and not taken(tmp_path)
