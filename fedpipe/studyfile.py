"""Study and run files, read and checked: YAML with every key once, `1e-3` a number, and every number finite."""

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedpipe.config import Run, Study
from fedpipe.errors import FedpipeError
from fedpipe.io import read_table
from fedpipe.methodspec import MethodSpec, setting_label

_POWER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")  # text to YAML 1.1 and to the library


class _Loader(yaml.SafeLoader):
    """The plain loader, but a key that stands twice is an error: silently, the second would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value} stands there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as e:
        raise FedpipeError(f"{where}: not readable as YAML ({' '.join(str(e).split())[:200]})") from e


def _numbers(value: Any, at: str, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v, f"{at}.{k}" if at else str(k), where) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v, f"{at}.{i}", where) for i, v in enumerate(value)]
    if isinstance(value, str) and _POWER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise FedpipeError(f"{where}: {at}: wanted a finite number (got {value})")
    return value


def _override(raw: dict[str, Any], item: str) -> None:
    path, eq, text = item.partition("=")
    if not eq or not path:
        raise FedpipeError(f"--set {item}: wanted key=value")
    *parents, last = path.split(".")
    node = raw
    for p in parents:
        node = node.setdefault(p, {})
        if not isinstance(node, dict):
            raise FedpipeError(f"--set {item}: {p} is not a group of keys")
    node[last] = _parse(text, f"--set {item}")


def _scaled(raw: dict[str, Any], overrides: list[str], path: Path) -> dict[str, Any]:
    """The keys with those of the chosen of `scales` in their place, groups of keys merged; the study is named by it."""
    scales, chosen = raw.pop("scales", {}), raw.pop("scale", None)
    named = [i.partition("=")[2] for i in overrides if i.startswith("scale=")]
    chosen = _parse(named[-1], "--set scale") if named else chosen
    if not scales and chosen is None:
        return raw
    if not isinstance(scales, dict) or not isinstance(scales.get(chosen), dict):
        known = ", ".join(map(str, scales)) if scales and isinstance(scales, dict) else "none"
        raise FedpipeError(f"{path}: scale: {chosen}; the study has {known}")
    groups = {
        k: {**raw[k], **v} for k, v in scales[chosen].items() if isinstance(v, dict) and isinstance(raw.get(k), dict)
    }
    return {**raw, **scales[chosen], **groups, "name": f"{raw.get('name')}-{chosen}"}


def read(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The keys of a study file, each override `dotted.key=value` (its value read as YAML) in place of the file's own.

    A file with `scales: {small: {rounds: 20, ...}, paper: {...}}` is run at its `scale`, or that of an override.
    Raises FedpipeError, naming the file and key, for what cannot be read.
    """
    if not path.is_file():
        known = sorted(p.as_posix() for p in Path("workflows/studies").glob("*.yaml"))
        raise FedpipeError(f"{path}: no such study file; here are {', '.join(known) or 'none'}")
    raw = _parse(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise FedpipeError(f"{path}: wanted a group of keys (name, data, model, methods, ...)")
    raw = _scaled(raw, overrides, path)
    for item in (i for i in overrides if not i.startswith("scale=")):
        _override(raw, item)
    return {k: _numbers(v, str(k), str(path)) for k, v in raw.items()}


_INNER = re.compile(r"function-|constrained-|literal\[|\[key\]|int$|float$")  # pydantic's names of parts of a type


def _one_line(error: ValidationError, where: str) -> FedpipeError:
    def at(e: Any) -> str:
        return ".".join(str(p) for p in e["loc"] if not _INNER.match(str(p)))

    first, *others = error.errors()
    wanted = [first["msg"], *(e["msg"] for e in others if at(e) == at(first))]  # one for each kind a value may have
    message = " or ".join(dict.fromkeys(m.removeprefix("Value error, ") for m in wanted))
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] != "missing" and not isinstance(first["input"], dict | BaseModel):
        message += f" (got {reprlib.repr(first['input'])})"
    return FedpipeError(f"{where}: {at(first) + ': ' if at(first) else ''}{message}")


def load_study(path: Path, overrides: list[str] | None = None, methods: list[str] | None = None) -> Study:
    """Read and check a study file, with `methods` of it or of the package instead of its own.

    Raises FedpipeError naming file and key. Whether there are such methods and models is asked by `digest.step_digest`.
    """
    try:
        study = Study.model_validate(read(path, overrides or []))
        _check_paper(study, path)
        if methods:
            chosen = [m for name in methods for m in _chosen(study, name)]
            names = {n for m in chosen for n in (m.name, setting_label(m))}
            paper = {k: v for k, v in study.paper.items() if k in names}
            study = Study.model_validate({**study.model_dump(), "methods": chosen, "paper": paper})
    except ValidationError as e:
        raise _one_line(e, str(path)) from None
    return study


def _chosen(study: Study, name: str) -> list[MethodSpec]:
    return [m for m in study.methods if m.name == name] or [MethodSpec(name=name)]


def _check_paper(study: Study, path: Path) -> None:
    names = {n for m in study.entries for n in (m.name, setting_label(m))}
    for name, value in study.paper.items():
        if name not in names or not 0 <= value <= 1:
            wanted = "wanted one of the study's methods and an accuracy in 0..1"
            raise FedpipeError(f"{path}: paper.{name}: {wanted} (got {value})")


def load_run(path: Path) -> Run:
    """Read a run's resolved specification (`run.json`), the values that were selected in place of its grids."""
    if not path.is_file():
        raise FedpipeError(f"{path}: no such run file")
    try:
        run = Run.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise _one_line(e, str(path)) from None
    return run if run.selection is None else _selected(run, path.parents[2] / "select" / run.selection)


def _selected(run: Run, folder: Path) -> Run:
    rows = read_table(folder / "chosen.parquet").to_pylist()
    settings = next(json.loads(r["settings"]) for r in rows if r["chosen"])
    return run.but(method=run.method.model_copy(update={"settings": settings}))
