"""The study key `budgets`: what each client may take, in bytes or as a part of what is yet to be predicted."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, isclose
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedpipe.keys import NUMBER, Positive, Typed

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
FORMS = ("bytes", "like_width", "fraction", "devices", "scenario")
Kind = Literal["bytes", "width", "fraction"]
# FeDepth, Zhang et al., arXiv 2303.04887: four equal groups, the last the richest. Above 1: there is memory to spare.
SCENARIOS: dict[str, tuple[tuple[Kind, float], ...]] = {
    "fair": (("width", 1 / 6), ("width", 1 / 3), ("width", 1 / 2), ("width", 1.0)),
    "lack": (("width", 1 / 8), ("width", 1 / 6), ("width", 1 / 2), ("width", 1.0)),
    "surplus": (("width", 1 / 6), ("width", 1 / 3), ("width", 1 / 2), ("fraction", 2.0)),
}


def parse_bytes(text: Any) -> int:
    """Bytes of `5MiB`, `1.5 GB` or a plain number."""
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write bytes, or a number with one of KiB MiB GiB KB MB GB")
    return int(Fraction(found[1].rstrip(".")) * _UNITS[found[2].upper()])


def _ratio(text: Any) -> Any:
    """The number that `1/6` or `0.5` stands for; other text is left to be refused."""
    found = re.fullmatch(r"([0-9]+)/([1-9][0-9]*)|([0-9]*\.?[0-9]+)", text) if isinstance(text, str) else None
    if found is None:
        return text
    return float(found[3]) if found[3] else int(found[1]) / int(found[2])


def _keys(parse: Callable[[Any], Any]) -> BeforeValidator:
    def read(value: Any) -> Any:
        out: dict[Any, Any] = {}
        for k, v in value.items() if isinstance(value, dict) else ():
            if (key := parse(k)) in out:
                raise ValueError(f"{k} stands there twice")
            out[key] = v
        return out if isinstance(value, dict) else value

    return BeforeValidator(read)


def _ascending(value: dict[Any, int]) -> dict[Any, int]:
    """JSON sorts keys as text: only an order of the values themselves survives a file."""
    return dict(sorted(value.items()))


Size = Annotated[int, Field(ge=1, le=2**60), NUMBER]
Bytes = Annotated[dict[Size, Positive], Field(min_length=1), _keys(parse_bytes), AfterValidator(_ascending)]
Width = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]
Widths = Annotated[dict[Width, Positive], Field(min_length=1), _keys(_ratio), AfterValidator(_ascending)]
Multiple = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False), NUMBER]
Multiples = Annotated[dict[Multiple, Positive], Field(min_length=1), _keys(_ratio), AfterValidator(_ascending)]


class Device(Typed):
    """A kind of device: its memory, and the share of clients that have it."""

    name: Annotated[str, Field(min_length=1)]
    bytes: Annotated[Size, BeforeValidator(parse_bytes)]
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NUMBER]


@dataclass(frozen=True)
class Limit:
    """What the clients of one group may take: bytes, what training the width-r model needs, or a fraction of what the
    full model needs."""

    kind: Kind
    value: float
    name: str

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths whose need it is resolved by; the full model's is always one."""
        return (self.value, 1.0) if self.kind == "width" else (1.0,)

    def resolve(self, needs: Mapping[float, int]) -> tuple[int, float]:
        """(bytes, ratio), given bytes by width. The ratio is the width or fraction; of bytes, to the full model's."""
        if self.kind == "width":
            return needs[self.value], self.value
        if self.kind == "fraction":
            return int(self.value * needs[1.0]), self.value
        return int(self.value), self.value / needs[1.0]


