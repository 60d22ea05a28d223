"""The published stand-in for training memory: activation values of convolutions and norms, counted on fake tensors.

FeDepth (arXiv 2303.04887) packs units into blocks by such counts; its published blocks of PreResNet-20 and ViT-Tiny are
those that `planner.greedy` makes of these. They leave out gradients, optimizer state and workspaces: `memory.Trace`
predicts bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpipe.memory.predict import Trace
from fedpipe.models.chain import Chain

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
CALLS = {
    getattr(torch.ops.aten, name)
    for name in (
        *("convolution", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("_batch_norm_with_update", "native_group_norm", "native_layer_norm", "_fused_rms_norm"),
    )
    if hasattr(torch.ops.aten, name)
}
BATCH = 2  # batch norm refuses to train on one sample of one pixel


class _Count(TorchDispatchMode):
    """Values of the layers' outputs, and of calls of the same functions outside them, as a ViT's norms are."""

    def __init__(self) -> None:
        super().__init__()
        self.values = self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # what a layer calls is its own affair: its weights, too, may be normalised
        if not self.depth and getattr(func, "overloadpacket", None) in CALLS:
            self.values += tree_leaves(out)[0].numel()
        return out

    def enter(self, layer: nn.Module, args: Any) -> None:
        self.depth += isinstance(layer, LAYERS)

    def leave(self, layer: nn.Module, args: Any, out: Any) -> None:
        if isinstance(layer, LAYERS):
            self.depth -= 1
            if not self.depth:
                self.values += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With hooks of all modules, so that none is put on the chain's own."""
        handles = hooks.register_module_forward_pre_hook(self.enter), hooks.register_module_forward_hook(self.leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def values(chain: Chain) -> dict[str, int]:
    """Per sample and unit in order, stem and head included: values that its convolutions and norms put out.

    Convolutions (transposed ones, too) and batch, instance, group, layer and RMS norms count, as modules or as torch's
    functions; linear layers and attention do not. Units run in the chain's mode. Nothing is allocated and the chain
    stays as it is. Raises FedpipeError where the size of a tensor depends on values.
    """
    dtype = next((p.dtype for p in chain.parameters() if p.is_floating_point()), torch.float32)
    found: dict[str, int] = {}
    with Trace() as trace, _Count() as count, count.hooked(), torch.no_grad():
        x = torch.empty(BATCH, *chain.shape, dtype=dtype)
        for name in chain.names:
            unit, before = chain.get_submodule(name), count.values
            own = trace.fake({**dict(unit.named_parameters()), **dict(unit.named_buffers())})
            x = torch.func.functional_call(unit, own, (x,))
            found[name] = (count.values - before) // BATCH
    return found
