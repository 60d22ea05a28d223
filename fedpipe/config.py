"""The study: what is run, typed. Nothing here says where or how; unknown keys are errors.

Importing this module loads neither torch nor datasets nor matplotlib: the Snakefile reads studies with it.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedpipe.io import canonical, digest

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


class ModelSpec(BaseModel):
    """A network by name, or `./file.py:function`; further keys go to the function that builds it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "preresnet20"


def _model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class MethodSpec(_Typed):
    """A method by name, or `./file.py:record`, and the settings that replace its defaults."""

    name: str
    settings: dict[str, Any] = {}


def _methods(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    out = []
    for item in value:
        if isinstance(item, dict) and len(item) == 1 and "name" not in item:
            ((name, settings),) = item.items()
            out.append({"name": name, "settings": settings or {}})
        else:
            out.append({"name": item} if isinstance(item, str) else item)
    return out


class _Shared(_Typed):
    """What a study and each of its runs have in common."""

    data: Data = Data()
    model: Annotated[ModelSpec, BeforeValidator(_model)] = ModelSpec()
    rounds: Positive = 20
    cohort: Positive = Field(10, description="clients drawn per round, from all clients")
    local: Local = Local()
    budgets: Budgets = Budgets()
    evaluate: Evaluate = Evaluate()
    precision: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stack: Literal["auto"] | Positive = Field(
        "auto", description="most clients trained as one batched program (decides bits); auto: by shapes and device"
    )
    threads: Positive = Field(1, description="threads of a job; part of the platform, as other counts give other bits")
    measure: Literal["witness", "all"] = Field("witness", description="whose peak memory is measured while training")
    margin: Annotated[float, Field(ge=0), NUMBER] = Field(
        0.05, description="share of a budget kept free above the predicted peak"
    )
    platform: Literal["same", "any"] = Field(
        "same", description="same: stop when a job lands on another platform than state 0's; any: mark it"
    )
    on_client_failure: Literal["stop", "drop"] = "stop"

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
    methods: Annotated[list[MethodSpec], BeforeValidator(_methods), Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, NUMBER]], Field(min_length=1)] = [0]
    paper: dict[str, Annotated[float, NUMBER]] = Field(
        {}, description="published accuracy by method, shown beside ours"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Study":
        listed: dict[str, list[Any]] = {"methods": [setting_label(m) for m in self.methods], "seeds": self.seeds}
        for key, values in listed.items():
            if twice := [v for v in values if values.count(v) > 1]:
                raise ValueError(f"{key}: {twice[0]} stands there twice")
        return self

    def runs(self) -> list["Run"]:
        shared = {k: getattr(self, k) for k in _Shared.model_fields}
        return [Run(**shared, method=m, seed=s) for m in self.methods for s in self.seeds]


class Run(_Shared):
    """One (method, setting, seed) of a study; its folder is named by its content."""

    method: MethodSpec
    seed: Annotated[int, NUMBER]

    @property
    def spec(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def label(self) -> str:
        """The method and its settings, as tables name it."""
        return setting_label(self.method)

    @property
    def id(self) -> str:
        stem = re.sub(r"[^A-Za-z0-9_]+", "-", Path(self.method.name.split(":")[0]).stem)
        return f"{stem}-s{self.seed}-{digest(canonical(self.spec))}"

    @property
    def evaluations(self) -> list[int]:
        """Rounds whose server state is evaluated on the pooled test rows: 0, every so many, the last."""
        every = self.evaluate.every or max(1, self.rounds // 20)
        return sorted({*range(0, self.rounds + 1, every), self.rounds})


def setting_label(method: MethodSpec) -> str:
    file, _, record = method.name.partition(":")
    short = Path(file).stem + (f":{record}" if record not in ("", "method") else "")
    settings = ", ".join(f"{k}={v}" for k, v in sorted(method.settings.items()))
    return f"{short} ({settings})" if settings else short