class Budgets(Typed):
    """Clients per budget, in one of five forms: the first clients have the smallest. No key: no limits."""

    bytes: Bytes | None = Field(None, description="{512MiB: 10, 2GiB: 30}: clients per budget")
    like_width: Widths | None = Field(
        None, description="what training the width-r model is predicted to need: {1/6: 10, 0.5: 10}"
    )
    fraction: Multiples | None = Field(
        None, description="a fraction of what training the full model is predicted to need: {0.25: 10, 1: 30}"
    )
    surplus: bool = Field(False, description="fractions may be above 1")
    devices: Annotated[list[Device], Field(min_length=1)] | None = Field(
        None, description="kinds of devices: [{name: phone, bytes: 512MiB, share: 0.75}, ...]; shares add up to 1"
    )
    scenario: Literal["fair", "lack", "surplus"] | None = Field(
        None,
        description="four equal groups like widths 1/6 1/3 1/2 1 (fair), 1/8 1/6 1/2 1 (lack), or 1/6 1/3 1/2 and"
        " twice the full model (surplus)",
    )

    @model_validator(mode="after")
    def _one(self) -> "Budgets":
        given = [f for f in FORMS if getattr(self, f) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; wanted one of {', '.join(FORMS)}")
        if self.surplus and self.fraction is None:
            raise ValueError("surplus is given; wanted with fraction alone")
        if self.fraction and max(self.fraction) > 1 and not self.surplus:
            raise ValueError(f"fraction {max(self.fraction):g} is above 1; wanted at most 1, or surplus: true, too")
        if self.devices:
            _check_devices(self.devices)
        return self

    @property
    def fleet(self) -> list[Device]:
        """The devices, in order of their bytes."""
        return sorted(self.devices or [], key=lambda d: d.bytes)

    def limits(self, clients: int) -> list[tuple[Limit, int]]:
        """Each group's limit and how many clients it has, in order of clients: none where there are no limits.

        Raises ValueError where the counts do not add up to `clients`, or no client has a device.
        """
        if self.scenario:
            starts = [ceil(g * clients / 4) for g in range(5)]  # client i is of group floor(4 i / clients)
            groups = zip(SCENARIOS[self.scenario], pairwise(starts), strict=True)
            return [(Limit(kind, v, named(kind, v)), stop - start) for (kind, v), (start, stop) in groups]
        if self.devices:
            counts = _largest_remainder([d.share for d in self.fleet], clients)
            for d, n in zip(self.fleet, counts, strict=True):
                if not n:
                    raise ValueError(f"budgets.devices: {d.name}: a share of {d.share:g} is none of {clients} clients")
            return [(Limit("bytes", d.bytes, d.name), n) for d, n in zip(self.fleet, counts, strict=True)]
        forms: list[tuple[Kind, Mapping[Any, int] | None]]
        forms = [("bytes", self.bytes), ("width", self.like_width), ("fraction", self.fraction)]
        found = [(Limit(kind, v, named(kind, v)), n) for kind, form in forms for v, n in (form or {}).items()]
        if found and (total := sum(n for _, n in found)) != clients:
            raise ValueError(f"budgets: clients per budget add up to {total}, data.partition.clients is {clients}")
        return found


def _check_devices(devices: list[Device]) -> None:
    names = [d.name for d in devices]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"devices: {twice[0]} stands there twice; wanted distinct names")
    total = sum(d.share for d in devices)
    if not isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"devices: shares add up to {total:.7g}; wanted 1")


def _largest_remainder(shares: list[float], count: int) -> list[int]:
    """Whole numbers that add up to `count`, each its share of it rounded down, or up where most is cut off."""
    exact = [Fraction(repr(s)) * count for s in shares]
    out = [int(e) for e in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: out[i] - exact[i])
    for i in by_rest[: count - sum(out)]:
        out[i] += 1
    return out


def named(kind: Kind, value: float) -> str:
    """A limit as tables name it: `6 MiB`, `width 1/6`, `fraction 0.25`."""
    if kind == "bytes":
        return f"{value / 2**20:.4g} MiB"
    near = Fraction(value).limit_denominator(64)
    text = f"{value:.3g}"
    return f"{kind} {text if float(text) == value or float(near) != value else near}"
