"""The study: what is run, typed. Nothing here says where or how; unknown keys are errors.

Importing this module loads neither torch nor datasets nor matplotlib: the Snakefile reads studies with it.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedpipe.budgets import Budgets
from fedpipe.io import canonical, digest
from fedpipe.keys import (
    NUMBER,
    Anchors,
    Backend,
    Claim,
    Data,
    Evaluate,
    Local,
    ModelSpec,
    Operation,
    Optimizer,
    Partition,
    Positive,
    Select,
    Share,
    Stop,
    Typed,
    as_model,
    for_all,
)
from fedpipe.methodspec import MethodSpec, named, points, replaced, setting_label

__all__ = ["Budgets", "Data", "Local", "ModelSpec", "Optimizer", "Partition", "Run", "Study"]


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class _Shared(Typed):
    """What a study and each of its runs have in common."""

    data: Data = Data()
    model: Annotated[ModelSpec, BeforeValidator(as_model)] = ModelSpec()
    rounds: Positive = 20
    cohort: Positive = Field(10, description="clients drawn per round, from all clients")
    availability: Share = Field(1.0, description="probability that a client that is drawn is there")
    dropout: Share = Field(0.0, description="probability that a client that has trained does not report back")
    local: Local = Local()
    budgets: Budgets = Budgets()
    budget: Annotated[Literal["enforce", "warn", "off"], BeforeValidator(_off)] = Field(
        "enforce",
        description="a plan or a measured client over its budget is an error; warn: it goes on, and the table marks it;"
        " off: budgets limit nothing",
    )
    evaluate: Evaluate = Evaluate()
    stop: Stop | None = Field(None, description="end a run early: {metric: accuracy, target: 0.9} or {patience: 3}")
    precision: Literal["float32", "float64", "bfloat16", "tf32"] = Field(
        "float32",
        description="bfloat16: parameters in float32, layers of the training in bfloat16; tf32: float32 whose matrix"
        " products and convolutions round their operands to 10 bits, on CUDA",
    )
    compile: bool = Field(False, description="compile captured steps with torch's inductor (other bits; takes a while)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stack: Literal["auto"] | Positive = Field(
        "auto", description="most clients trained as one batched program (decides bits); auto: by shapes and device"
    )
    threads: Positive = Field(1, description="threads of a job; part of the platform, as other counts give other bits")
    measure: Literal["witness", "all"] = Field("witness", description="whose peak memory is measured while training")
    kernels: Annotated[dict[Operation, Backend], BeforeValidator(for_all)] = Field(
        {}, description="auto: Triton on CUDA, plain torch elsewhere; reference: plain torch; or {topk: reference}"
    )
    margin: Annotated[float, Field(ge=0), NUMBER] = Field(
        0.05, description="share of a budget kept free above the predicted peak"
    )
    platform: Literal["same", "any"] = Field(
        "same", description="same: stop when a job lands on another platform than state 0's; any: mark it"
    )
    on_client_failure: Literal["stop", "drop"] = Field(
        "stop", description="a client that crashes, is over its budget or not finite; drop: left out of the mean"
    )

    @model_validator(mode="after")
    def _counts(self) -> "_Shared":
        clients = self.data.partition.clients
        self.budgets.limits(clients)
        if self.cohort > clients:
            raise ValueError(f"cohort: {self.cohort} clients a round, but data.partition.clients is {clients}")
        return self


class Study(_Shared):
    """A comparison: methods × settings × seeds on the same data, model and budgets."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    methods: Annotated[list[MethodSpec], BeforeValidator(named), Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, NUMBER]], Field(min_length=1)] = [0]
    paper: dict[str, Annotated[float, NUMBER]] = Field(
        {}, description="published accuracy by method, shown beside ours"
    )
    anchors: Anchors | None = Field(None, description="entries without whose order the table says nothing")
    claims: list[Claim] = Field([], description="published differences, tested by the table")
    select: Select | None = Field(None, description="tune grids on validation rows: {on: validation, seed: 0}")

    @model_validator(mode="after")
    def _distinct(self) -> "Study":
        labels = [setting_label(p) for m in self.methods for p in points(m)]
        listed: dict[str, list[Any]] = {"methods": labels, "seeds": self.seeds}
        for key, values in listed.items():
            if twice := [v for v in values if values.count(v) > 1]:
                raise ValueError(f"{key}: {twice[0]} stands there twice")
        return self

    @model_validator(mode="after")
    def _selectable(self) -> "Study":
        if self.select and not self.data.partition.val:
            raise ValueError("select: data.partition.val is 0; wanted a share of each client's rows to validate on")
        if self.select and self.seeds == [self.select.seed]:
            raise ValueError(f"select.seed: {self.select.seed} is the only one of seeds; wanted others to compare")
        return self

    @model_validator(mode="after")
    def _replaceable(self) -> "Study":
        for m in self.methods:
            try:
                _Shared.model_validate(self._of(m))
            except ValidationError as e:
                first = e.errors()[0]
                at = ".".join(str(p) for p in ("keys", *first["loc"]))
                raise ValueError(f"methods: {m.name}: {at}: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    def _of(self, method: MethodSpec) -> dict[str, Any]:
        """What an entry's runs share."""
        return replaced(method, {k: getattr(self, k) for k in _Shared.model_fields})

    @model_validator(mode="after")
    def _named_entries(self) -> "Study":
        labels = [setting_label(m) for m in self.entries]
        asked = [self.anchors.above, self.anchors.below, *self.anchors.others] if self.anchors else []
        for name in [*asked, *(n for c in self.claims for n in (c.method, *c.against))]:
            if name not in labels:
                raise ValueError(f"anchors, claims: no entry {name!r}; there are {', '.join(labels)}")
        return self

    @property
    def entries(self) -> list[MethodSpec]:
        """The methods that are compared: each point of a grid, or the grid where one of its points is selected."""
        return [p for m in self.methods for p in ([m] if self.select else points(m))]

    def tuning(self) -> list["Run"]:
        """Runs a point of each grid is selected by."""
        return list({c.id: c for r in self.compared() for c in r.candidates}.values())

    def compared(self) -> list["Run"]:
        """Runs the table is made of."""
        return [
            Run(**self._of(m), method=m, seed=s, select=self.select if points(m) != [m] else None)
            for m in self.entries
            for s in m.seeds or self.seeds
            if self.select is None or s != self.select.seed
        ]

    def runs(self) -> list["Run"]:
        """All runs, each after those it depends on."""
        return [*self.tuning(), *self.compared()]


class Run(_Shared):
    """One (method, setting, seed) of a study; its folder is named by its content."""

    method: MethodSpec
    seed: Annotated[int, NUMBER]
    select: Select | None = None
    selection: str | None = Field(None, description="where the values of the method's grids are written")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """The folder of a selection is named by all its candidates depend on, also in specs narrowed later."""
        if not isinstance(value, dict) or not value.get("select") or value.get("selection"):
            return value
        seed = Select.model_validate(value["select"]).seed
        return {**value, "selection": cls.model_validate({**value, "select": None, "seed": seed}).id}

    @property
    def spec(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def kernel(self, operation: Operation) -> Backend:
        """Which code an operation of `fedpipe.kernels` runs by."""
        return self.kernels.get(operation, "auto")

    @property
    def label(self) -> str:
        """The method and its settings, as tables name it."""
        return setting_label(self.method) + (" selected" if self.selection else "")

    @property
    def candidates(self) -> list["Run"]:
        """The runs, one per point of the grids, that this run's settings are selected by; none without `select`."""
        if self.select is None:
            return []
        return [self.but(method=p, seed=self.select.seed, select=None, selection=None) for p in points(self.method)]

    def but(self, **changes: Any) -> "Run":
        """The run with other values of some keys."""
        return Run(**{k: getattr(self, k) for k in Run.model_fields} | changes)

    @cached_property
    def id(self) -> str:
        stem = re.sub(r"[^A-Za-z0-9_]+", "-", Path(self.method.name.split(":")[0]).stem)
        return f"{stem}-s{self.seed}-{digest(canonical(self.spec))}"

    @property
    def evaluations(self) -> list[int]:
        """Rounds whose server state is evaluated on the pooled test rows: 0, every so many, the last, every look."""
        every = self.evaluate.every or max(1, self.rounds // 20)
        looks = range(0, self.rounds + 1, self.stop.every) if self.stop and self.stop.every else ()
        return sorted({*range(0, self.rounds + 1, every), self.rounds, *looks})

    @property
    def looks(self) -> list[int]:
        """Rounds at which `stop` is looked at; none of them is 0."""
        if self.stop is None:
            return []
        every = self.stop.every
        return [t for t in self.evaluations if t and (every is None or t % every == 0)]
