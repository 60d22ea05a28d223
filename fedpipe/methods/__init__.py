"""The folder is the registry: `load("fedprox")` imports `fedpipe/methods/fedprox.py` and no other method."""

import importlib
import importlib.util
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpipe.errors import FedpipeError
from fedpipe.methodspec import MethodSpec
from fedpipe.types import Method
from fedpipe.userfile import load_attribute


def known() -> list[str]:
    """Names of the methods that come with the package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(spec: MethodSpec) -> Method:
    """The method's record with the study's settings in place of its defaults; unknown settings are errors."""
    if ".py:" in spec.name:
        method = load_attribute(spec.name, "method")
    elif spec.name in known():
        method = importlib.import_module(f"{__name__}.{spec.name}").method
    else:
        raise FedpipeError(f"methods: no method {spec.name!r}; there are {', '.join(known())}, or ./file.py:record")
    if not isinstance(method, Method):
        raise FedpipeError(f"methods: {spec.name} is {type(method).__name__}, wanted a fedpipe.types.Method")
    check(spec, method.h)
    name = spec.name if ".py:" not in spec.name else Path(spec.name.partition(":")[0]).stem
    defaults = {k: v[0] if isinstance(v, tuple) else v for k, v in method.h.items()}
    return replace(method, name=name, h={**defaults, **spec.settings})


def check(spec: MethodSpec, defaults: dict[str, Any]) -> None:
    """Raise FedpipeError unless every setting is one of the method's, and of its choices or the type of its default."""
    for key, value in spec.settings.items():
        if key not in defaults:
            raise FedpipeError(f"methods.{spec.name}: no setting {key!r}; there are {', '.join(defaults) or 'none'}")
        if isinstance(defaults[key], tuple):
            if value not in defaults[key]:
                raise FedpipeError(
                    f"methods.{spec.name}.{key}: {value!r}; wanted {' or '.join(map(str, defaults[key]))}"
                )
            continue
        want = type(defaults[key])
        number = want is float and isinstance(value, int) and not isinstance(value, bool)
        if defaults[key] is not None and not isinstance(value, want) and not number:
            raise FedpipeError(f"methods.{spec.name}.{key}: wanted {want.__name__}, got {value!r}")
