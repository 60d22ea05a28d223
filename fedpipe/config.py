"""The study: what is run, typed. Nothing here says where or how; unknown keys are errors.

Importing this module loads neither torch nor datasets nor matplotlib: the Snakefile reads studies with it.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedpipe.io import canonical, digest
from fedpipe.methodspec import MethodSpec, named, points, setting_label

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int) -> int:
    """Bytes of `5MiB`, `1.5 GB` or a plain number."""
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write bytes, or a number with one of KiB MiB GiB KB MB GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _bytes_keys(value: Any) -> Any:
    return {parse_bytes(k): v for k, v in value.items()} if isinstance(value, dict) else value


def _ascending(value: dict[Any, int]) -> dict[Any, int]:
    """JSON sorts keys as text: only an order of the values themselves survives a file."""
    return dict(sorted(value.items()))


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("wanted a number")  # to Python and to pydantic, true is 1
    return value


NUMBER = BeforeValidator(_number)
Positive = Annotated[int, Field(ge=1), NUMBER]
Width = Annotated[float, Field(gt=0, le=1), NUMBER]
Backend = Literal["auto", "reference"]
Operation = Literal["step", "topk", "bits", "sparse", "aggregate", "norm"]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]


def _for_all(value: Any) -> Any:
    """One word is of every operation."""
    return dict.fromkeys(get_args(Operation), value) if isinstance(value, str) else value


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Partition(_Typed):
    """How training rows are given to clients; `val` of each client's rows are set aside for validation."""

    kind: str = Field(
        "dirichlet",
        description="iid, dirichlet, dir, balanced-dir, shards, natural, or the class path of a Flower partitioner",
    )
    clients: Positive = 10
    alpha: Annotated[float, Field(gt=0), NUMBER] = 0.3
    shards: Positive = Field(2, description="shards per client (kind: shards)")
    min_samples: Positive = Field(2, description="every client gets at least so many rows")
    column: str | None = Field(None, description="column of natural client ids (kind: natural)")
    val: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    settings: dict[str, Any] = Field({}, description="keywords of a partitioner given by class path")


class Data(_Typed):
    """Which rows: `digits` (embedded), a Hugging Face id, or a folder of that name under FEDPIPE_DATA."""

    name: str = "digits"
    image: str | None = Field(None, description="column of images; found by its type when absent")
    label: str | None = Field(None, description="column of class labels; found by its type when absent")
    train: str = Field("train", description="split to train on")
    test: str | None = Field("test", description="split to test on; null: a fifth of the training rows, drawn by class")
    rows: Positive | None = Field(
        None, description="use only so many training rows (and a fifth as many test rows), drawn by class"
    )
    size: Positive | None = Field(None, description="side in pixels images are brought to; digits: 16")
    partition: Partition = Partition()


class Optimizer(_Typed):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0), NUMBER] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    weight_decay: Annotated[float, Field(ge=0), NUMBER] = 0.0


class Local(_Typed):
    epochs: Positive = 1
    batch: Positive = 32
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate over rounds")
    levels: dict[str, Annotated[int, Field(ge=0), NUMBER]] = Field(
        {}, description="how much units build again in the backward instead of saving it: {'b*': 1}"
    )
    again: list[tuple[str, str]] = Field(
        [], description="ranges of units, first and last, that run again in the backward: [[b1, b3]]"
    )


class Budgets(_Typed):
    """Clients per budget: the first clients have the smallest, however the keys are ordered. No key: no limits."""

    bytes: Annotated[dict[Positive, Positive], BeforeValidator(_bytes_keys), AfterValidator(_ascending)] | None = Field(
        None, description="{5MiB: 10, ...}"
    )
    like_width: Annotated[dict[Width, Positive], AfterValidator(_ascending)] | None = Field(
        None, description="what training the width-r model needs: {0.5: 10, ...}"
    )

    @model_validator(mode="after")
    def _one(self) -> "Budgets":
        if self.bytes and self.like_width:
            raise ValueError("give bytes or like_width, not both")
        return self

    @property
    def counts(self) -> list[int]:
        return list((self.bytes or self.like_width or {}).values())


class Evaluate(_Typed):
    every: Positive | None = Field(
        None, description="rounds between evaluations of the server's model; default: 20 points in a run"
    )
    batch: Positive = 100


class Stop(_Typed):
    """When a run ends early: looked at only at fixed rounds of its curve, so that no way of running changes it.

    The metric is that of the clients' validation rows where data.partition.val sets some aside, else of the test rows.
    """

    metric: Literal["accuracy", "loss"] = "accuracy"
    target: Annotated[float, NUMBER] | None = Field(None, description="stop once it is reached")
    patience: Positive | None = Field(None, description="stop after so many looks without a better value")
    every: Positive | None = Field(None, description="rounds between looks; default: every evaluation")

    @model_validator(mode="after")
    def _one(self) -> "Stop":
        if (self.target is None) == (self.patience is None):
            raise ValueError("wanted one of target and patience")
        if self.target is not None and (self.target < 0 or (self.metric == "accuracy" and self.target > 1)):
            raise ValueError(f"target: wanted {'an accuracy in 0..1' if self.metric == 'accuracy' else 'a loss >= 0'}")
        return self


class ModelSpec(BaseModel):
    """A network by name, or `./file.py:function`; further keys go to the function that builds it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "preresnet20"


def _model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Select(_Typed):
    """Grids are tuned at one seed, by the clients' validation rows alone; the study compares the other seeds."""

    on: Literal["validation"] = "validation"
    seed: Annotated[int, NUMBER] = Field(0, description="the seed grids are tuned at; not one of the comparison's")


class _Shared(_Typed):
    """What a study and each of its runs have in common."""

    data: Data = Data()
    model: Annotated[ModelSpec, BeforeValidator(_model)] = ModelSpec()
    rounds: Positive = 20
    cohort: Positive = Field(10, description="clients drawn per round, from all clients")
    availability: Share = Field(1.0, description="probability that a client that is drawn is there")
    dropout: Share = Field(0.0, description="probability that a client that has trained does not report back")
    local: Local = Local()
    budgets: Budgets = Budgets()
    evaluate: Evaluate = Evaluate()
    stop: Stop | None = Field(None, description="end a run early: {metric: accuracy, target: 0.9} or {patience: 3}")
    precision: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stack: Literal["auto"] | Positive = Field(
        "auto", description="most clients trained as one batched program (decides bits); auto: by shapes and device"
    )
    threads: Positive = Field(1, description="threads of a job; part of the platform, as other counts give other bits")
    measure: Literal["witness", "all"] = Field("witness", description="whose peak memory is measured while training")
    kernels: Annotated[dict[Operation, Backend], BeforeValidator(_for_all)] = Field(
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
        clients, counts = self.data.partition.clients, self.budgets.counts
        if counts and sum(counts) != clients:
            raise ValueError(
                f"budgets: clients per budget add up to {sum(counts)}, data.partition.clients is {clients}"
            )
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

    @property
    def entries(self) -> list[MethodSpec]:
        """The methods that are compared: each point of a grid, or the grid where one of its points is selected."""
        return [p for m in self.methods for p in ([m] if self.select else points(m))]

    def tuning(self) -> list["Run"]:
        """Runs a point of each grid is selected by."""
        return list({c.id: c for r in self.compared() for c in r.candidates}.values())

    def compared(self) -> list["Run"]:
        """Runs the table is made of."""
        shared = {k: getattr(self, k) for k in _Shared.model_fields}
        return [
            Run(**shared, method=m, seed=s, select=self.select if points(m) != [m] else None)
            for m in self.entries
            for s in self.seeds
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
