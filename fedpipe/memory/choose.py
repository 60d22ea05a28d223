"""How a budget becomes blocks of units and recomputation: `planner` over the costs of the run's chain."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedpipe.errors import FedpipeError
from fedpipe.memory import planner, proxy
from fedpipe.memory.costs import Costs
from fedpipe.memory.stretch import Again, Ranges, Stretch, of, ranges
from fedpipe.models.chain import Chain
from fedpipe.recompute import Policy
from fedpipe.types import Patterns, Phase, Plan

if TYPE_CHECKING:
    from fedpipe.runtime import Runtime

TRIES = 4  # to find room for what a method holds besides plain training
Block = tuple[str, ...]
NEVER = 2**62  # bytes
NEAR = 1.01  # costs of units are as near as that to what is traced
ALL: Patterns = ("model/*",)


class Chooser:
    """Of one run. Limits are bytes that predicted peaks must not exceed, margins already taken off."""

    def __init__(self, runtime: "Runtime") -> None:
        self.runtime, self.local = runtime, runtime.run.local
        self.auto = self.local.recompute == "auto"
        self._units: dict[object, object] = {}
        self._costs: dict[object, Costs] = {}
        self._narrow: dict[Chain, Ranges] = {}
        self._mixed: dict[tuple[Chain, int, int], int] = {}

    def costs(self, plan: Plan | None = None, live: Patterns = ALL) -> Costs:
        """What units add to the peaks of plain training of a plan's model, or of the whole one."""
        plan = plan or Plan()
        key = plan.model, live
        if key not in self._costs:
            chain = self.runtime.chain(plan)
            order = self.runtime.layout(chain)
            self._costs[key] = Costs(chain, self.local.batch, self.local.optimizer, live, self._units, order)
        return self._costs[key]

    @property
    def units(self) -> Block:
        """The units that may be cut into blocks. Raises FedpipeError for a model that has none."""
        units = self.runtime.build().names[1:-1]
        if not units:
            name = self.runtime.run.model.name
            raise FedpipeError(f"model {name}: no unit between stem and head; wanted some to cut into blocks")
        return units

    @property
    def chain(self) -> Chain:
        """The whole model."""
        return self.runtime.build()

    def fitted(self, plan: Plan, limit: int) -> Plan | int:
        """The plan with all its phases within the limit, or the bytes that it would need.

        Where the study's recomputation is `auto`, phases run as little again as that takes by the costs of their units.
        Each is then traced whole, and tried again with less room where a method holds more than plain training does.
        """
        plan = self.runtime.levelled(plan)
        found = [self._fitted(replace(plan, phases=(phase,)), limit) for phase in plan.phases]
        needs = max((f for f in found if isinstance(f, int)), default=None)
        return replace(plan, phases=tuple(f for f in found if isinstance(f, Phase))) if needs is None else needs

    def _fitted(self, plan: Plan, limit: int) -> Phase | int:
        (phase,), (peak,) = plan.phases, self.runtime.predictor.peaks(plan)
        free = self.auto and not (phase.levels or phase.again)
        stretch = of(self.costs(plan, phase.live), phase) if free and peak > limit else None
        beyond = peak - stretch.peak() if stretch else 0
        for _ in range(TRIES if stretch else 0):
            assert stretch is not None
            policy = stretch.cheapest(limit - beyond)
            if policy is None:
                return max(limit + 1, stretch.smallest() + beyond)
            phase = replace(phase, levels=policy.levels, again=policy.again)
            (peak,) = self.runtime.predictor.peaks(replace(plan, phases=(phase,)))
            if peak <= limit:
                break
            beyond += peak - limit
        return phase if peak <= limit else peak

    def fewest(self, limit: int, build: Callable[[Sequence[Block]], Plan], skip: int = 0) -> Plan | int:
        """`build` of the fewest blocks of units with which all phases are within the limit, or bytes that would do.

        `build` makes a phase of each block: its units are trained, a head, and the stem with the first. What runs
        again is looked for unit by unit here; `fitted` looks at ranges, too. skip: so many first units are in no block.
        """
        units, room = self.units[skip:], limit
        # a budget may be just what the whole needs, which costs only come near
        if limit < self.least(units, build, limit, units) <= limit * NEAR:
            whole = self.fitted(build([units]), limit)
            if isinstance(whole, Plan):
                return whole
        found: Plan | int = limit + 1
        for _ in range(TRIES):

            def fits(first: int, last: int, room: int = room) -> bool:
                return self.least(units[first : last + 1], build, room, units) <= room

            blocks = planner.fewest(fits, len(units))
            if blocks is None:
                alone = max(self.least((u,), build, room, units) for u in units)
                return max(
                    limit + 1, (alone if alone < NEVER else self.least(units, build, room, units)) + limit - room
                )
            found = self.fitted(build([units[a : b + 1] for a, b in blocks]), limit)
            if isinstance(found, Plan):
                break
            room -= found - limit
        return found

    def least(self, block: Block, build: Callable[[Sequence[Block]], Plan], enough: int, units: Block) -> int:
        """The least peak of a block of some units that the study's recomputation allows, by the costs of its units, or
        one that is `enough` or less. NEVER for a block whose last unit cannot be linked to the head."""
        if self.local.again:
            return max(self.runtime.predictor.peaks(build([block])))
        costs = self.costs(build([units]))
        first, last = costs.body.index(block[0]), costs.body.index(block[-1])
        stretch = Stretch(costs, 0 if first == 1 else first, last)
        if self.local.levels:
            return stretch.under(Policy(tuple(self.local.levels.items()))) if costs.links(last) else NEVER
        peak = min(self._ranges(costs).get((block[0], block[-1]), {Again: NEVER}).values())
        if peak <= enough or not self.auto or peak == NEVER:
            return peak
        key = costs.chain, first, last
        if key not in self._mixed:
            self._mixed[key] = stretch.smallest(alone=True)
        return self._mixed[key]

    def _ranges(self, costs: Costs) -> Ranges:
        """Those of the whole model are kept in `prediction.parquet`."""
        whole = costs.chain is self.runtime.build()
        known = self.runtime.predictor.ranges if whole else self._narrow.setdefault(costs.chain, {})
        if not known:
            known |= ranges(costs, (*costs.levels, Again) if self.auto else (0,))
        return known

    def greedy(self, ratio: float | None) -> tuple[list[Block], list[str]]:
        """FeDepth's published blocks for a client of a share of the whole network's activations, and the units that
        fit in none (arXiv 2303.04887); ratio None: one block."""
        values, units = proxy.values(self.runtime.build()), self.units
        budget = float("inf") if ratio is None else ratio * sum(values.values())
        blocks, unfit = planner.greedy([values[u] for u in units], budget)
        return [tuple(units[k] for k in b) for b in blocks], [units[k] for k in unfit]
