"""What hooks are given: frozen views of the study, the round and the model. Nothing here decides anything."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpipe.rng import rng
from fedpipe.types import Batch, Phase, Plan, Tensors, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedpipe.kernels.common import Backend
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
