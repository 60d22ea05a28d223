"""What a command costs with every process it starts: seconds, CPU-seconds, peak memory. Linux only, by /proc."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK") if sys.platform == "linux" else 100
LOOK = 0.25  # seconds between two looks at all processes, which cost this one some milliseconds each
POLL = 0.02
PATIENCE = 60.0  # seconds that processes left behind may take to end


@dataclass
class Cost:
    """`cpu` is the larger of two sums that each miss something, see `measure`. Bytes: `pss` of all processes together,
    the most seen at one look; `rss` the high-water mark of the largest process, which misses nothing."""

    seconds: float = 0.0
    waited: float = 0.0
    sampled: float = 0.0
    pss: int = 0
    rss: int = 0
    processes: int = 0

    @property
    def cpu(self) -> float:
        return max(self.waited, self.sampled)

    def row(self) -> dict[str, float]:
        return {**asdict(self), "cpu": self.cpu}


@dataclass
class Tree:
    """The processes below this one, as seen so far: last CPU time of each by (pid, start time)."""

    ticks: dict[tuple[int, str], int] = field(default_factory=dict)
    pss: int = 0
    rss: int = 0

    def look(self) -> set[int]:
        """Read every living descendant's CPU time and memory; their ids."""
        parents, found = {}, {}
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                stat = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            parents[int(name)], found[int(name)] = int(stat[1]), ((int(name), stat[19]), int(stat[11]) + int(stat[12]))
        below = descendants(parents)
        self.ticks.update(found[pid] for pid in below)
        self.pss = max(self.pss, sum(kib(pid, "smaps_rollup", "Pss:") for pid in below) * 1024)
        self.rss = max([self.rss, *(kib(pid, "status", "VmHWM:") * 1024 for pid in below)])
        return below

    @property
    def seconds(self) -> float:
        return sum(self.ticks.values()) / TICK


def descendants(parents: dict[int, int]) -> set[int]:
    """Of this process, from the parent of every process."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        new = children.get(todo.pop(), [])
        found.update(new)
        todo += new
    return found


def kib(pid: int, file: str, key: str) -> int:
    """A line of a process's own account; 0 when it has ended. In Pss a page that n processes share is 1/n of one."""
    try:
        text = Path("/proc", str(pid), file).read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


def measure(command: list[str], env: dict[str, str], log: Path, timeout: float = 1800) -> Cost:
    """Run a command to the end of everything it started, its output in `log`; raises `RuntimeError` if it fails.

    CPU time is taken twice. `waited`: what the kernel reports of processes as they are waited for, orphans adopted by
    this process; exact, but without processes whose parent ignores their end, as Ray's does. `sampled`: the last time
    seen of each process; it has those, but misses what was used after the last look, and processes that live shorter.
    """
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind then, either
    cost, tree = Cost(), Tree()
    begin = time.perf_counter()
    with log.open("w") as out:
        main = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        status = _watch(main, cost, tree, begin, timeout)
    finally:
        for pid in tree.look():  # none, unless this was interrupted
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    cost.sampled, cost.processes, cost.pss, cost.rss = tree.seconds, len(tree.ticks), tree.pss, tree.rss
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {status}\n{log.read_text()[-3000:]}")
    return cost


def _watch(main: subprocess.Popen[bytes], cost: Cost, tree: Tree, begin: float, timeout: float) -> int:
    """Wait for all children; the exit status of the first. `seconds` ends with it, the CPU time with the last."""
    next_look, deadline = begin, begin + timeout
    status = None
    while True:
        try:
            pid, code, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return 1 if status is None else status
        if pid:
            cost.waited += used.ru_utime + used.ru_stime
            if pid == main.pid:
                status = main.returncode = os.waitstatus_to_exitcode(code)
                cost.seconds = time.perf_counter() - begin
                deadline = time.perf_counter() + PATIENCE
            continue
        now = time.perf_counter()
        if now > deadline:
            raise RuntimeError(
                f"{main.args!r}: " + ("leaves processes behind" if status is not None else "takes too long")
            )
        if now >= next_look:
            tree.look()
            next_look = now + LOOK
        time.sleep(POLL)


def adopt_orphans() -> None:
    """Linux hands processes whose parent has ended to this one (PR_SET_CHILD_SUBREAPER)."""
    if sys.platform != "linux":
        raise RuntimeError("CPU time of all processes is read from /proc: Linux only")
    ctypes.CDLL(None).prctl(36, 1)
