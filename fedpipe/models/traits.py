"""What a chain is like: asked of it before it is trained, stacked or recomputed."""

import torch
from torch import nn

from fedpipe.models.chain import Chain
from fedpipe.recompute import Policy
from fedpipe.seeding import seeded
from fedpipe.types import matches, under


@torch.no_grad()
def drawing(chain: Chain) -> list[str]:
    """Units whose training forward draws random numbers by itself (dropout and its kin), found by running them."""
    found: list[str] = []
    zeros = {n: torch.zeros_like(t, device="cpu") for n, t in [*chain.named_parameters(), *chain.named_buffers()]}
    zeros |= {f"{n}.keep": torch.ones(2, *d.shape, dtype=torch.bool) for n, d in chain.noise.layers.items()}
    dtype = next((t.dtype for t in zeros.values() if t.is_floating_point()), torch.float32)
    x, mode = torch.zeros(2, *chain.shape, dtype=dtype), chain.training
    chain.train()
    with seeded(0):
        for name in chain.names:
            before = torch.default_generator.get_state()
            x = torch.func.functional_call(chain.get_submodule(name), under(zeros, f"{name}."), (x,))
            if not torch.equal(before, torch.default_generator.get_state()):
                found.append(name)
    chain.train(mode)
    return found


def check(chain: Chain, policy: Policy) -> None:
    """Raise ValueError for units, levels and ranges that the chain does not have, and units that cannot run twice."""
    body = chain.names[:-1]
    for pattern, level in policy.levels:
        units = [u for u in chain.names if matches(u, (pattern,))]
        if not units:
            raise ValueError(f"levels: no unit is called {pattern}; units are {', '.join(body)}")
        for unit in units:
            has = getattr(chain.get_submodule(unit), "levels", (0,))
            if level not in has:
                raise ValueError(f"levels: unit {unit} has no level {level}; wanted one of {', '.join(map(str, has))}")
    seen: set[str] = set()
    for first, last in policy.again:
        if first not in body or last not in body or body.index(first) > body.index(last):
            raise ValueError(
                f"again: {first} to {last} is no range of units; wanted two in the order of {', '.join(body)}"
            )
        units = list(body[body.index(first) : body.index(last) + 1])
        if twice := seen & set(units):
            raise ValueError(f"again: unit {sorted(twice)[0]} is in two ranges; wanted each in one")
        seen |= set(units)
    if random := [u for u in (drawing(chain) if seen else ()) if u in seen]:
        raise ValueError(
            f"again: unit {random[0]} draws random numbers by itself, which would be others the second time; "
            "wanted units without, or noise from the method's draw"
        )


def batch_coupled(chain: Chain) -> bool:
    """Whether rows of a batch influence each other: batch normalisation with statistics of the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in chain.modules())


def has_conv(chain: Chain) -> bool:
    """Whether the chain convolves: batching models of many clients then becomes a grouped convolution."""
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in chain.modules())


@torch.no_grad()
def channels_last(chain: Chain) -> bool:
    """Whether the chain convolves and runs on images that lie channels last (a user's `view` may not).

    Not where a 1x1 filter reads few channels: should it stride, oneDNN 3.12's gradient for AVX2 writes past its memory.
    Nor with group norms: torch 2.13 crashes in their backward where the gradient of the images is not asked for.
    """
    if any(isinstance(m, nn.GroupNorm) for m in chain.modules()):
        return False
    convs = [m for m in chain.modules() if isinstance(m, nn.Conv2d)]
    if not convs or any(c.kernel_size == (1, 1) and c.in_channels < 8 for c in convs):
        return False
    like = next(chain.parameters())
    x = torch.zeros(2, *chain.shape, dtype=like.dtype, device=like.device)
    mode = chain.training
    try:
        with seeded(0):
            chain.eval()(x.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    finally:
        chain.train(mode)
    return True
