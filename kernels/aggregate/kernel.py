"""The weighted mean of many clients in one pass over them: a tile's sums stay in registers, in float64.

Clients are told by tables of addresses, so that nothing is copied together. At most `MANY` are folded by a launch;
where more arrive, sums go to memory between launches, in float64: how many wait for one another changes no bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedpipe.kernels.aggregate.reference import Part, held
from fedpipe.kernels.bits.kernel import ones, tile
from fedpipe.kernels.common import Variant, words

MANY = 10
TILE = 16  # words of a program: 512 entries, 4 a thread, so that sums in float64 leave registers for the loads
PLAIN, MASKED, WINDOW, SPARSE = range(4)


@triton.jit
def wide64(x):
    """In float64; 16 bits by way of 32, which loses nothing."""
    return x.to(tl.float32).to(tl.float64) if x.dtype != tl.float64 else x


@triton.jit
def fold_kernel(old, out, total, weight, values, masks, before, weights, spans, n, count, rows, columns, inner,
                KIND: tl.constexpr, CLIENTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, W: tl.constexpr,
                WIDE: tl.constexpr):  # fmt: skip
    """total, weight: sums between launches. masks: words. before: set bits ahead of each word (SPARSE). spans:
    [4, clients], first row, rows, first column and columns of a window in a tensor [rows, columns, inner]."""
    word, bit, at = tile(W, WIDE)
    inside = at < n
    if FIRST:
        s = tl.zeros([W, 32], tl.float64)
        d = tl.zeros([W, 32], tl.float64)
    else:
        s = tl.load(total + at, mask=inside, other=0.0)
        d = tl.load(weight + at, mask=inside, other=0.0)
    for c in tl.static_range(CLIENTS):  # the loads of all clients are on their way at once: 1.6 times as fast
        p = tl.multiple_of(tl.load(values + c).to(old.dtype), 16)
        share = tl.load(weights + c)
        if KIND == 0:
            on = inside
            x = tl.load(p + at, mask=on, other=0.0)
        elif KIND == 2:
            row, rest = at // (columns * inner), at % (columns * inner)
            i = row - tl.load(spans + c).to(tl.int32)
            j = rest // inner - tl.load(spans + 2 * CLIENTS + c).to(tl.int32)
            i = tl.where(i < 0, i + rows, i)
            j = tl.where(j < 0, j + columns, j)
            wide = tl.load(spans + 3 * CLIENTS + c).to(tl.int32)
            on = inside & (i < tl.load(spans + CLIENTS + c).to(tl.int32)) & (j < wide)
            x = tl.load(p + (i * wide + j) * inner + rest % inner, mask=on, other=0.0)
        else:
            m = tl.load(tl.load(masks + c).to(tl.pointer_type(tl.int32)) + word, mask=word < count, other=0)
            set_ = ((m[:, None] >> bit[None, :]) & 1) != 0
            on = inside & set_
            if KIND == 1:
                x = tl.where(on, tl.load(p + at, mask=inside, other=0.0), 0.0)  # all of it: 128 bits at a time
            else:
                b = tl.load(tl.load(before + c).to(tl.pointer_type(tl.int32)) + word, mask=word < count, other=0)
                rank = ones(m[:, None] & ((1 << bit) - 1)[None, :])
                x = tl.load(p + b[:, None] + rank, mask=on, other=0.0)
        s += share * wide64(x)
        d += tl.where(on, share, 0.0)
    if LAST:
        kept = tl.load(old + at, mask=inside, other=0.0)
        mean = tl.where(d > 0, s / tl.where(d > 0, d, 1.0), wide64(kept))
        if old.dtype.element_ty != tl.float64:  # to 16 bits by way of 32, as torch does
            mean = mean.to(tl.float32)
        tl.store(out + at, mean.to(kept.dtype), mask=inside)
    else:
        tl.store(total + at, s, mask=inside)
        tl.store(weight + at, d, mask=inside)


def _kind(part: Part) -> int:
    if part.windows:
        return WINDOW
    return SPARSE if part.sparse else PLAIN if part.mask is None else MASKED


def _span(shape: torch.Size, part: Part) -> list[int]:
    """First row, rows, first column, columns of a part's window."""
    spans = {dim: (start, stop - start) for dim, start, stop in part.windows}
    whole = [(0, shape[d] if d < len(shape) else 1) for d in (0, 1)]
    return [x for d in (0, 1) for x in spans.get(d, whole[d])]


