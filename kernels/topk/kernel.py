"""Exact Top-K in Triton: sample, one read of the buffer that splits it at a bracket, then the few undecided entries.

All of it is launched before the host reads the one word that says whether the counts prove the brackets right, which
is known before the last entries are settled: the host wakes while they are. Where a bracket does not do, the next
attempt has one that is proved, or a thousandth as wide.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fedpipe.kernels.common import later, words
from fedpipe.kernels.topk import collect, order, place, settle, split
from fedpipe.kernels.topk.collect import FEW, LANES
from fedpipe.kernels.topk.layout import Layout, layout, ranks, samples
from fedpipe.kernels.topk.place import EACH
from fedpipe.kernels.topk.reference import KEYS, NAN
from fedpipe.kernels.topk.settle import BLOCK
from fedpipe.kernels.topk.split import TILE
from fedpipe.kernels.topk.variants import VARIANTS

__all__ = ["VARIANTS", "topk_mask", "topk_zero_"]

SAMPLE = 2**12  # entries a program samples, 32 in each thread's registers
NEAR, MANY = 4, 5  # neighbours sampled together, which cost memory what one does, by so many programs at least
SIGMAS = 4.0  # half width of the bracket
EXTRA = 60 * 2**20  # bytes beside the two masks, for candidates
ATTEMPTS = 8  # a sample, a proved bracket, then at least eight bits of 31 each time; never reached


@dataclass(frozen=True)
class Task:
    """x: [clients, n] as integers; constants of its type; tables of its segments."""

    x: Tensor
    dtype: torch.dtype
    k: tuple[int, ...]
    sizes: tuple[int, ...]
    at: Layout

    @property
    def groups(self) -> int:
        return len(self.x) * len(self.sizes)

    @property
    def bits(self) -> dict[str, int]:
        return {"MASK": KEYS[self.dtype][1], "INF": KEYS[self.dtype][2]}

    @property
    def log(self) -> int:
        """Of the number of bins of a bracket, by the entries of a segment: some hundred candidates stay in each."""
        return min(12, max(9, max(self.sizes).bit_length() - 11))

    @property
    def sample(self) -> tuple[int, int, float]:
        """Entries that a program samples, programs of a segment, share of the undecided."""
        return samples(self.sizes, self.k, self.at.room, SAMPLE)

    @property
    def cap(self) -> int:
        """Slots of a tile for candidates: 1.6 times as many as are expected."""
        return min(LANES, max(16, triton.next_power_of_2(int(1.6 * TILE * 32 * self.sample[2]))))

    def empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def sampled(task: Task) -> Tensor:
    """Bracket [groups, 2] of each segment's threshold."""
    n, segments = task.x.shape[-1], len(task.sizes)
    m, programs, _ = task.sample
    near = NEAR if programs >= MANY else 1
    table = ranks(task.sizes, task.k, m, programs, SIGMAS, task.x.device)
    out = task.empty(task.groups, programs, 2, dtype=torch.int32)
    width = task.bits["MASK"].bit_length()
    order.sample_kernel[(task.groups, programs)](
        task.x, task.at.starts, table, out, n, segments, **task.bits, BITS=width, M=m,
        STRATA=(m // near).bit_length() - 1, num_warps=max(1, m // 1024),
    )  # fmt: skip
    if programs == 1:
        return out
    bracket = task.empty(task.groups, 2, dtype=torch.int32)
    B = triton.next_power_of_2(programs)
    order.mean_kernel[(task.groups,)](out, bracket, programs, INF=task.bits["INF"], MANY=MANY, B=B, num_warps=1)
    return bracket


@dataclass(frozen=True)
class Cut:
    """A buffer split at a bracket: two masks, and of tiles the counts and the candidates."""

    sure: Tensor
    undecided: Tensor
    counts: Tensor
    ties: Tensor
    filled: Tensor
    values: Tensor
    offsets: Tensor


def cut(task: Task, bracket: Tensor) -> Cut:
    """Read the buffer once."""
    (rows, n), segments, at = task.x.shape, len(task.sizes), task.at
    slots, cap = at.tiles + segments - 1, task.cap
    sure, undecided = (task.empty(rows, words(n), dtype=torch.int32) for _ in range(2))
    counts, ties = task.empty(rows * slots), task.empty(rows * slots, dtype=torch.int32)
    filled = task.empty(rows * at.tiles, dtype=torch.int32)
    values = task.empty(rows * at.tiles * cap, dtype=task.x.dtype)
    offsets = task.empty(rows * at.tiles * cap, dtype=torch.int16)
    split.split_kernel[(at.tiles, rows)](
        task.x.view(task.dtype), bracket, at.starts, at.first, sure, undecided, counts, ties, filled,
        values.view(task.dtype), offsets, n, words(n), slots, segments,
        W=TILE, CAP=cap, SEGMENTED=segments > 1, WIDE=n >= 2**31, num_warps=split.WARPS,
        **(split.LIMIT if segments > 1 else {}),
    )  # fmt: skip
    return Cut(sure, undecided, counts, ties, filled, values, offsets)


def tried(task: Task, bracket: Tensor, threshold: Tensor) -> tuple[Tensor, int, Tensor]:
    """Words, flags that say whether the counts prove them right, and the bracket to go on with."""
    (rows, n), segments, at = task.x.shape, len(task.sizes), task.at
    c, groups, log, INF = cut(task, bracket), task.groups, task.log, task.bits["INF"]
    slots, segmented = at.tiles + segments - 1, segments > 1
    zeroed = torch.zeros(1 + groups * (3 + 2**log), dtype=torch.int64, device=task.x.device)
    flags, listed, totals, bins = zeroed.split((1, groups, 2 * groups, groups << log))
    keys = task.empty(rows * at.room, dtype=task.x.dtype)
    places = task.empty(rows * at.room, dtype=torch.int64 if n >= 2**31 else torch.int32)
    each = LANES // task.cap
    collect.collect_kernel[(-(-at.tiles // each), rows)](
        task.x, c.undecided, bracket, at.starts, at.first, at.rooms, c.counts, c.filled, c.values, c.offsets, totals,
        bins, flags, keys, places, n, words(n), at.tiles, slots, segments, **task.bits,
        W=TILE, EACH=each, CAP=task.cap, LOG=log, FEW=FEW, SEGMENTED=segmented,
    )  # fmt: skip
    plan, found, following = task.empty(groups, 3), task.empty(groups, 3), torch.empty_like(bracket)
    list_keys, list_places = task.empty(groups << log, dtype=torch.int32), task.empty(groups << log)
    programs = min(256, 1 + max(task.sizes) // 2**20)
    settle.pick_kernel[(groups, programs)](
        bracket, at.k, at.rooms, totals, bins, flags, plan, listed, keys, places, list_keys, list_places, segments,
        INF=INF, LOG=log, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    said = later(flags)
    settle.decide_kernel[(groups,)](
        bracket, at.k, at.rooms, totals, plan, listed, keys, list_keys, list_places, found, following, threshold,
        segments, INF=INF, LOG=log, num_warps=8,
    )  # fmt: skip
    place.place_kernel[(groups, 4 * programs)](
        c.sure, c.undecided, bracket, at.rooms, totals, found, flags, keys, places, c.ties, words(n), slots, segments,
        TILE=TILE * 32, BLOCK=BLOCK,
    )  # fmt: skip
    place.tie_kernel[(-(-at.tiles // EACH), rows)](
        c.sure, c.undecided, found, at.starts, at.first, c.ties, words(n), at.tiles, slots, segments,
        W=TILE * EACH, EACH=EACH, BLOCK=BLOCK, SEGMENTED=segmented, num_warps=8,
    )  # fmt: skip
    return c.sure, said(), following


def settled(task: Task, threshold: Tensor) -> Tensor:
    """Words, by the first brackets that prove right; an attempt reads the buffer once. Raises ValueError for a NaN."""
    bracket = sampled(task)
    for _ in range(ATTEMPTS):
        packed, flags, bracket = tried(task, bracket, threshold)
        if flags & collect.NAN.value:
            raise ValueError(NAN)
        if not flags & collect.AGAIN.value:
            return packed
    raise RuntimeError("x: changed during the call; wanted a buffer that nothing else writes")


def topk_mask(x: Tensor, k: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Words [clients, words(n)] and thresholds [clients, segments] of x [clients, n]."""
    integer = KEYS[x.dtype][0]
    most = EXTRA // (x.itemsize + 4) // len(x)
    task = Task(x.view(integer), x.dtype, k, sizes, layout(sizes, k, TILE * 32, most, x.device))
    threshold = task.empty(len(x), len(sizes), dtype=integer)
    return settled(task, threshold), threshold.view(x.dtype)


def topk_zero_(x: Tensor, k: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same, and what is not kept becomes 0 in place."""
    packed, threshold = topk_mask(x, k, sizes)
    n = x.shape[-1]
    split.zero_kernel[(triton.cdiv(words(n), TILE), len(x))](
        x.view(KEYS[x.dtype][0]), packed, n, words(n), W=TILE, WIDE=n >= 2**31, num_warps=8
    )
    return packed, threshold
