"""Settings checked from a method's source, which is not imported: the same words as loading it, or none."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpipe import methods
from fedpipe.errors import FedpipeError
from fedpipe.methodspec import MethodSpec
from fedpipe.settings import check_settings, method_defaults

BASE = """
from fedpipe.types import Method
base = Method(h={"a": 1, "b": [0.5, -1.0], "c": None})
"""
MINE = '''
"""Records of every kind that can be read, and further down of those that cannot."""
import dataclasses
import os
from dataclasses import replace

import fedpipe.types as nouns
from base import base as theirs
from fedpipe.methods import fedprox
from fedpipe.methods.fedbabu import method as babu
from fedpipe.types import Method

plain = Method()
typed: Method = nouns.Method(name="x", h={"on": True, "deep": {"k": (1, "s")}})
derived = replace(plain, h={"mu": 0.5})
again = dataclasses.replace(derived, begin=print)
prox = replace(fedprox.method, begin=None)
more = replace(babu, h={**babu.h, **theirs.h, "part": "head"})
either = Method(h=typed.h | {"on": False})
same = theirs

NU = 0.5
constant = Method(h={"nu": NU})
called = Method(h=dict(nu=0.5))
positional = Method("x", {"nu": 0.5})
unpacked = Method(**{"h": {"nu": 0.5}})
made = (lambda: Method(h={"nu": 0.5}))()
twice = Method(h={"nu": 0.5})
if os.environ:
    twice = Method(h={"nu": 0.5, "xi": 1})
changed = Method(h={"nu": 0.5})
changed.h["xi"] = 1
grown = Method(h={"nu": 0.5})
grown.h.update(xi=1)
on_it = replace(grown, begin=None)
other = os.environ and Method(h={"nu": 0.5})
'''
READABLE = ("plain", "typed", "derived", "again", "prox", "more", "either", "same")
UNREADABLE = (
    *("constant", "called", "positional", "unpacked", "made", "twice", "changed", "grown", "on_it", "other", "absent"),
)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "base", raising=False)
    return tmp_path / "mine.py"


def kinds(value: Any) -> Any:
    return {k: (type(v), v) for k, v in value.items()}


@pytest.mark.parametrize("name", methods.known())
def test_every_method_is_readable(name: str) -> None:
    read = method_defaults(name)
    assert read is not None and kinds(read) == kinds(importlib.import_module(f"fedpipe.methods.{name}").method.h)


@pytest.mark.parametrize("record", READABLE)
def test_a_users_record_is_read_as_it_is_loaded(record: str, mine: Path) -> None:
    read = method_defaults(f"./mine.py:{record}")
    assert read is not None and kinds(read) == kinds(methods.load(MethodSpec(name=f"./mine.py:{record}")).h)


@pytest.mark.parametrize("record", UNREADABLE)
def test_what_only_running_the_file_tells_is_left_to_loading(record: str, mine: Path) -> None:
    name = f"./mine.py:{record}"
    assert method_defaults(name) is None
    check_settings(MethodSpec(name=name, settings={"whatever": 1}))


def test_records_that_lead_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from two import method\n")
    (tmp_path / "two.py").write_text("from one import method\n")
    assert method_defaults(f"{tmp_path}/one.py:method") is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedprox", {"nu": 1}),
        ("fedavg", {"mu": 0.1}),
        ("fedprox", {"mu": "much"}),
        ("fedprox", {"mu": True}),
        ("heterofl", {"widths": 0.5}),
        ("heterofl", {"scaler": 1}),
        ("fedbabu", {"finetune_epochs": 1.5}),
        ("./mine.py:prox", {"mu": [1]}),
        ("./mine.py:more", {"partt": "head"}),
    ],
)
def test_the_words_are_those_of_loading(name: str, settings: dict[str, Any], mine: Path) -> None:
    spec = MethodSpec(name=name, settings=settings)
    with pytest.raises(FedpipeError) as loading:
        methods.load(spec)
    with pytest.raises(FedpipeError) as reading:
        check_settings(spec)
    assert str(reading.value) == str(loading.value) and str(reading.value).startswith(f"methods.{name}")


def test_every_point_of_a_grid_is_checked() -> None:
    check_settings(MethodSpec(name="fedprox", settings={"mu": {"grid": [0, 0.1]}}))
    check_settings(MethodSpec(name="heterofl", settings={"widths": [1.0, 0.5], "scaler": False}))
    with pytest.raises(FedpipeError, match="methods.fedprox.mu: wanted float, got 'x'"):
        check_settings(MethodSpec(name="fedprox", settings={"mu": {"grid": [0.1, "x"]}}))
    with pytest.raises(FedpipeError, match="methods.fedprox: no setting 'nu'; there are mu"):
        check_settings(MethodSpec(name="fedprox", settings={"nu": {"grid": [0.1, 1]}}))


def test_a_method_or_file_that_is_not_there() -> None:
    with pytest.raises(FedpipeError, match="methods: 'fedsomething' is not known; there are depthfl"):
        check_settings(MethodSpec(name="fedsomething"))
    with pytest.raises(FedpipeError, match="none.py: no such file"):
        check_settings(MethodSpec(name="./none.py:method"))


def test_reading_loads_nothing_heavy() -> None:
    code = """
import sys
from fedpipe.methodspec import MethodSpec
from fedpipe.settings import check_settings, methods
for name in methods.known():
    check_settings(MethodSpec(name=name))
print([m for m in ("torch", "datasets", "matplotlib", "pandas") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
