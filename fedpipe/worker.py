"""A warm worker for many small jobs on one machine; the client of each is `python -I -S worker.py FOLDER STEP ...`.
A job is a child of a fork server that holds torch and the steps, with its client's directory, environment, output."""

import json
import os
import signal
import sys
from contextlib import chdir, suppress
from glob import glob
from multiprocessing import AuthenticationError, active_children, get_context, reduction, set_forkserver_preload
from multiprocessing.connection import Client, Connection, Listener
from shutil import rmtree
from threading import Thread

LOST = (OSError, EOFError, AuthenticationError)


def ask(root: str, request: object) -> Connection | None:
    """A worker's connection when it took the request, once each side proved to hold the key; None stops it."""
    with suppress(*LOST), chdir(f"{root}/.worker"):  # from here the socket's path is short, as it has to be
        if (os.stat(".").st_uid, os.stat(".").st_mode & 0o777) == (os.getuid(), 0o700):
            with open("key", "rb") as key:
                worker = Client("socket", authkey=key.read())
            worker.send_bytes(json.dumps(request).encode())
            worker.recv_bytes()
            return worker
    return None


def run(root: str, *argv: str) -> int:
    """Exit status of `fedpipe ARGV...` by a child of the worker; where there is none, this process becomes the job."""
    cold = [sys.executable, "-m", "fedpipe", *argv]
    worker = ask(root, [argv, os.getcwd(), dict(os.environ)]) or os.execv(sys.executable, cold)
    with suppress(*LOST, KeyboardInterrupt):
        for fd in (1, 2):
            reduction.send_handle(worker, fd, 0)
        return int(worker.recv_bytes())
    sys.stderr.write(f"fedpipe: error: {argv[0]}: the process of this job was killed, or out of memory; run it again\n")
    return 2


def start(root: str) -> None:
    """Work in the place of any other worker, until told to stop, idle for long, or a file of the package changed."""
    ask(root, None)
    code = {f: os.stat(f).st_mtime_ns for f in glob(f"{os.path.dirname(__file__)}/**/*.py", recursive=True)}
    rmtree(f"{root}/.worker", ignore_errors=True)
    os.makedirs(f"{root}/.worker", 0o700)
    os.chdir(f"{root}/.worker")
    with open(os.open("key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(key := os.urandom(32))
    set_forkserver_preload(["fedpipe.preload"])
    signal.signal(signal.SIGALRM, lambda *_: active_children() or sys.exit())
    with Listener("socket", backlog=128, authkey=key) as listener:
        while True:
            signal.setitimer(signal.ITIMER_REAL, 600, 600)  # seconds: no worker outlives a killed workflow for long
            with suppress(*LOST), listener.accept() as client:
                request = json.loads(client.recv_bytes())
                if request is None or code != {f: os.stat(f).st_mtime_ns for f in code}:
                    return
                get_context("forkserver").Process(target=_job, args=(client, *request)).start()


def _job(client: Connection, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    from fedpipe.__main__ import main

    client.send_bytes(b"taken")
    for fd in (1, 2):
        os.dup2(reduction.recv_handle(client), fd)
    Thread(target=lambda: client.poll(None) and os._exit(130), daemon=True).start()  # readable once its client has died
    os.chdir(folder)
    sys.path[0] = folder
    os.environ.clear()
    os.environ.update(environment)
    status = main(argv)
    sys.stdout.flush()
    client.send_bytes(str(status).encode())


if __name__ == "__main__":
    os._exit(run(*sys.argv[1:]))
