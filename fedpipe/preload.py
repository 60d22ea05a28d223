"""What the jobs of a warm worker share: imported once by its fork server, which runs no operation on any device."""

import gc
import os
from contextlib import suppress
from importlib import import_module
from itertools import product
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads where it is imported, and forks lose them
# What steps come to import while they run: making an optimizer imports torch._dynamo, 1 CPU-s; its first step imports,
# in some versions of torch, a monitor of the profiler, 10 ms.
LATER = ("torch.profiler._cupti_monitor", "numpy.ctypeslib", "pandas", "pyarrow.dataset",
         "pyarrow.pandas_compat", "safetensors.torch", "fedpipe.__main__", "fedpipe.worker")  # fmt: skip
STEPS = [f"fedpipe.steps.{name}" for name in ("segment", "train", "aggregate", "evaluate")]
METHODS, MODELS = (
    [f"fedpipe.{kind}.{file.stem}" for file in Path(__file__).parent.glob(f"{kind}/[!_]*.py")]
    for kind in ("methods", "models")
)
import_module("fedpipe.tracing").load()
for _name in (*LATER, *STEPS, *METHODS, *MODELS):
    with suppress(ImportError):
        import_module(_name)
_digest = import_module("fedpipe.digest")
for _chosen in product(METHODS, MODELS):  # jobs of rounds write it into what they make: 0.1 CPU-s in each
    _digest.code_digest(STEPS[0], *_chosen, root=_digest.ROOT)
gc.freeze()  # a collection in a child would write to, and so copy, every page that it shares
