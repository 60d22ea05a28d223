"""One way to train some units of a chain, in bytes and work."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Option:
    """One way to train units first..last (indices, inclusive): a unit at a level of recomputation, or a range that runs
    again. All but the cost in bytes. Raises ValueError for negative numbers, and a level of more than one unit."""

    first: int
    last: int
    level: int | None  # None: the range runs again in the backward
    saved: int  # kept between its forward and its backward, besides its input and output
    input: bool  # its input is kept for the backward
    output: bool  # its output is kept by itself
    forward: int  # highest rise during its forward, its input included, above what is saved before it
    # highest rise during its backward: its own saved bytes and the incoming gradient included, its input and the
    # gradients of later parameters not
    backward: int
    gradients: int  # of its parameters, held from its backward to the end
    cost: float  # work of what runs again, 0 at level 0
    kept: "Option | None" = None  # what it is where the output before it is kept by itself; None: the same

    def __post_init__(self) -> None:
        where = f"units {self.first}..{self.last}"
        if not 0 <= self.first <= self.last or (self.level is not None and self.first != self.last):
            raise ValueError(f"{where} at level {self.level}: wanted one unit at a level, or a range with level None")
        for name in ("saved", "forward", "backward", "gradients", "cost"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}: {name} {getattr(self, name)} came; wanted a number >= 0")

    def behind(self, kept: bool) -> "Option":
        """The option behind one that keeps its output, or does not."""
        return self.kept if kept and self.kept else self

    @property
    def free(self) -> "Option":
        """The option, if it cost nothing."""
        return replace(self, cost=0, kept=self.kept and self.kept.free)

    def moved(self, by: int) -> "Option":
        """The option of a chain that begins this many units later."""
        return replace(self, first=self.first - by, last=self.last - by, kept=self.kept and self.kept.moved(by))
