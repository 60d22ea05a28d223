"""Each kernel of Top-K as it is compiled for the common cases, for a test without a GPU."""

from typing import Any

from fedpipe.kernels.common import Variant
from fedpipe.kernels.topk import order, settle, split

FLOAT = {"MASK": 0x7FFFFFFF, "INF": 0x7F800000}
HALF = {"MASK": 0x7FFF, "INF": 0x7F80}
POINTERS = {
    "*i64": ("starts", "counts", "plan", "state", "found", "ties", "k"),
    "*i32": ("bracket", "first", "sure", "undecided", "ranks", "out", "partial", "packed"),
}


def variant(kernel: Any, element: str, warps: int, constants: dict[str, Any], streaming: bool = False) -> Variant:
    """Types by the arguments' names: keys and x are the buffer's integers, the rest has one type throughout."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {name: kind for kind, names in POINTERS.items() for name in names if name in types}
    types |= {name: f"*{element}" for name in ("x", "keys", "candidates", "threshold") if name in types}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = ("n",) if "n" in types else ()
    return Variant(kernel, types, constants, warps, aligned, streaming)


def _family(name: str, element: str, bits: dict[str, int], many: bool) -> dict[str, Variant]:
    common = {**bits, "SEGMENTED": many, "WIDE": False}
    big = {**common, "W": split.TILE * settle.EACH, "EACH": settle.EACH}
    return {
        f"split {name}": variant(split.split_kernel, element, 8, {**common, "W": split.TILE}, True),
        f"compact {name}": variant(settle.compact_kernel, element, 8, big),
        f"settle {name}": variant(settle.settle_kernel, element, 8, big),
        f"ties {name}": variant(settle.tie_kernel, element, 8, big),
    }


def _narrow(element: str, bits: dict[str, int], last: bool) -> Variant:
    constants = {**bits, "DIGIT": order.DIGIT, "BLOCK": order.BLOCK, "B": 128, "LAST": last}
    return variant(order.narrow_kernel, element, 4, constants)


VARIANTS = {
    **_family("float32", "i32", FLOAT, False),
    **_family("float32 layers", "i32", FLOAT, True),
    **_family("bfloat16", "i16", HALF, False),
    "sample": variant(order.sample_kernel, "i32", 16, {**FLOAT, "BITS": 31, "M": 2**14, "LOG": 14}),
    "narrow": _narrow("i32", FLOAT, False),
    "narrow, last": _narrow("i32", FLOAT, True),
    "narrow bfloat16": _narrow("i16", HALF, False),
    "plan": variant(split.plan_kernel, "i32", 1, {"HEAVY": 1, "MISSED": 2, "NAN": 3, "TILE": split.TILE * 32}),
    "zero": variant(split.zero_kernel, "i32", 8, {"W": split.TILE, "WIDE": False}, True),
    "zero bfloat16": variant(split.zero_kernel, "i16", 8, {"W": split.TILE, "WIDE": False}, True),
}
