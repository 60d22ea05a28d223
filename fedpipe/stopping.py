"""Whether a run stops early: a function of its curve at the rounds `Run.looks`, handed on in the states' metadata."""

from dataclasses import dataclass, replace
from typing import Any

from fedpipe.config import Run
from fedpipe.errors import FedpipeError


@dataclass(frozen=True)
class Watch:
    """What `stop` has seen: the best value so far, looks since without a better one, the round it stopped at."""

    best: float | None = None
    since: int = 0
    stopped: int | None = None


def look(watch: Watch, run: Run, point: dict[str, Any]) -> Watch:
    """The watch after a point of the curve. Points of other rounds than `Run.looks` leave it as it is.

    Validation rows decide where the study has some (`data.partition.val`), else the pooled test rows: the latter
    suits counting what a target costs; an accuracy reported after patience on them is flattered.
    """
    if run.stop is None or watch.stopped is not None or point["round"] not in run.looks:
        return watch
    name = f"val_{run.stop.metric}" if run.data.partition.val else run.stop.metric
    if name not in point:
        raise FedpipeError(f"stop: data.partition.val: {run.data.partition.val} leaves no client a validation row")
    value = point[name]
    sign = -1 if run.stop.metric == "loss" else 1
    better = watch.best is None or sign * value > sign * watch.best
    new = replace(watch, best=value, since=0) if better else replace(watch, since=watch.since + 1)
    if run.stop.target is not None:
        met = sign * value >= sign * run.stop.target
    else:
        met = run.stop.patience is not None and new.since >= run.stop.patience
    return replace(new, stopped=point["round"]) if met else new
