"""What a peak is made of: every storage alive at that moment is of one kind, told by when it came and when it went."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Literal

Stage = Literal["forward", "backward", "update"]


def mib(count: int | None) -> str:
    """Bytes in words, with more digits for small ones; None is no limit."""
    if count is None:
        return "no limit"
    value = count / 2**20
    return f"{value:.2f} MiB" if value >= 1 else f"{value:.4f} MiB"


@dataclass(frozen=True)
class Parts:
    """Bytes at a peak, apart.

    parameters   the model worked on, with its buffers
    state        other names held: a method's (control variates, anchors, personal models)
    gradients    of live parameters
    optimizer    its state
    activations  made by the forward and read by the backward, the batch among them
    temporaries  everything else that is alive: gradients of activations, what runs again, results on their way
    workspace    what an operation allocates for itself while it runs
    features     outputs of a frozen prefix that are kept
    """

    parameters: int = 0
    state: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporaries: int = 0
    workspace: int = 0
    features: int = 0

    @property
    def peak(self) -> int:
        return sum(astuple(self))

    @property
    def largest(self) -> str:
        """The three largest, in words."""
        sizes = sorted(((n, s) for n, s in zip(KINDS, astuple(self), strict=True) if s), key=lambda p: -p[1])
        return ", ".join(f"{name} {mib(size)}" for name, size in sizes[:3])


KINDS = tuple(f.name for f in fields(Parts))


@dataclass
class Record:
    """One storage: when it came and went, in changes of stage or size counted from the trace's start."""

    bytes: int
    born: int
    stage: Stage
    died: int | None = None

    def alive(self, at: int) -> bool:
        return self.born <= at and (self.died is None or self.died > at)


def kind_of(name: str) -> str:
    """The kind of a name held before a phase."""
    return {"model": "parameters", "optimizer": "optimizer"}.get(name.partition("/")[0], "state")


def parts(made: Iterable[Record], turns: list[tuple[int, Stage]], at: int) -> dict[str, int]:
    """Bytes by kind of the records alive at a moment, after the last of them has come. turns: when stages began."""
    begun = {s: [t for t, stage in turns if stage == s] for s in ("backward", "update")}
    out: dict[str, int] = {}
    for r in made:
        if r.alive(at):
            kind = _kind(r, begun)
            out[kind] = out.get(kind, 0) + r.bytes
    return out


def _kind(r: Record, begun: dict[str, list[int]]) -> str:
    if r.stage == "update":
        return "optimizer" if r.died is None else "temporaries"
    after: Stage = "backward" if r.stage == "forward" else "update"
    starts = begun[after]
    i = bisect_right(starts, r.born)  # the next turn after its making
    outlives = i < len(starts) and (r.died is None or r.died > starts[i])
    if not outlives:
        return "temporaries"
    if r.stage == "forward" and not i and len(starts) > 1 and r.died is None:
        return "optimizer"  # made before the first step, as momentum is that a captured step moves
    return "activations" if r.stage == "forward" else "gradients"
