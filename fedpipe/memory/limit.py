"""A limit on what torch's allocator takes on CUDA, for the time one client trains alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SEGMENTS = 22 << 20  # one of each of the allocator's pools, 2 and 20 MiB: it reserves them whole


@contextmanager
def allocator_limit(rest: int, device: torch.device) -> Iterator[bool]:
    """Let the block take at most `rest` bytes above what is allocated on `device`; whether that is so.

    The allocator limits what it reserves, not what it hands out. It reserves whole segments, rounds large requests up
    to 2 MiB and leaves gaps (a segment of 20 MiB holds two tensors of 7), so half of `rest` and two segments are
    allowed above it: this stops a client that runs away, and its measured peak is judged to the byte. Nothing is
    limited on a CPU, nor where the device has less than that free: to run out is then not the client's failure.
    """
    if device.type != "cuda":
        yield False
        return
    torch.cuda.empty_cache()
    allowed = rest + rest // 2 + SEGMENTS
    free, total = torch.cuda.mem_get_info(device)
    if allowed > free:
        yield False
        return
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + allowed) / total, device)
    try:
        yield True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def total(device: torch.device) -> int:
    """Bytes of memory a device has: of a card its own, of a CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
