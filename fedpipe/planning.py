"""What `plan` and `finish` are given: a client's row, the model's units, and the bytes of any plan."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpipe.config import Local
from fedpipe.memory.margin import with_margin, without_margin
from fedpipe.types import Plan, Row, Window

if TYPE_CHECKING:
    from fedpipe.memory.choose import Chooser


@dataclass(frozen=True)
class PlanCtx:
    """Context of `plan` and `finish`: the client's row, the model's units, and the bytes of any plan."""

    row: Row
    h: dict[str, Any]
    local: Local
    rounds: int
    names: tuple[str, ...]  # stem, units in order, head
    choose: "Chooser" = field(repr=False)  # how bytes become blocks and recomputation
    window: Callable[[dict[str, Any]], tuple[Window, ...]] = field(repr=False)
    margin: float = 0.0
    at_round: int | None = None
    scenario: str | None = None  # of the study's budgets
    refused: list[int] = field(default_factory=list, repr=False)  # bytes of the plans that did not fit

    @property
    def stem(self) -> str:
        return self.names[0]

    @property
    def head(self) -> str:
        return self.names[-1]

    @property
    def units(self) -> tuple[str, ...]:
        return self.names[1:-1]

    @property
    def round(self) -> int:
        assert self.at_round is not None, "a plan that reads ctx.round belongs to a method with by_round=True"
        return self.at_round

    def tensors(self, *units: str) -> tuple[str, ...]:
        """Patterns of the tensors of units: `model/b1.*`."""
        return tuple(f"model/{u}.*" for u in units)

    def part(self, which: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Patterns of the tensors of a part of the model, `full`, `body` or `head`, and of all its others."""
        head = self.tensors(self.head)
        body = ("model/*", *(f"!{p}" for p in head))
        return {"full": (("model/*",), ()), "body": (body, head), "head": (head, body)}[which]

    def windows(self, **build: Any) -> tuple[Window, ...]:
        """What part of each tensor the model built with these keywords holds (`width=0.5`)."""
        return self.window(build)

    def rolled(self, windows: Sequence[Window], by: int) -> tuple[Window, ...]:
        """Windows that begin `by` entries further on, or back, wrapping round in each of their dimensions."""
        full = {f"model/{n}": t.shape for n, t in self.choose.chain.state_dict().items()}
        starts = ((w, by % full[w.name][w.dim]) for w in windows)
        return tuple(Window(w.name, w.dim, start, start + w.stop - w.start) for w, start in starts)

    def if_fits(self, plan: Plan) -> Plan | None:
        """The plan if its predicted peak and the margin are within the row's budget, else None. Where the study leaves
        recomputation free, it recomputes as much as that takes."""
        limit = self._limit
        return plan if limit is None else self._or_refuse(self.choose.fitted(plan, limit))

    def first(self, plans: "Iterable[Plan]") -> Plan | None:
        """The first of plans that fits the row's budget: the widest or the deepest, as they come; None: none does."""
        return next((fitted for plan in plans if (fitted := self.if_fits(plan)) is not None), None)

    def fewest(self, build: "Callable[[Sequence[tuple[str, ...]]], Plan]", skip: int = 0) -> Plan | None:
        """`build` of the fewest blocks of units whose phases fit the row's budget; None: a unit alone does not.

        build gives each block a phase that trains its units and a head, and the stem with the first unit. skip: so many
        first units are in no block; build leaves them out of the client's model."""
        limit = self._limit
        if limit is None:
            return build([self.choose.units[skip:]])
        return self._or_refuse(self.choose.fewest(limit, build, skip))

    def head_of(self, unit: str) -> str:
        """The head that is trained with a block that ends with a unit: its own exit, or the chain's."""
        return self.choose.chain.head_of(unit)

    @property
    def exits(self) -> tuple[str, ...]:
        """The units with a head of their own behind them, and the last, in order."""
        return self.choose.chain.ends

    @property
    def alike(self) -> tuple[tuple[str, ...], ...]:
        """Units in order, those together that follow each other and have tensors of the same names and shapes."""
        return self.choose.chain.alike

    @property
    def skippable(self) -> int:
        """How many of the first units give what they are given in shape, so that they can be left out."""
        shapes, before = self.choose.chain.shapes, self.stem
        same = [shapes[u] == shapes[before] for u in self.units]
        return same.index(False) if False in same else len(same)

    def greedy(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """FeDepth's published blocks for the row's ratio, and the units no block holds, whatever that is in bytes."""
        return self.choose.greedy(self.row.ratio)

    @property
    def _limit(self) -> int | None:
        budget = self.row.budget
        return None if budget is None else without_margin(budget, self.margin)

    def _or_refuse(self, found: "Plan | int") -> Plan | None:
        if isinstance(found, Plan):
            return found
        self.refused.append(with_margin(found, self.margin))
        return None
