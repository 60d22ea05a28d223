"""The nouns. Everything here is plain data or a function type; nothing does any work.

Tensors are known by name, `namespace/.../parameter`. Namespaces of a state: `model/* server/* mask/*`; of a client's
working names: `in/*` received, `re/*` reply, `own/*` survives on the client, `model/*` worked on, `tmp/*` this round.
`own in re tmp` never leave the client.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedpipe.context import Ctx, RouteCtx
    from fedpipe.planning import PlanCtx

Tensors = dict[str, "Tensor"]
Patterns = tuple[str, ...]
PRIVATE = ("own/", "in/", "re/", "tmp/")


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a name is chosen by patterns read in order; `!pattern` takes names away again."""
    chosen = False
    for p in patterns:
        away = p.startswith("!")
        if chosen == away and fnmatchcase(name, p[away:]):
            chosen = not away
    return chosen


def select(tensors: Tensors, patterns: Patterns) -> Tensors:
    """The named tensors chosen by patterns, in the order of `tensors`."""
    return {n: t for n, t in tensors.items() if matches(n, patterns)}


def under(tensors: Tensors, prefix: str, new: str = "") -> Tensors:
    """The tensors below a prefix, with that prefix replaced by `new`."""
    return {new + n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Window:
    """Entries `start .. stop` (exclusive) of one dimension of a tensor a client holds; `stop > size` wraps round."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """A local step as data: x <- m (x - lr (g - h + mu (x - anchor))), g what `direction` gives, or the gradient.

    Of a live name `model/fc.weight` the pattern `own/h/*` means `own/h/fc.weight`, or `own/h/model/fc.weight` where
    that is there. Variate h and anchor are needed for every live name; a live name without a mask (bool, of its shape)
    is whole. Names received are held only if `Plan.hold` says so. Momentum and weight decay follow: SGD's.
    """

    mask: str | None = None
    variate: str | None = None
    anchor: str | None = None
    mu: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", float(self.mu))  # equal plans, equal text


@dataclass(frozen=True)
class Phase:
    """One stretch of local training: which names are live, for how long, how far the forward runs, on which data."""

    name: str = "train"
    live: Patterns = ("model/*",)
    still: Patterns = ()  # of the live names, those whose gradient is 0: they move by momentum and weight decay alone
    epochs: int | None = None  # None: the study's local.epochs
    steps: int | None = None  # instead of epochs
    data: str = "train"
    upto: str | None = None  # the last unit that runs; None: all
    since: str | None = None  # the unit, of those before the first that trains, whose output is made once and kept
    kept: int = 0  # of how many samples at most that output is kept
    lr: float = 1.0  # factor on the round's learning rate
    carry: bool = False  # optimizer state of names that stay live goes on into the client's next phase
    step: Step | None = None  # None: the optimizer's
    levels: tuple[tuple[str, int], ...] = ()  # (units, level of recomputation); with `again` empty: the study's
    again: tuple[tuple[str, str], ...] = ()  # ranges of units, first and last, that run again in the backward


@dataclass(frozen=True)
class Plan:
    """What a client receives, holds, trains, sends and keeps. Plain data, made from the client's row."""

    phases: tuple[Phase, ...] = (Phase(),)
    down: Patterns = ("model/*",)  # names of the start state that are sent to the client
    fixed: Patterns = ()  # names of state 0 both sides derive from the seed: never sent, never moved
    up: Patterns = ("model/*",)  # names sent back
    hold: Patterns = ()  # received names (`in/*`, `re/*`) still read after `begin`; the others are freed
    keep: Patterns = ()  # `own/*` names that survive on the client
    reply: Patterns = ()  # names of the state made from the client's last update, needed by `begin` as `re/*`
    index: tuple[Window, ...] = ()  # what part of each tensor is held
    model: tuple[tuple[str, Any], ...] = ()  # keywords for building the client's model (width=...)
    weight: str = "samples"  # or "one": its weight in the mean


@dataclass(frozen=True)
class Row:
    """What a plan may depend on. Equal rows give equal plans."""

    budget: int | None  # bytes; None: no limit, or one that is not kept (`budget: off`)
    samples: int  # training samples
    modalities: Patterns = ()
    speed: float = 1.0
    ratio: float | None = None  # the width or fraction the budget is named after, else its part of what all needs


@dataclass(frozen=True)
class Train:
    """A client's local training: round, client, the state it starts from. The engine adds plan, group, own, reply."""

    round: int
    client: int
    start: str  # "node@version"
    part: str = ""

    @property
    def id(self) -> str:
        """Name of this row's update within its round: "client", or "client:part"."""
        return f"{self.client}:{self.part}" if self.part else str(self.client)


@dataclass(frozen=True)
class Mix:
    """A node's next state: made from `base`, the updates of the named Train rows of this round, and other states; where
    none of these come it is the base."""

    round: int
    out: str  # "node@version"
    base: str
    updates: tuple[str, ...]  # ids of Train rows
    owner: str = "server"
    states: tuple[str, ...] = ()  # "node@version", made before this row


@dataclass
class Update:
    """What came from one client: named tensors, the part of them it holds, its weight in the mean."""

    client: int
    weight: float
    samples: int
    tensors: Tensors
    index: tuple[Window, ...] = ()


# x, y, and w: weights that sum to 1, 0 on padding; with `local.loss: masked_client` classes: which the client has
Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class Method:
    """A federated method: pure functions, each `None` where FedAvg's default serves.

    h          hyper-parameters with their defaults; a study's settings replace them. A tuple: all that one may be, the
               default first
    by_round   the plan reads `ctx.round`
    model      keywords that the study's network is built with for this method: `{"exits": True}`; or a function of `h`
    plan       (ctx: PlanCtx) -> Plan | None: None when the client's budget is too small to take part
    route      (ctx: RouteCtx) -> rows in order of rounds; every round makes a next state of the node `server`, where
               there is one: it is what is evaluated
    fill       (ctx) -> what each `{word}` in the patterns of `Plan.down` stands for, of one client in one round
    init       (model, ctx) -> state 0, given its `model/*`; `ctx.fresh(purpose)` draws the model's values again
    begin      (at, ctx) -> names worked on, from `in/* re/* own/*`; once per client and round
    draw       (gen, at, batch, ctx) -> every random tensor a step needs; outside vmap
    loss       (at, batch, ctx) -> value, or (value, names it changed); or a dict of such, by the names of phases
    direction  (grad, at, batch, ctx) -> (d per live name, other names changed)
    end        (at, ctx) -> (sent besides plan.up, own/* kept)
    aggregate  (state, updates, ctx) -> next state; updates arrive one by one and can be read once
    finish     (ctx: PlanCtx) -> Plan | None: trained at evaluation, by the same loop
    predict    (at, batch, ctx) -> {"global": logits, "personal": logits, ...}
    """

    name: str = ""  # its file's, given when it is loaded
    h: dict[str, Any] = field(default_factory=dict)
    model: "dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]" = field(default_factory=dict)
    by_round: bool = False
    plan: "Callable[[PlanCtx], Plan | None] | None" = None
    route: "Callable[[RouteCtx], Iterator[Train | Mix]] | None" = None
    fill: "Callable[[Ctx], dict[str, str]] | None" = None
    init: "Callable[[Tensors, Ctx], Tensors] | None" = None
    begin: "Callable[[Tensors, Ctx], Tensors] | None" = None
    draw: "Callable[[np.random.Generator, Tensors, Batch, Ctx], Tensors] | None" = None
    loss: "Callable[[Tensors, Batch, Ctx], Any] | dict[str, Callable[[Tensors, Batch, Ctx], Any]] | None" = None
    direction: "Callable[..., tuple[Tensors, Tensors]] | None" = None
    end: "Callable[[Tensors, Ctx], tuple[Tensors, Tensors]] | None" = None
    aggregate: "Callable[[Tensors, Iterable[Update], Ctx], Tensors] | None" = None
    finish: "Callable[[PlanCtx], Plan | None] | None" = None
    predict: "Callable[[Tensors, Batch, Ctx], Tensors] | None" = None

    @property
    def built(self) -> dict[str, Any]:
        """Keywords that the study's network is built with."""
        return self.model(self.h) if callable(self.model) else self.model

    def loss_in(self, phase: Phase) -> "Callable[[Tensors, Batch, Ctx], Any] | None":
        """The loss of a phase; None: the default."""
        return self.loss.get(phase.name) if isinstance(self.loss, dict) else self.loss
