"""Exact Top-K in Triton: sample, one read of the buffer that splits it at a bracket, then the few undecided entries.

Everything is launched before the host reads the one number that says whether the counts prove the bracket right. If
they do not, a tighter or wider bracket is tried once, then the exact threshold is narrowed down over the whole buffer.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fedpipe.kernels.common import words
from fedpipe.kernels.topk import order, settle, split
from fedpipe.kernels.topk.layout import Layout, layout, ranks
from fedpipe.kernels.topk.reference import KEYS, NAN
from fedpipe.kernels.topk.settle import EACH
from fedpipe.kernels.topk.split import TILE
from fedpipe.kernels.topk.variants import VARIANTS

__all__ = ["VARIANTS", "topk_mask", "topk_zero_"]

SAMPLE = 2**14  # entries a program samples, 32 in each thread's registers
PROGRAMS = 63  # at most, that sample one segment; odd, so that the median is one of them
STRIDE = 64  # entries of a segment for one that is sampled, where a sampled one costs 32 bytes
SIGMAS = (4.0, 16.0)  # half width of the bracket: at first, and after it missed
EXTRA = 60 * 2**20  # bytes beside the two masks, for candidates and counts
HEAVY, MISSED, NANS = 1, 2, 3  # what a plan says of a segment: too many candidates, bracket missed, a NaN


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

    def empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def sampled(task: Task, sigmas: float) -> Tensor:
    """Bracket [groups, 2] of each segment's threshold."""
    n, segments = task.x.shape[-1], len(task.sizes)
    m = min(SAMPLE, max(128, triton.next_power_of_2(max(task.sizes))))
    programs = min(PROGRAMS, max(task.sizes) // (STRIDE * SAMPLE), 2048 // task.groups) | 1
    table = ranks(task.sizes, task.k, m, programs, sigmas, task.x.device)
    out = task.empty(task.groups, programs, 2, dtype=torch.int32)
    mask = task.bits["MASK"]
    order.sample_kernel[(task.groups, programs)](
        task.x, task.at.starts, table, out, n, segments, MASK=mask, BITS=mask.bit_length(), M=m,
        LOG=m.bit_length() - 1, num_warps=max(1, m // 1024),
    )  # fmt: skip
    return out[:, 0] if programs == 1 else out.sort(dim=1).values[:, programs // 2].contiguous()


def narrowed(task: Task, keys: Tensor, plan: Tensor, bracket: Tensor, threshold: Tensor, most: int) -> Tensor:
    """[groups, 2]: the statistic each plan (first key, end, wanted) asks for, and how many of its equals are wanted.

    most: keys a group may have, for the number of programs."""
    mask = task.bits["MASK"]
    passes = -(-mask.bit_length() // (order.DIGIT.bit_length() - 1))
    programs = triton.next_power_of_2(min(max(1, most // (8 * order.BLOCK)), 1024, max(1, 2**16 // task.groups)))
    state, found = task.empty(passes, task.groups, 3), task.empty(task.groups, 2)
    partial = task.empty(passes, task.groups, programs, order.DIGIT, dtype=torch.int32)
    for number in range(passes + 1):
        last = number == passes
        order.narrow_kernel[(task.groups, 1 if last else programs)](
            keys, plan, bracket, state, partial, found, threshold, number, task.groups, **task.bits,
            DIGIT=order.DIGIT, BLOCK=order.BLOCK, B=programs, LAST=last,
        )  # fmt: skip
    return found


def exact(task: Task, threshold: Tensor) -> Tensor:
    """Brackets of one value each, the threshold, by reading the whole buffer once for each four bits."""
    n, groups = task.x.shape[-1], task.groups
    first = torch.arange(len(task.x), device=task.x.device)[:, None] * n
    rows = (first + task.at.starts[:-1], first + task.at.starts[1:], task.at.k.expand(len(task.x), -1), first * 0)
    plan = torch.stack(torch.broadcast_tensors(*rows), dim=-1).view(groups, 4).contiguous()
    whole = torch.tensor([[0, task.bits["MASK"]]], dtype=torch.int32, device=task.x.device).repeat(groups, 1)
    found = narrowed(task, task.x, plan, whole, threshold, max(task.sizes))
    return found[:, :1].to(torch.int32).repeat(1, 2)


def capacity(entries: int, slots: int, itemsize: int) -> int:
    """Candidates there is room for: a sixteenth of the entries, within the extra memory that counts leave."""
    return max(1024, min(entries // 16, (EXTRA - 40 * slots) // itemsize))


@dataclass(frozen=True)
class Cut:
    """A buffer split at a bracket: the masks, running sums of the slots' counts, plans, and room for candidates."""

    sure: Tensor
    undecided: Tensor
    counts: Tensor
    plan: Tensor
    room: int


def cut(task: Task, bracket: Tensor) -> Cut:
    """Read the buffer once."""
    (rows, n), segments, at = task.x.shape, len(task.sizes), task.at
    slots = at.tiles + segments - 1
    sure, undecided = (task.empty(rows, words(n), dtype=torch.int32) for _ in range(2))
    counts, plan = task.empty(1 + 4 * rows * slots), task.empty(task.groups, 4)
    room = capacity(rows * n, rows * slots, task.x.itemsize)
    split.split_kernel[(at.tiles, rows)](
        task.x, bracket, at.starts, at.first, sure, undecided, counts, n, words(n), slots, segments, **task.bits,
        W=TILE, SEGMENTED=segments > 1, WIDE=n >= 2**31, num_warps=8,
    )  # fmt: skip
    counts[:1].zero_()
    counts.cumsum_(0)
    split.plan_kernel[(segments, rows)](
        counts, at.starts, at.k, plan, slots, segments, room,
        HEAVY=HEAVY, MISSED=MISSED, NAN=NANS, TILE=TILE * 32, num_warps=1,
    )  # fmt: skip
    return Cut(sure, undecided, counts, plan, room)


def tried(task: Task, bracket: Tensor, threshold: Tensor) -> tuple[Tensor | None, Tensor]:
    """Words, or None where the counts do not prove them right, and what they say of each group [groups, 1]. Raises
    ValueError for a NaN."""
    (rows, n), segments, tiles = task.x.shape, len(task.sizes), task.at.tiles
    at, c = task.at, cut(task, bracket)
    big, slots = -(-tiles // EACH), tiles + segments - 1
    ties = task.empty(1 + rows * (big + segments - 1))
    candidates = task.empty(c.room, dtype=task.x.dtype)
    tile = {"W": TILE * EACH, "EACH": EACH, "SEGMENTED": segments > 1, "num_warps": 8}
    settle.compact_kernel[(big, rows)](
        task.x, c.undecided, bracket, at.starts, at.first, c.counts, candidates, n, words(n), tiles, slots, segments,
        c.room, MASK=task.bits["MASK"], **tile,
    )  # fmt: skip
    found = narrowed(task, candidates, c.plan, bracket, threshold, min(c.room // task.groups, max(task.sizes)))
    settle.settle_kernel[(big, rows)](
        c.sure, c.undecided, bracket, found, at.starts, at.first, c.counts, candidates, ties,
        words(n), tiles, slots, big + segments - 1, segments, c.room, **tile,
    )  # fmt: skip
    ties[:1].zero_()
    ties.cumsum_(0)
    settle.tie_kernel[(big, rows)](
        c.sure, c.undecided, found, at.starts, at.first, ties, words(n), tiles, big + segments - 1, segments, **tile
    )
    worst = int(c.plan[:, 3].max())
    if worst == NANS:
        raise ValueError(NAN)
    return None if worst else c.sure, c.plan[:, 3:]


def settled(task: Task, threshold: Tensor) -> Tensor:
    """Words, by the first bracket that proves right; each attempt reads the buffer once."""
    bracket = sampled(task, SIGMAS[0])
    packed, status = tried(task, bracket, threshold)
    if packed is None and bool((status == MISSED).any()):
        bracket = torch.where(status == MISSED, sampled(task, SIGMAS[1]), bracket)
        packed, status = tried(task, bracket, threshold)
    if packed is None and not bool((status == MISSED).any()):
        # most that is undecided may be one value, as zero in what was cut before: that one alone, then all but it
        alone = bracket[:, :1].repeat(1, 2)
        packed, status = tried(task, alone, threshold)
        if packed is None:
            others = torch.stack((bracket[:, 0] + 1, bracket[:, 1]), dim=-1)
            packed, _ = tried(task, torch.where(status == 0, alone, others), threshold)
    if packed is None:
        packed, _ = tried(task, exact(task, threshold), threshold)
    if packed is None:
        raise RuntimeError("x: changed during the call; wanted a buffer that nothing else writes")
    return packed


def topk_mask(x: Tensor, k: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Words [clients, words(n)] and thresholds [clients, segments] of x [clients, n]."""
    integer = KEYS[x.dtype][0]
    task = Task(x.view(integer), x.dtype, k, sizes, layout(sizes, k, TILE * 32, x.device))
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
