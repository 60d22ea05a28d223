"""The keys of a study by groups: what is trained on, how, how it is judged. `budgets` and `config` hold the others."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("wanted a number")  # to Python and to pydantic, true is 1
    return value


NUMBER = BeforeValidator(_number)
Positive = Annotated[int, Field(ge=1), NUMBER]
Backend = Literal["auto", "reference"]
Operation = Literal["step", "topk", "bits", "sparse", "aggregate", "norm"]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]


def for_all(value: Any) -> Any:
    """One word is of every operation."""
    return dict.fromkeys(get_args(Operation), value) if isinstance(value, str) else value


class Typed(BaseModel):
    """A group of keys; others than its own are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Partition(Typed):
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


class Data(Typed):
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


class Optimizer(Typed):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0), NUMBER] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    weight_decay: Annotated[float, Field(ge=0), NUMBER] = 0.0


class Local(Typed):
    epochs: Positive = 1
    batch: Positive = 32
    optimizer: Optimizer = Optimizer()
    steps: Positive | None = Field(
        None, description="instead of epochs: steps of a client in a round, shared out among the phases of its plan"
    )
    batches: Literal["redraw", "fixed"] = Field(
        "redraw",
        description="fixed: who is in a batch with whom is drawn once per client and round, then only the order",
    )
    prefix: Literal["keep", "run"] = Field(
        "keep",
        description="keep: with fixed batches the output of units that are frozen is made once per phase, where"
        " the budget holds it; run: it is made for every batch",
    )
    loss: Literal["plain", "masked_batch", "masked_client"] = Field(
        "plain",
        description="cross-entropy; masked: logits of classes that the batch, or the client's training rows, lack"
        " are 0",
    )
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate over rounds")
    levels: dict[str, Annotated[int, Field(ge=0), NUMBER]] = Field(
        {}, description="how much units build again in the backward instead of saving it: {'b*': 1}"
    )
    again: list[tuple[str, str]] = Field(
        [], description="ranges of units, first and last, that run again in the backward: [[b1, b3]]"
    )
    recompute: Literal["given", "auto"] = Field(
        "given", description="auto: as little runs again as the budget takes; levels and again must then be empty"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Local":
        if self.recompute == "auto" and (self.levels or self.again):
            raise ValueError("recompute: auto chooses levels and again by itself; wanted neither beside it")
        return self


class Evaluate(Typed):
    every: Positive | None = Field(
        None, description="rounds between evaluations of the server's model; default: 20 points in a run"
    )
    batch: Positive | None = Field(
        None,
        description="rows at a time; default: 100, or 32 on a CPU with convolutions and no batch norm: a third of the"
        " memory",
    )
    norm: Literal["batch", "train"] = Field(
        "batch",
        description="batch norms that keep no statistics: by each batch's own, or by those of the training rows (of the"
        " client's own for its own model), which a real server does not see",
    )


class Anchors(Typed):
    """Entries that a table stands between, by label: it says that it is void unless `above` is more than two standard
    errors of paired differences above `below`, and none of `others` is that far below it."""

    above: str
    below: str
    others: list[str] = []


class Claim(Typed):
    """A published difference: what a table says of a method and the best of others, by label, beside it."""

    method: str
    against: Annotated[list[str], Field(min_length=1)]
    published: str = Field(description="in words, with its source: more than +5 points (arXiv ...)")


class Stop(Typed):
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
    weights: str | None = Field(
        None,
        description="what gives first values: a safetensors file, the output folder of a study of one run (its last"
        " state), or a hub id <org>/<name> (its model.safetensors); heads may be others",
    )


def as_model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Select(Typed):
    """Grids are tuned at one seed, by the clients' validation rows alone; the study compares the other seeds."""

    on: Literal["validation"] = "validation"
    seed: Annotated[int, NUMBER] = Field(0, description="the seed grids are tuned at; not one of the comparison's")
