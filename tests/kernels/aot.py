"""Compiles every Triton kernel for a GPU that need not be there, and says what the machine code looks like.

python tests/kernels/aot.py SM [OP ...]: one line of JSON per kernel. PYTHONPATH may put another triton first.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedpipe.kernels.common import OPS, Variant

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return done.stdout


def built(variant: Variant, sm: int) -> dict[str, object]:
    """Registers, spills and loads of one kernel; pointers are multiples of 16 bytes, as torch's are."""
    names = list(variant.kernel.arg_names)
    constants = {n: variant.constants[n] for n in names if n in variant.constants}
    signature = {n: "constexpr" if n in constants else variant.types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    aligned |= {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": variant.warps, **variant.options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "wide loads": count(r"\bLDG\.[\w.]*128\b"),
        "loads": count(r"\bLDG\b"),
        "wide stores": count(r"\bSTG\.[\w.]*128\b"),
        "stores": count(r"\bSTG\b"),
        "streaming": variant.streaming,
    }


def main() -> None:
    sm = int(sys.argv[1])
    for op in sys.argv[2:] or OPS:
        for name, variant in importlib.import_module(f"fedpipe.kernels.{op}.kernel").VARIANTS.items():
            print(
                json.dumps({"kernel": f"{op}.{name}", "triton": triton.__version__, **built(variant, sm)}), flush=True
            )


if __name__ == "__main__":
    main()
