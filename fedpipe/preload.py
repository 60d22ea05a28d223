"""What the jobs of a warm worker share: imported once by its fork server, which runs no operation on any device.

Every file of the package is parsed as well, for the digests of code that jobs write into artefacts: 0.1 CPU-s each.
"""

import gc
from importlib import import_module
from pathlib import Path

from fedpipe.digest import _parsed

PACKAGE = Path(__file__).parent
# What steps come to import while they run: making an optimizer imports torch._dynamo, 1 CPU-s.
LATER = ("torch._dynamo", "pandas", "pyarrow.dataset", "pyarrow.pandas_compat", "safetensors.torch")
STEPS = ("train", "aggregate", "segment", "evaluate")

for _name in (*LATER, *(f"fedpipe.steps.{s}" for s in STEPS)):
    import_module(_name)
for _kind in ("methods", "models"):
    for _file in PACKAGE.glob(f"{_kind}/[!_]*.py"):
        import_module(f"fedpipe.{_kind}.{_file.stem}")
for _file in PACKAGE.rglob("*.py"):
    _parsed(_file)
gc.freeze()  # a collection in a child would write to, and so copy, every page that it shares
