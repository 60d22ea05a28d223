"""A method's settings checked before anything runs: its defaults are read from its source, which is not imported.

To import a method is to import torch, seconds that the start of a workflow need not pay. What can be read is a record
that its file binds once: to `Method(...)` or `replace(record, ...)` with a literal `h`, or by importing it from another
file. An `h` may be made of other records' by `{**record.h, ...}` and `|`. Of any other method nothing is said here; the
first step that loads it will.
"""

import ast
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpipe import methods
from fedpipe.digest import ROOT, find, method_start, parse
from fedpipe.methodspec import MethodSpec, points

METHOD = "fedpipe.types.Method"
REPLACE = ("dataclasses.replace", "copy.replace")


class _Unreadable(Exception):
    """What a record's `h` is shows only when its file runs."""


def check_settings(method: MethodSpec) -> None:
    """Raise FedpipeError for a setting the method lacks, or of another type than its default, at any grid's point."""
    defaults = method_defaults(method.name)
    if defaults is not None:
        for point in points(method):
            methods.check(point, defaults)


def method_defaults(name: str) -> dict[str, Any] | None:
    """The `h` of a method, by its name or as `./file.py:record`; None where it cannot be read from the source."""
    start = method_start(name)
    record = name.rpartition(":")[2] if isinstance(start, Path) else "method"
    path = start if isinstance(start, Path) else find(start, ROOT, [])
    beside = [start.parent] if isinstance(start, Path) else []
    try:
        return _Source(path, beside).record(record) if path else None
    except (_Unreadable, RecursionError):  # records that lead to each other
        return None


class _Source:
    """One file's top level: what its names are bound to."""

    def __init__(self, path: Path, beside: list[Path]):
        self.tree, self.beside = parse(path), beside

    @cached_property
    def bound(self) -> dict[str, ast.expr | str | None]:
        """Each name's expression, or the dotted name it is imported as; None where it is bound in any other way, or
        again anywhere in the file."""
        found: dict[str, ast.expr | str | None] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                roots = {a.name.split(".")[0] for a in node.names if not a.asname}
                found |= {r: r for r in roots} | {a.asname: a.name for a in node.names if a.asname}
        names = [n for node in ast.walk(self.tree) for n in _binds(node)]
        return {n: b if names.count(n) == 1 else None for n, b in found.items()}

    def record(self, name: str) -> dict[str, Any]:
        bound = self.bound.get(name)
        if bound is None:
            raise _Unreadable
        return self.elsewhere(bound) if isinstance(bound, str) else self.h_of(bound)

    def elsewhere(self, dotted: str) -> dict[str, Any]:
        module, _, name = dotted.rpartition(".")
        path = find(module, ROOT, self.beside) if module else None
        if path is None:
            raise _Unreadable
        return _Source(path, self.beside).record(name)

    def dotted(self, node: ast.expr) -> str | None:
        """What a name or a chain of attributes is called where it was imported from."""
        if isinstance(node, ast.Attribute):
            left = self.dotted(node.value)
            return left and f"{left}.{node.attr}"
        bound = self.bound.get(node.id) if isinstance(node, ast.Name) else None
        return bound if isinstance(bound, str) else None

    def h_of(self, node: ast.expr) -> dict[str, Any]:
        """The `h` of an expression that is a record."""
        if dotted := self.dotted(node):
            return self.elsewhere(dotted)
        if isinstance(node, ast.Name):
            return self.record(node.id)
        if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
            raise _Unreadable
        function, given = self.dotted(node.func), next((k.value for k in node.keywords if k.arg == "h"), None)
        if function == METHOD and not node.args:
            return self.value(given) if given else {}
        if function in REPLACE and len(node.args) == 1:
            return self.value(given) if given else self.h_of(node.args[0])
        raise _Unreadable

    def value(self, node: ast.expr) -> dict[str, Any]:
        """The dictionary of an expression that is an `h`."""
        if isinstance(node, ast.Attribute) and node.attr == "h":
            return self.h_of(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.value(node.left) | self.value(node.right)
        if not isinstance(node, ast.Dict):
            raise _Unreadable
        out: dict[str, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            try:
                out |= {ast.literal_eval(key): ast.literal_eval(item)} if key else self.value(item)
            except (ValueError, TypeError) as e:
                raise _Unreadable from e
        return out


def _binds(node: ast.AST) -> list[str]:
    """The names a piece of syntax binds, or whose `h` it may change."""
    match node:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [(a.asname or a.name).split(".")[0] for a in names]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="h"), ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id=name), attr="h"))):
            return [name]
    return []
