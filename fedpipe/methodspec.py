"""The methods a study names: their settings, grids of these, and how tables call them."""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BESIDE = {"keys", "label", "seeds"}


class MethodSpec(BaseModel):
    """A method by name, or `./file.py:record`, and the settings that replace its defaults.

    In a study, `{grid: [a, b]}` as the value of a setting stands for one entry per value; a plain list is a value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    settings: dict[str, Any] = {}
    label: str | None = Field(None, description="how tables name the entry; default: the method, its settings and keys")
    keys: dict[Literal["data", "model", "cohort", "local", "budgets", "evaluate"], Any] = Field(
        {}, description="keys of the study that this entry has in place of the study's: {local: {epochs: 5}}"
    )
    seeds: list[Annotated[int, Field(strict=True)]] | None = Field(
        None, description="instead of the study's", min_length=1
    )


def named(value: Any) -> Any:
    """A study's list of methods as names with settings: `fedavg`, `{fedprox: {mu: 1}}` and `{name: fedprox}` alike;
    what else an entry has stands beside: `{fedavg: {}, keys: {local: {epochs: 5}}}`."""
    if not isinstance(value, list):
        return value
    out = []
    for item in value:
        if isinstance(item, dict) and "name" not in item and len(item.keys() - BESIDE) == 1:
            ((name, settings),) = ((k, v) for k, v in item.items() if k not in BESIDE)
            beside = {k: v for k, v in item.items() if k in BESIDE}
            out.append({"name": name, "settings": settings or {}, **beside})
        else:
            out.append({"name": item} if isinstance(item, str) else item)
    return out


def points(method: MethodSpec) -> list[MethodSpec]:
    """One method per point of its grids: their product, the last grid varying fastest. Without a grid, itself."""
    grids = {
        k: _grid(f"{method.name}.{k}", v) for k, v in method.settings.items() if isinstance(v, dict) and "grid" in v
    }
    chosen = (dict(zip(grids, p, strict=True)) for p in itertools.product(*grids.values()))
    return [method.model_copy(update={"settings": method.settings | c}) for c in chosen]


def replaced(method: MethodSpec, shared: dict[str, Any]) -> dict[str, Any]:
    """The keys of a study with a method's own in their place; what a group does not name stays, but of `budgets`."""
    out: dict[str, Any] = dict(shared)
    for key, value in method.keys.items():
        out[key] = value if key == "budgets" else merged(shared[key], value)
    return out


def merged(group: Any, value: Any) -> Any:
    """A group of keys with those of `value` in their place; another kind of group, or no group, is replaced whole."""
    if not isinstance(group, BaseModel) or not isinstance(value, dict):
        return value
    old = {k: getattr(group, k) for k in type(group).model_fields}
    if "name" in value and value["name"] != old.get("name"):
        return value
    return old | {k: merged(old.get(k), v) for k, v in value.items()}


def _grid(at: str, value: dict[str, Any]) -> list[Any]:
    if len(value) > 1:
        raise ValueError(f"methods: {at}: {sorted(value.keys() - {'grid'})[0]} stands beside grid; wanted grid alone")
    if not isinstance(value["grid"], list) or not value["grid"]:
        raise ValueError(f"methods: {at}.grid: wanted a list of values, at least one")
    return value["grid"]


def setting_label(method: MethodSpec) -> str:
    """A method, its settings and its keys, as tables name it."""
    if method.label:
        return method.label
    file, _, record = method.name.partition(":")
    short = Path(file).stem + (f":{record}" if record not in ("", "method") else "")
    shown = {
        k: f" of {v['grid']}" if isinstance(v, dict) and "grid" in v else f"={v}" for k, v in method.settings.items()
    }
    said = [k + text for k, text in sorted(shown.items())]
    for key, value in method.keys.items():
        said += [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [f"{key}={value}"]
    settings = ", ".join(said)
    return f"{short} ({settings})" if settings else short
