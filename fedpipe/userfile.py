"""A user's own model or method: `./file.py:name`, imported by path and only because the study names it."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpipe.errors import FedpipeError

_TEXTS: dict[str, bytes] = {}  # of the modules imported


def load_attribute(spec: str, wanted: str) -> Any:
    """The object `name` of `path/file.py:name`; FedpipeError names the file and what it holds instead."""
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if not path_text or not name:
        raise FedpipeError(f"{spec}: there is no file or no name in it; wanted ./file.py:{wanted}")
    if not path.is_file():
        raise FedpipeError(f"{spec}: no file {path} (looked in {Path.cwd()})")
    module = _module(path)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise FedpipeError(f"{path}: no {wanted} {name!r}; the file has {', '.join(public) or 'nothing'}")
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    """The file imported, once as long as it does not change: a step is captured for a function, not for its text."""
    module_name = f"fedpipe_user_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    text = path.read_bytes()
    if _TEXTS.get(module_name) == text:
        return sys.modules[module_name]
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[module_name]
        _TEXTS.pop(module_name, None)
        raise FedpipeError(f"{path}: could not be imported ({type(e).__name__}: {' '.join(str(e).split())})") from e
    _TEXTS[module_name] = text
    return module
