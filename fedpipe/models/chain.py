"""A model is a chain of named units: a stem, units, a head. It can stop early: the features of any unit reach the head
through a link without parameters (`link`). A unit with `exits = True` takes `every=k` in its forward and gives only
every k-th pixel of its output, as if taken of all: before a link that keeps no others, these are never computed.
Units may have a head of their own, an exit, which stands in the place of link and head where the chain stops there; a
head whose `behind(shape)` makes another for features of that shape can give one to each."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe.errors import FedpipeError
from fedpipe.models import link
from fedpipe.models.dropout import own_dropout
from fedpipe.recompute import Policy, again
from fedpipe.seeding import seeded

Units = Sequence[tuple[str, nn.Module]]
Shape = tuple[int, int, int]


class Chain(nn.Module):
    """Named modules run in order: the first is the stem, the last the head. Parameters are named `<unit>.<parameter>`.

    `shape` is one image's (channels, height, width). `names` holds all units in order, `tensor_names` the parameters
    and buffers of the state, `buffer_names` the buffers alone; `shapes` one sample's output of each unit but the
    head, `features` the last of these. exits: by unit the head of its own; `heads` names it, `exit_<unit>`.
    Raises FedpipeError for unit names that are not distinct identifiers, or fewer than two units.
    """

    def __init__(self, units: Units, shape: Shape, exits: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in units)
        self.shape: Shape = shape[0], shape[1], shape[2]
        self.heads = {unit: f"exit_{unit}" for unit in exits or {}}
        if len(units) < 2:
            raise FedpipeError("a model needs a stem and a head at least, as [(name, module), ...]")
        for name, module in (*units, *((self.heads[u], m) for u, m in (exits or {}).items())):
            if not name.isidentifier() or hasattr(self, name):
                raise FedpipeError(
                    f"unit name {name!r}: wanted distinct names of letters, digits and _, none of torch's own"
                )
            self.add_module(name, module)
        self.noise = own_dropout(self)
        self.key: Hashable = None  # what it was built from: chains of equal keys do the same
        self.tensor_names = tuple(self.state_dict())
        self.buffer_names = tuple(n for n, _ in self.named_buffers() if n in self.tensor_names)
        self.shapes = self._probe()
        self.features = self.shapes[self.names[-2]]

    @torch.no_grad()
    def _probe(self) -> dict[str, link.Shape]:
        """The shape of one sample behind each unit but the head, from two zero images in evaluation mode."""
        at = next((p.device for p in self.parameters()), torch.device("cpu"))
        modes = {m: m.training for m in self.modules()}
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        self.eval()
        x = torch.zeros(2, *self.shape, device=at, dtype=dtype)
        name, found = self.names[0], dict[str, link.Shape]()
        try:
            with seeded(0):
                for name in self.names[:-1]:
                    x = self._modules[name](x)  # type: ignore[misc]
                    found[name] = tuple(x.shape[1:])
                if self.noise:  # whose layers learn their shapes
                    self._modules[self.names[-1]](x)  # type: ignore[misc]
        except (RuntimeError, ValueError) as e:
            raise FedpipeError(f"unit {name} does not take the output before it: {' '.join(str(e).split())}") from e
        finally:
            for module, mode in modes.items():
                module.training = mode
        return found

    def forward(
        self,
        x: Tensor,
        upto: str | None = None,
        policy: Policy | None = None,
        since: str | None = None,
        head: bool = True,
        every: int | None = None,
        ends: Sequence[str] = (),
    ) -> Tensor | list[Tensor]:
        """Logits [batch, classes] of images [batch, C, H, W]; units after `upto` do not run (None: all run).

        since: x is that unit's output, and the units behind it run; head=False: the result is the last unit's output.
        every: of the pixels of that output only every k-th; None: what the link keeps, and all without a head.
        ends: units in order; the result is a list of the logits behind each, and those after the last do not run.
        """
        if ends:
            return self._exits(x, ends, policy)
        units = list(self.run_units(upto)[:-1])
        last = units[-1]
        del units[: units.index(since) + 1 if since else 0]
        every = every or (self.every(last) if head else 1)
        while units:
            end = policy.end(units[0]) if policy else None
            count = units.index(end) + 1 if end in units else len(units) if end else 1
            k = every if count == len(units) else 1
            x = self._again(units[:count], x, k) if end else self._unit(units[0], x, policy, k)
            del units[:count]
        return self._logits(x, last) if head else x

    def _logits(self, x: Tensor, unit: str) -> Tensor:
        own = self.heads.get(unit)
        out: Tensor = self._modules[own](x) if own else self._modules[self.names[-1]](self.link(x, unit))  # type: ignore[misc]
        return out

    def _exits(self, x: Tensor, ends: Sequence[str], policy: Policy | None) -> list[Tensor]:
        out, since = list[Tensor](), None
        for unit in ends:
            self.run_units(unit)
            x = self.forward(x, unit, policy, since, head=False)  # type: ignore[assignment]
            out.append(self._logits(x, unit))
            since = unit
        return out

    @property
    def ends(self) -> tuple[str, ...]:
        """The units with a head of their own behind them, and the last, in order."""
        return tuple(u for u in self.names[1:-1] if u in self.heads or u == self.names[-2])

    @property
    def alike(self) -> tuple[tuple[str, ...], ...]:
        """Units in order, those together that follow each other and have tensors of the same names and shapes."""
        kinds = {n: [(k, t.shape) for k, t in self.get_submodule(n).state_dict().items()] for n in self.names[1:-1]}
        return tuple(tuple(run) for _, run in groupby(kinds, key=kinds.__getitem__))

    def head_of(self, unit: str) -> str:
        """The head that the chain ends with where it stops at a unit."""
        return self.heads.get(unit, self.names[-1])

    def run_units(self, upto: str | None) -> tuple[str, ...]:
        """The units that run when those after `upto` do not: up to it, and the head."""
        if upto is not None and upto not in self.names:
            raise FedpipeError(f"upto: no unit {upto}; units are {', '.join(self.names)}")
        body = self.names[:-1]
        units = body[: body.index(upto) + 1 if upto in body else None]
        return (*units, self.head_of(units[-1]))

    def every(self, unit: str) -> int:
        """k where the link keeps every k-th pixel of a unit's output and the unit can give these alone; else 1."""
        thin = getattr(self.get_submodule(unit), "exits", False) and unit not in self.heads
        return link.kept(self.shapes[unit], self.features) if thin else 1

    def _unit(self, name: str, x: Tensor, policy: Policy | None, every: int) -> Tensor:
        words: dict[str, Any] = {"every": every} if every > 1 else {}
        if policy and policy.level(name):
            words |= {"level": policy.level(name), "backend": policy.backend}
        out: Tensor = self._modules[name](x, **words)  # type: ignore[misc]
        return out

    def _again(self, names: Sequence[str], x: Tensor, every: int) -> Tensor:
        """Units that run again in the backward; their buffers change once, by what the forward made of copies."""
        units = [self.get_submodule(n) for n in names]
        parts = [[*u.named_parameters()] for u in units]
        states = [[(n, b) for n, b in u.named_buffers()] for u in units]

        def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given, changed = iter(tensors), list[Tensor]()
            for unit, part, state in zip(units, parts, states, strict=True):
                values = {n: next(given) for n, _ in part}
                copies = {n: next(given).clone() for n, _ in state}
                words = {"every": every} if every > 1 and unit is units[-1] else {}
                x = torch.func.functional_call(unit, {**values, **copies}, (x,), words)
                changed += copies.values()
            return x, *changed

        pairs = zip(parts, states, strict=True)
        # buffers are given as copies: what is saved of them must not change with them
        own = (t for part, state in pairs for t in [*(p for _, p in part), *(b.clone() for _, b in state)])
        x, *changed = again(run, x, *own)
        with torch.no_grad():
            for (_, buffer), new in zip((b for state in states for b in state), changed, strict=True):
                buffer.copy_(new)
        return x

    def link(self, x: Tensor, unit: str) -> Tensor:
        """The output of `unit`, or the pixels of it that are kept, as the head takes it (`link.link`)."""
        return link.link(x, self.features, unit)
