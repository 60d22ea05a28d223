"""Peak memory of training: predicted by a trace that allocates nothing, measured by the allocator's own records."""

from fedpipe.memory.measure import Peak
from fedpipe.memory.parts import Parts
from fedpipe.memory.predict import Trace, tensor_bytes, traced_peak

__all__ = ["Parts", "Peak", "Trace", "tensor_bytes", "traced_peak"]
