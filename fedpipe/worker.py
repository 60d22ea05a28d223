"""A warm worker for many small jobs on one machine: `start FOLDER`, `run FOLDER -- STEP ...`, `stop FOLDER`.

Each job is a child of a fork server that holds torch and the steps; it has the client's directory, environment and
output, and ends when the client does. Clients, being many, import a little of the standard library and nothing else.
"""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from glob import glob
from hashlib import sha256
from multiprocessing import AuthenticationError, active_children, forkserver, get_context, reduction
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from tempfile import gettempdir

from fedpipe.errors import FedpipeError

IDLE = 600  # seconds without a job after which a worker ends: none outlives a killed workflow for long
LONGEST = 103  # bytes of a socket's path that every system takes
LOST = (OSError, EOFError, AuthenticationError)
STOP = None  # the request to take no more jobs; those at work go on


def place(root: Path) -> Path:
    """The folder of socket and key: in the results folder, or a temporary one where that would be too long a path."""
    folder = root.resolve() / ".worker"
    if len(os.fsencode(folder / "socket")) > LONGEST:
        folder = Path(gettempdir(), f"fedpipe-{os.getuid()}-{sha256(os.fsencode(folder)).hexdigest()[:16]}")
    return folder


def ask(root: Path, request: object) -> Connection:
    """Send the worker a request, once each side has proved to hold the key. Raises one of LOST when it is not taken."""
    folder = place(root)
    if folder.lstat().st_uid != os.getuid() or folder.lstat().st_mode & 0o077:  # anybody can guess a name in /tmp
        raise PermissionError(1, "wanted a folder of your own with mode 0700", str(folder))
    worker = Client(str(folder / "socket"), "AF_UNIX", authkey=(folder / "key").read_bytes())
    worker.send_bytes(json.dumps(request).encode())
    worker.recv_bytes()
    return worker


def run(root: Path, argv: list[str]) -> int:
    """Exit status of `fedpipe ARGV...` by a child of the worker; where there is none, this process becomes the job."""
    try:
        worker = ask(root, [argv, os.getcwd(), dict(os.environ)])
    except LOST:
        os.execv(sys.executable, [sys.executable, "-m", "fedpipe", *argv])
    try:
        for fd in (1, 2):
            reduction.send_handle(worker, fd, 0)
        return int(worker.recv_bytes())
    except LOST:
        raise FedpipeError(f"{argv[0]}: the process of this job was killed, or out of memory; run it again") from None


def start(root: Path) -> None:
    """Put a new worker in the place of any other; it takes jobs once this returns. Raises FedpipeError or OSError."""
    folder, key = place(root), os.urandom(32)
    if len(os.fsencode(folder / "socket")) > LONGEST:
        raise FedpipeError(f"worker: {folder}/socket: wanted a path of {LONGEST} bytes at most; set a shorter TMPDIR")
    with suppress(*LOST):
        ask(root, STOP)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("key", "socket"):
        (folder / name).unlink(missing_ok=True)
    with open(os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    listener = Listener(str(folder / "socket"), "AF_UNIX", backlog=128, authkey=key)
    if os.fork():
        os._exit(0)  # a usual exit would remove the socket
    os.setsid()
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    for fd in (0, 1, 2):
        os.dup2(log, fd)
    serve(listener)


def serve(listener: Listener) -> None:
    """Give each job to a child of the fork server, until told to stop, long idle, or the package's files changed."""
    code, context = _code(), get_context("forkserver")
    context.set_forkserver_preload(["fedpipe.preload"])
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads where it is imported, and forks lose them
    signal.signal(signal.SIGALRM, lambda *_: signal.alarm(IDLE) if active_children() else sys.exit())
    forkserver.ensure_running()  # and at its imports before the first job comes
    while True:
        signal.alarm(IDLE)
        try:
            with listener.accept() as client:
                request = json.loads(client.recv_bytes())
                if request is STOP or _code() != code:
                    return
                context.Process(target=_job, args=(client, *request)).start()
        except LOST:
            continue


def _code() -> dict[str, int]:
    """Times of the package's files: where they differ, what is loaded may be other code."""
    return {f: os.stat(f).st_mtime_ns for f in glob(f"{Path(__file__).parent}/**/*.py", recursive=True)}


def _job(client: Connection, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    from fedpipe.__main__ import main

    client.send_bytes(b"taken")
    for fd in (1, 2):
        os.dup2(reduction.recv_handle(client), fd)
    # The client says no more: its end becomes readable when it has died, and nobody waits for this job.
    threading.Thread(target=lambda: client.poll(None) and os._exit(130), daemon=True).start()
    os.chdir(folder)
    sys.path[0] = folder
    os.environ.clear()
    os.environ.update(environment)
    status = main(argv)
    sys.stdout.flush()
    client.send_bytes(str(status).encode())


def command(arguments: list[str]) -> int:
    """The command line; an error is one line on standard error, and exit status 2."""
    try:
        match arguments:
            case ["start", root]:
                start(Path(root))
            case ["stop", root]:
                with suppress(*LOST):
                    ask(Path(root), STOP)
            case ["run", root, "--", _, *_]:
                return run(Path(root), arguments[3:])
            case _:
                raise FedpipeError("worker: wanted start FOLDER, stop FOLDER, or run FOLDER -- STEP ...")
    except (FedpipeError, OSError) as e:
        print(f"fedpipe: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
