"""What is there between rounds, what clients sent, and the states that are mixed from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.aggregate import Terms, check_finite
from fedpipe.errors import FedpipeError
from fedpipe.failures import judge, not_finite
from fedpipe.loop.client import Result
from fedpipe.messages import Filed, Held, Message, all_finite, layout
from fedpipe.runtime import Runtime
from fedpipe.stopping import Watch
from fedpipe.types import Plan, Tensors, Update

Rows = list[dict[str, Any]]


@dataclass
class World:
    """What exists between rounds: states by `node@version`, and every client's latest own file (tensors or a path)."""

    states: dict[str, Tensors]
    owns: dict[int, tuple[int, Tensors | Path]] = field(default_factory=dict)
    watch: Watch = Watch()  # of the study's `stop`

    def own(self, client: int) -> Tensors:
        found = self.owns.get(client, (0, {}))[1]
        return io.read_tensors(found)[0] if isinstance(found, Path) else found


@dataclass
class Sent:
    """What one row's training gave: its message (None when the client failed), what it keeps, its metrics.

    doubt: the training, where nobody has looked yet whether what is folded of it is finite; the mean will show.
    """

    row: dict[str, Any]
    message: Message | None
    own: Tensors
    metrics: Rows
    doubt: Result | None = None

    @property
    def image(self) -> bytes | None:
        """The message as the bytes of a file, which are the bytes counted."""
        return self.message.image if self.message else None

    def let_go(self) -> None:
        """It has been folded: that it came is all that is kept of the message."""
        if self.message:
            self.message, self.doubt = Held({}, {}), None

    def fail(self) -> None:
        """The client sends nothing after all."""
        self.message = None
        for m in self.metrics:
            m |= {"failed": True, "payload_up": 0, "header_up": 0}


class Mixing:
    """Mixes the rounds of one run."""

    def __init__(self, runtime: Runtime, plans: dict[str, Plan], rows: Rows):
        self.rt, self.plans = runtime, plans
        self.by_round: dict[int, Rows] = {}
        for r in rows:
            self.by_round.setdefault(r["round"], []).append(r)
        self.terms: dict[str, Terms] = {}  # by plan, of the latest layout of states

    def mix(self, t: int, world: World, sent: Iterable[Sent]) -> World:
        """The world after round t: every Mix row's state, every client's own file."""
        by_id = {row_id(s.row): s for s in sent}
        made = self.made(t, world, by_id)
        if not all_right(made) and self._failed(by_id.values()):
            made = self.made(t, world, by_id)
        return self.after(t, world, made, by_id.values())

    def after(self, t: int, world: World, made: dict[str, Tensors], sent: Iterable[Sent]) -> World:
        """The world after round t, of the states made in it."""
        kept = {s.row["client"]: (t, s.own) for s in sent if s.own and s.message}
        owns = {**world.owns, **kept} if kept else world.owns
        return replace(world, states={**world.states, **made}, owns=owns)

    def _failed(self, sent: Iterable[Sent]) -> bool:
        """Whether clients nobody has looked at yet came to values that are not finite: they send nothing, or that is
        the end, as where it is seen at once."""
        bad = False
        for s in sent:
            why = not_finite(s.doubt) if s.doubt and s.message else None
            if judge(s.row, why, self.rt.run.on_client_failure):
                s.fail()
                bad = True
        return bad

    def made(self, t: int, world: World, by_id: Mapping[str, Sent]) -> dict[str, Tensors]:
        """The states of the round's Mix rows; what came is asked for in the order it is folded in. Once the run has
        stopped nothing is mixed any more, other states neither."""
        made: dict[str, Tensors] = {}
        for row in self.by_round.get(t, []):
            if row["kind"] == "mix":
                states = {**world.states, **made}
                mixed = self._mix(row, states, by_id) if world.watch.stopped is None else states[row["base"]]
                made[row["out"]] = dict(sorted(mixed.items()))
        came = [by_id[u] for r in self.by_round.get(t, []) for u in r.get("updates") or () if u in by_id]
        if came and not any(sent.message for sent in came):
            raise FedpipeError(f"round {t}: every client failed")
        return made

    def _mix(self, row: dict[str, Any], states: dict[str, Tensors], by_id: Mapping[str, Sent]) -> Tensors:
        came = [u for u in row["updates"] if u in by_id]
        base, arrived = states[row["base"]], (s for s in map(by_id.__getitem__, came) if s.message)
        first = next(arrived, None)
        if first is None and not row["states"]:
            return base
        terms = cache(lambda plan, start: self.of(plan, states[start]))
        # On the device that trains, whose kernels fold; states themselves live on the CPU.
        all_sent = chain(() if first is None else (first,), arrived)
        updates = (self._update(s, terms(s.row["plan"], s.row["start"])) for s in all_sent)
        others = (Update(-1, 1.0, 0, self.rt.moved(states[name])) for name in row["states"])
        node = row["out"].split("@")[0]
        ctx = replace(self.rt.ctx(row["round"], role="server"), chain=self.rt.build(), node=node)
        aggregate = self.rt.method.aggregate or (lambda state, updates, ctx: ctx.mean(state, updates))
        return {n: t.cpu() for n, t in aggregate(self.rt.moved(base), chain(updates, others), ctx).items()}

    def _update(self, sent: Sent, terms: Terms) -> Update:
        row, message = sent.row, sent.message
        assert message is not None
        who = f"update of client {row['client']}, round {row['round']}"
        tensors, meta = message.open()
        if (meta.get("client"), meta.get("round")) != (row["client"], row["round"]):
            raise FedpipeError(f"{who}: what arrived is of client {meta.get('client')}, round {meta.get('round')}")
        terms.check(tensors, who)
        if isinstance(message, Filed):  # of this process's own it was seen when they had been trained, or is in doubt
            check_finite(tensors, who)
        return Update(row["client"], meta["weight"], meta["samples"], self.rt.moved(tensors), terms.plan.index)

    def of(self, plan: str, start: Tensors) -> Terms:
        """The plan's terms for states like this one: found again only where the state's names or shapes are others."""
        found = self.terms.get(plan)
        if found is None or found.layout != layout(start):
            found = self.terms[plan] = Terms(self.plans[plan], start)
        return found


def all_right(made: dict[str, Tensors]) -> bool:
    """Whether all entries of states are finite."""
    return all_finite([x for state in made.values() for x in state.values()])


def row_id(row: dict[str, Any]) -> str:
    """Name of a train row's update within its round."""
    return f"{row['client']}:{row['part']}" if row["part"] else str(row["client"])
