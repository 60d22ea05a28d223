"""Each kernel of Top-K as it is compiled for the common cases, for a test without a GPU."""

from dataclasses import replace
from typing import Any

from fedpipe.kernels.common import Variant
from fedpipe.kernels.topk import collect, order, place, settle, split

FLOAT = {"MASK": 0x7FFFFFFF, "INF": 0x7F800000}
HALF = {"MASK": 0x7FFF, "INF": 0x7F80}
POINTERS = {
    "*i64": (
        *("starts", "counts", "totals", "bins", "flags", "plan", "found", "listed", "k", "rooms"),
        "list_places",
    ),
    "*i32": (
        *("bracket", "first", "sure", "undecided", "ranks", "out", "packed", "ties", "places", "following", "filled"),
        "list_keys",
    ),
}


def variant(kernel: Any, element: str, warps: int, constants: dict[str, Any], streaming: bool = False) -> Variant:
    """Types by the arguments' names: keys and x are the buffer's integers, the rest has one type throughout."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {name: kind for kind, names in POINTERS.items() for name in names if name in types}
    types |= {"offsets": "*i16"} if "offsets" in types else {}
    types |= {name: f"*{element}" for name in ("x", "keys", "values", "threshold") if name in types}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = ("n",) if "n" in types else ()
    return Variant(kernel, types, constants, warps, aligned, streaming)


def _family(name: str, floats: str, element: str, bits: dict[str, int], many: bool) -> dict[str, Variant]:
    common = {**bits, "SEGMENTED": many, "WIDE": False, "LOG": 12, "BLOCK": settle.BLOCK, "TILE": 2**16}
    tiles = {**common, "W": split.TILE, "CAP": 128, "EACH": collect.LANES // 128, "FEW": collect.FEW}
    big = {**common, "W": split.TILE * place.EACH, "EACH": place.EACH}
    return {
        f"split {name}": replace(
            variant(split.split_kernel, floats, split.WARPS, tiles, True), options=split.LIMIT if many else {}
        ),
        f"collect {name}": variant(collect.collect_kernel, element, 4, tiles),
        f"pick {name}": variant(settle.pick_kernel, element, 8, common),
        f"decide {name}": variant(settle.decide_kernel, element, 8, common),
        f"place {name}": variant(place.place_kernel, element, 4, common),
        f"ties {name}": variant(place.tie_kernel, element, 8, big),
    }


VARIANTS = {
    **_family("float32", "fp32", "i32", FLOAT, False),
    **_family("float32 layers", "fp32", "i32", FLOAT, True),
    **_family("bfloat16", "bf16", "i16", HALF, False),
    "sample": variant(order.sample_kernel, "i32", 4, {**FLOAT, "BITS": 31, "M": 2**12, "STRATA": 10}),
    "mean": variant(order.mean_kernel, "i32", 1, {**FLOAT, "MANY": 5, "B": 256}),
    "zero": variant(split.zero_kernel, "i32", 8, {"W": split.TILE, "WIDE": False}, True),
    "zero bfloat16": variant(split.zero_kernel, "i16", 8, {"W": split.TILE, "WIDE": False}, True),
}
