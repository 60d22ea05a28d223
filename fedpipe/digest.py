"""Digests of code: of a file and of all it imports from this package; comments, docstrings and layout do not count.

Snakemake does not see edits to imported code, so every rule carries the digest of its step as a param. Methods and
models are loaded by name while a step runs, so no import leads to them: `step_digest` adds those of the run.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fedpipe.config import Run
from fedpipe.errors import FedpipeError
from fedpipe.io import digest
from fedpipe.models import REGISTRY
from fedpipe.models.weights import located

ROOT = Path(__file__).parent.parent
TRAINS = ("measure", "assign", "segment", "train", "aggregate", "evaluate")  # steps that run a method on a model


@cache
def code_digest(*starts: str | Path, root: Path = ROOT) -> str:
    """Digest of modules by dotted name and of a user's files by path, with every module of fedpipe they import.

    A user's file may import its neighbours. Raises `FedpipeError` for a file that is missing or cannot be parsed.
    """
    beside = [s.parent for s in starts if isinstance(s, Path)]
    found: dict[str, Path] = {}
    todo = [(s.name, s) if isinstance(s, Path) else (s, find(s, root, [])) for s in starts]
    for name, path in todo:
        if path is None:
            raise FedpipeError(f"{name}: no such module in {root}")
    while todo:
        name, path = todo.pop()
        if path is None or name in found:
            continue
        found[name] = path
        todo += [(n, find(n, root, beside)) for n in _parsed(path)[1]]
    return digest(*(text for name in sorted(found) for text in (name, _parsed(found[name])[0])))


def step_digest(step: str, run: Run | None = None, root: Path = ROOT) -> str:
    """Digest of the code of one step; for steps that train, with the run's own method and model.

    Raises `FedpipeError` for a method or model that neither the package nor a file has, and weights that are nowhere.
    """
    starts: list[str | Path] = [f"fedpipe.steps.{step}"]
    if run is not None and step in TRAINS:
        models = {name: builder.partition(":")[0] for name, builder in REGISTRY.items()}
        starts += [method_start(run.method.name, root), _start("model", run.model.name, models)]
        if run.model.weights:
            file = located(run.model.weights)
            return digest(code_digest(*starts, root=root), _content(file, file.stat().st_mtime_ns))
    return code_digest(*starts, root=root)


@cache
def _content(path: Path, version: int) -> str:
    """Digest of a file that a run begins with; version: when it was written."""
    return digest(path.read_bytes())


def method_start(name: str, root: Path = ROOT) -> str | Path:
    """Where the code of a method lies: a module of the package, or a user's file."""
    files = (root / "fedpipe/methods").glob("[!_]*.py")
    return _start("methods", name, {f.stem: f"fedpipe.methods.{f.stem}" for f in files})


def _start(key: str, name: str, modules: dict[str, str]) -> str | Path:
    if ".py:" in name:
        return Path(name.rpartition(":")[0])
    if name not in modules:
        raise FedpipeError(f"{key}: {name!r} is not known; there are {', '.join(sorted(modules))}, or ./file.py:name")
    return modules[name]


def find(module: str, root: Path, beside: list[Path]) -> Path | None:
    """The file of a module of fedpipe, or of one that lies beside a user's file; None for every other module."""
    for folder in [root] if module.split(".")[0] == "fedpipe" else beside:
        stem = folder.joinpath(*module.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def parse(path: Path) -> ast.Module:
    """A file's syntax. Raises `FedpipeError`, naming the file, where it is missing or no Python."""
    try:
        return ast.parse(path.read_bytes())
    except OSError as e:
        raise FedpipeError(f"{path}: no such file, named in the study as {path}:name") from e
    except (SyntaxError, ValueError) as e:
        raise FedpipeError(f"{path}: not readable as Python ({e})") from e


@cache
def _parsed(path: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of what a file does, without docstrings and positions, and the modules it imports while running."""
    tree = parse(path)
    imports = tuple(dict.fromkeys(_imports(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return digest(ast.dump(tree)), imports


def _imports(node: ast.AST) -> Iterator[str]:
    """Dotted names a file may import, parents included; what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [a.name for a in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            names = [child.module, *(f"{child.module}.{a.name}" for a in child.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
        yield from _imports(child)
