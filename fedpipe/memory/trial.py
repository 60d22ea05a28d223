"""A plan tried for real: a few batches of every phase by the loop that trains, measured."""

from typing import TYPE_CHECKING

from torch import Tensor

from fedpipe.memory.measure import Peak
from fedpipe.memory.predictor import STEPS
from fedpipe.types import Plan, Tensors

if TYPE_CHECKING:
    from fedpipe.runtime import Runtime


def tried(rt: "Runtime", plan: Plan, rows: Tensor) -> list[Peak]:
    """The peak of each phase, of a client whose batches all are `rows` [n] of the data; nothing is kept."""
    client = rt.client(rt.ctx(client=0), rt.received(rt.filled(plan), rt.state0), rows)
    client.batches = lambda phase, index: [rows.numpy()] * STEPS
    peaks: list[Peak] = []

    def probe(index: int, held: Tensors) -> Peak:
        peaks.append(Peak(held.values(), rt.device))
        return peaks[-1]

    rt.loop(probe).train([client], plan)
    return peaks
