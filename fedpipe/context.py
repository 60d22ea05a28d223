"""What hooks are given: frozen views of the study, the round and the model. Nothing here decides anything."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpipe.config import Local
from fedpipe.rng import rng
from fedpipe.types import Batch, Phase, Plan, Row, Tensors, Update, Window

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedpipe.kernels.common import Backend
    from fedpipe.memory.choose import Chooser
    from fedpipe.models.chain import Chain
    from fedpipe.recompute import Policy


@dataclass(frozen=True)
class Ctx:
    """Context of a hook. `client` is None inside per-step hooks, where a stack of clients is one call."""

    h: dict[str, Any]
    seed: int
    clients: int  # in the study
    classes: int
    rounds: int = 0  # of the study
    round: int = 0
    client: int | None = None
    plan: Plan | None = None  # of this client, at `begin` and `end`
    phase: Phase | None = None
    role: str = "train"  # train | eval | server
    node: str = "server"  # at `aggregate`, whose next state is made
    lr: float = 0.0  # of this round and phase
    steps: int = 0  # of this client: in the phase inside steps, in the round at `end`
    samples: int = 0
    chain: "Chain | None" = field(default=None, repr=False)  # of the client, at the server of all
    labels: "Tensor | None" = field(default=None, repr=False)  # at `end`: which classes [classes] this client has
    aggregation: "Backend" = "auto"  # what `mean` runs by
    norm: "Backend" = "auto"  # what levels of recomputation run by
    loss: str = "plain"  # whose classes count in `task`: plain | masked_batch | masked_client
    fresh: Callable[[str], Tensors] | None = field(default=None, repr=False)  # at `init`: the model's values drawn anew
    half: "torch.dtype | None" = None  # what layers of the training compute in; None: in their parameters' type

    def mean(self, state: Tensors, updates: "Iterable[Update]") -> Tensors:
        """The entry-wise weighted mean over the updates that hold an entry: `fedpipe.aggregate.mean`."""
        from fedpipe.aggregate import mean

        return mean(state, updates, self.aggregation)

    def forward(self, at: Tensors, x: "Tensor", prefix: str = "model/") -> "tuple[Tensor, Tensors]":
        """Logits of the model named by `prefix` on x [n, ...], and the buffers it changed (running statistics)."""
        p = self.phase
        return self._run(at, x, prefix, {"upto": p.upto, "since": p.since} if p else {})

    def exits(self, at: Tensors, x: "Tensor", units: Sequence[str], prefix: str = "model/") -> "tuple[Any, Tensors]":
        """Logits behind each of some units, in one pass: a list of [n, classes]; and the buffers it changed."""
        return self._run(at, x, prefix, {"ends": tuple(units)})

    def _run(self, at: Tensors, x: "Tensor", prefix: str, words: dict[str, Any]) -> "tuple[Any, Tensors]":
        import torch

        from fedpipe.models.dropout import PREFIX

        chain = self.chain
        assert chain is not None, "this context has no model"
        if chain.training != (self.role == "train"):
            chain.train(self.role == "train")
        values = {n: at[prefix + n] for n in chain.tensor_names}
        buffers, masks = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        if self.role == "train":
            buffers = {n: values[n].clone() for n in chain.buffer_names}
            masks = {f"{n}.keep": at[PREFIX + n] for n in chain.noise.layers if PREFIX + n in at}
        words = {**words, "policy": self._policy()}
        given = {**values, **buffers, **masks}
        if self.half is None or self.role != "train":
            z = torch.func.functional_call(chain, given, (x,), words)
        else:
            with torch.autocast(x.device.type, self.half, cache_enabled=False):
                z = torch.func.functional_call(chain, given, (x,), words)
            z = [each.to(x.dtype) for each in z] if isinstance(z, list) else z.to(x.dtype)
        return z, {prefix + n: b for n, b in buffers.items()}

    def _policy(self) -> "Policy | None":
        from fedpipe.recompute import Policy

        p = self.phase
        if p is None or self.role != "train" or not (p.levels or p.again):
            return None
        return Policy(p.levels, p.again, self.norm)

    def apply(self, at: Tensors, x: "Tensor", prefix: str = "model/") -> "Tensor":
        """Logits [n, classes] of the model named by `prefix`; changed buffers are dropped."""
        return self.forward(at, x, prefix)[0]

    def task(self, logits: "Tensor", batch: Tensors) -> "Tensor":
        """Cross-entropy of logits [n, classes] over the batch, weighted by `batch["w"]` (which sums to 1).

        With a masked loss logits of absent classes are 0 (HeteroFL, arXiv 2010.01264, and FeDepth's published code)."""
        if self.loss != "plain" and self.role == "train":
            logits = logits.masked_fill(~self._present(logits, batch), 0)
        right = logits.log_softmax(-1).gather(-1, batch["y"].unsqueeze(-1)).squeeze(-1)
        return -(right * batch["w"]).sum()

    def _present(self, logits: "Tensor", batch: Tensors) -> "Tensor":
        """Classes [classes] of the client, or of the rows of a batch that are no padding."""
        import torch

        if self.loss == "masked_client":
            return batch["classes"]
        each = batch["y"].unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
        return (each & (batch["w"] > 0).unsqueeze(-1)).any(0)

    def rng(self, purpose: str) -> Any:
        return rng(self.seed, self.round, self.client, purpose)


class Grad:
    """The gradient oracle given to `direction`: `grad()` at the current point, `grad(at | {...})` and
    `grad(at, batch)` elsewhere, `grad.value(at, batch)` for the loss alone."""

    def __init__(
        self,
        loss: "Callable[[Tensors, Batch], Tensor]",
        live: tuple[str, ...],
        here: Tensors | None,
        at: Tensors,
        batch: Batch,
    ):
        self._loss, self._live, self._here, self._at, self._batch = loss, live, here, at, batch
        self.asked = False

    def __call__(self, at: Tensors | None = None, batch: Batch | None = None) -> Tensors:
        if at is None and batch is None:
            assert self._here is not None, "grad() was not asked for in the first step"
            self.asked = True
            return self._here
        import torch

        point, data = self._at if at is None else at, self._batch if batch is None else batch

        def value(live: Tensors) -> "Tensor":
            return self._loss({**point, **live}, data)

        out: Tensors = torch.func.grad(value)({n: point[n] for n in self._live})
        return out

    def value(self, at: Tensors, batch: Batch | None = None) -> "Tensor":
        return self._loss(at, self._batch if batch is None else batch)


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
        heads = self.choose.chain.heads
        return tuple(u for u in self.units if u in heads or u == self.units[-1])

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


def with_margin(peak: int, margin: float) -> int:
    """Bytes a budget must have for a predicted peak: more by a share of it."""
    return int(peak * (1 + margin)) + 1 if margin else peak


def without_margin(budget: int, margin: float) -> int:
    """The largest peak whose bytes with margin a budget holds."""
    peak = int(budget / (1 + margin))
    return next(p for p in range(peak + 1, -2, -1) if with_margin(p, margin) <= budget)


@dataclass(frozen=True)
class RouteCtx:
    """Context of `route`: counts, the cohort's draw, and who takes part."""

    seed: int
    rounds: int
    clients: int
    size: int  # of the cohort
    h: dict[str, Any]

    def cohort(self, round: int) -> Iterable[int]:
        """Clients of a round, drawn from all clients without replacement, in ascending order."""
        chosen = rng(self.seed, round, None, "cohort").choice(self.clients, self.size, replace=False)
        return sorted(int(i) for i in chosen)
