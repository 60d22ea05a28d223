"""Normalisation by statistics of the batch, or of groups of channels, and ReLU: forward, recompute, backward.

h = max(0, (x - mean) rstd weight + bias), rstd = 1 / sqrt(variance + eps) with the biased variance. What backward
needs beside x is the statistics: ReLU's mask and the normalised x are made again.
"""

from torch import Tensor, float32, float64

from fedpipe.kernels.bits import FLOATS
from fedpipe.kernels.common import Backend, chosen, wanted
from fedpipe.kernels.norm import reference


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int | None = None,
              backend: Backend = "auto") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, mean, rstd) of x [batch, channels, ...]; statistics in float32, h in x's type.

    weight, bias: [channels], in x's type or float32; or [clients, channels], and x has a leading client axis. groups:
    None, and mean and rstd are of a channel, [channels]; or of how many groups of a sample's channels they are,
    [batch, groups]; clients lead. float64 runs by the reference on every device. Raises ValueError, before anything is
    written, for wrong types, shapes and devices.
    """
    _check(x, weight, bias, groups)
    if not eps > 0:
        raise ValueError(f"eps: {eps}; wanted a number > 0")
    return _code(backend, x).norm_relu(x, weight, bias, eps, groups)


def norm_relu_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int | None = None,
                    backend: Backend = "auto") -> Tensor:  # fmt: skip
    """h again, to the bit, of the statistics that `norm_relu` gave."""
    _check(x, weight, bias, groups, {"mean": mean, "rstd": rstd})
    return _code(backend, x).norm_relu_again(x, mean, rstd, weight, bias, groups)


def norm_relu_backward(dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                       groups: int | None = None,
                       backend: Backend = "auto") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias) of dh, in the types of x and weight; sums in float32."""
    _check(x, weight, bias, groups, {"mean": mean, "rstd": rstd})
    wanted("dh", dh, (x.dtype,), tuple(x.shape), x)
    return _code(backend, x).norm_relu_backward(dh, x, mean, rstd, weight, bias, groups)


def bytes_moved(op: str, n: int, itemsize: int = 4) -> float:
    """Bytes one call must read and write for n entries, whose statistics have to be complete before they are used."""
    return {"norm_relu": 3, "norm_relu_again": 2, "norm_relu_backward": 5}[op] * itemsize * n


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int | None,
           statistics: dict[str, Tensor] | None = None) -> None:  # fmt: skip
    wanted("x", x, FLOATS)
    lead = weight.dim()
    if lead not in (1, 2):
        raise ValueError(f"weight: shape {tuple(weight.shape)}; wanted [channels] or [clients, channels]")
    if x.dim() <= lead or not x.numel():
        axes = "[batch, channels, ...]" if lead == 1 else "[clients, batch, channels, ...]"
        raise ValueError(f"x: shape {tuple(x.shape)}; wanted {axes}, none of them 0")
    exact = x.dtype if x.dtype == float64 else float32
    channels = (*x.shape[: lead - 1], x.shape[lead])
    wanted("weight", weight, tuple(dict.fromkeys((exact, x.dtype))), channels, x)
    wanted("bias", bias, (weight.dtype,), channels, x)
    if groups is not None and (groups < 1 or channels[-1] % groups):
        raise ValueError(f"groups: {groups}; wanted a divisor of {channels[-1]} channels")
    shape = channels if groups is None else (*x.shape[:lead], groups)
    for name, t in (statistics or {}).items():
        wanted(name, t, (exact,), shape, x)


def _code(backend: Backend, x: Tensor):  # type: ignore[no-untyped-def]
    if not chosen(backend, x) or x.dtype == float64:
        return reference
    from fedpipe.kernels.norm import kernel

    return kernel