class Fold:
    """`reference.Fold` by launches over what has arrived."""

    def __init__(self, old: Tensor):
        self.old, self.waiting = old, list[Part]()
        self.sums: tuple[Tensor, ...] | None = None

    def add(self, part: Part) -> None:
        """Take one client's part; a launch is made when enough of one kind wait."""
        if any(d > 1 for d, _, _ in part.windows) or (part.windows and part.mask is not None):
            part = _spread(self.old, part)
        if part.values.data_ptr() % 16:  # a view from the midst of a buffer: the kernel loads 16 bytes at a time
            part = part._replace(values=part.values.clone())
        if self.waiting and (len(self.waiting) == MANY or _kind(part) != _kind(self.waiting[0])):
            self._launch(last=False)
        self.waiting.append(part)

    def result(self) -> Tensor:
        """The mean; entries nobody holds keep the old value."""
        return self._launch(last=True) if self.waiting or self.sums else self.old.clone()

    def _launch(self, last: bool) -> Tensor:
        parts, old, device = self.waiting, self.old, self.old.device
        n, first = old.numel(), self.sums is None
        out = torch.empty_like(old)
        if self.sums is None:
            size = 1 if last else n
            self.sums = tuple(torch.empty(size, dtype=torch.float64, device=device) for _ in range(2))
        before = [_before(p.mask) if p.sparse and p.mask is not None else None for p in parts]
        columns_of = [
            [p.values.data_ptr() for p in parts],
            [0 if p.mask is None else p.mask.data_ptr() for p in parts],
            [0 if b is None else b.data_ptr() for b in before],
            torch.tensor([p.weight for p in parts], dtype=torch.float64).view(torch.int64).tolist(),
            *([_span(old.shape, p)[k] for p in parts] for k in range(4)),
        ]
        table = torch.tensor(columns_of, dtype=torch.int64)  # all of it in one copy, which nothing waits for
        table = table.pin_memory().to(device, non_blocking=True) if old.is_cuda else table
        rows, columns = old.shape[0] if old.ndim else 1, old.shape[1] if old.ndim > 1 else 1
        fold_kernel[(triton.cdiv(words(n), TILE),)](
            old, out, *self.sums, table[0], table[1], table[2], table[3].view(torch.float64), table[4:], n, words(n),
            rows, columns, max(1, n // (rows * columns)), KIND=_kind(parts[0]) if parts else PLAIN,
            CLIENTS=len(parts), FIRST=first, LAST=last, W=TILE, WIDE=n >= 2**31,
        )  # fmt: skip
        self.waiting = []
        return out


@triton.jit
def ones_kernel(mask, out, count, B: tl.constexpr):
    """Set bits of each word."""
    word = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + word, ones(tl.load(mask + word, mask=word < count, other=0)), mask=word < count)


def _before(mask: Tensor) -> Tensor:
    """Set bits ahead of each word, int32 [words]."""
    each = torch.empty_like(mask)
    ones_kernel[(triton.cdiv(mask.numel(), 1024),)](mask, each, mask.numel(), B=1024)
    return each.cumsum(0, dtype=torch.int32).sub_(each)


def _spread(old: Tensor, part: Part) -> Part:
    """A part with windows of other dimensions than the first two, or with a mask of its own, as a masked whole."""
    from fedpipe.kernels.aggregate.reference import region
    from fedpipe.kernels.bits import kernel, reference

    shape = held(old.shape, part.windows)
    on = torch.ones(shape, dtype=torch.bool, device=old.device)
    if part.mask is not None:
        on = reference.unpack(part.mask, on.numel()).view(shape)
    values = part.values
    if part.sparse:
        values = torch.zeros(shape, dtype=old.dtype, device=old.device).masked_scatter_(on, values)
    at = region(old.shape, part.windows)
    whole, mask = torch.zeros_like(old), torch.zeros_like(old, dtype=torch.bool)
    whole[at], mask[at] = values.view(shape), on
    return Part(whole, part.weight, kernel.pack(mask.flatten()))


_TYPES = {
    **dict.fromkeys(("old", "out"), "*fp32"), **dict.fromkeys(("total", "weight", "weights"), "*fp64"),
    **dict.fromkeys(("values", "masks", "before", "spans"), "*i64"),
    **dict.fromkeys(("n", "count", "rows", "columns", "inner"), "i32"),
}  # fmt: skip


def _variant(kind: int, clients: int, first: bool = True, last: bool = True) -> Variant:
    constants = {
        "KIND": kind,
        "CLIENTS": clients,
        "FIRST": first,
        "LAST": last,
        "W": TILE,
        "WIDE": False,
    }
    return Variant(fold_kernel, _TYPES, constants, aligned=("n",), streaming=kind == PLAIN)


VARIANTS = {
    "ones": Variant(ones_kernel, {"mask": "*i32", "out": "*i32", "count": "i32"}, {"B": 1024}, aligned=("count",)),
    "plain": _variant(PLAIN, MANY),
    "masked": _variant(MASKED, MANY),
    "window": _variant(WINDOW, MANY),
    "sparse": _variant(SPARSE, MANY),
    "carried": _variant(MASKED, 2, first=False),
    "carrying": _variant(MASKED, MANY, last=False),
}
