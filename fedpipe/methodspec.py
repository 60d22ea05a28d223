"""The methods a study names: their settings, grids of these, and how tables call them."""

import itertools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class MethodSpec(BaseModel):
    """A method by name, or `./file.py:record`, and the settings that replace its defaults.

    In a study, `{grid: [a, b]}` as the value of a setting stands for one entry per value; a plain list is a value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    settings: dict[str, Any] = {}


def named(value: Any) -> Any:
    """A study's list of methods as names with settings: `fedavg`, `{fedprox: {mu: 1}}` and `{name: fedprox}` alike."""
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


def points(method: MethodSpec) -> list[MethodSpec]:
    """One method per point of its grids: their product, the last grid varying fastest. Without a grid, itself."""
    grids = {
        k: _grid(f"{method.name}.{k}", v) for k, v in method.settings.items() if isinstance(v, dict) and "grid" in v
    }
    products = itertools.product(*grids.values())
    return [MethodSpec(name=method.name, settings=method.settings | dict(zip(grids, p, strict=True))) for p in products]


def _grid(at: str, value: dict[str, Any]) -> list[Any]:
    if len(value) > 1:
        raise ValueError(f"methods: {at}: {sorted(value.keys() - {'grid'})[0]} stands beside grid; wanted grid alone")
    if not isinstance(value["grid"], list) or not value["grid"]:
        raise ValueError(f"methods: {at}.grid: wanted a list of values, at least one")
    return value["grid"]


def setting_label(method: MethodSpec) -> str:
    """A method and its settings, as tables name it."""
    file, _, record = method.name.partition(":")
    short = Path(file).stem + (f":{record}" if record not in ("", "method") else "")
    shown = {
        k: f" of {v['grid']}" if isinstance(v, dict) and "grid" in v else f"={v}" for k, v in method.settings.items()
    }
    settings = ", ".join(k + text for k, text in sorted(shown.items()))
    return f"{short} ({settings})" if settings else short
