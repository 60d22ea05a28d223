"""What a forward saves less of, as plain data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpipe.types import matches

if TYPE_CHECKING:
    from fedpipe.kernels.common import Backend


@dataclass(frozen=True)
class Policy:
    """What a forward saves less of. levels: (pattern of units, level), the last that fits counts; again: (first, last)
    unit of ranges that run again in the backward; backend: of the kernels of a level."""

    levels: tuple[tuple[str, int], ...] = ()
    again: tuple[tuple[str, str], ...] = ()
    backend: "Backend" = "auto"

    def level(self, unit: str) -> int:
        return next((level for pattern, level in reversed(self.levels) if matches(unit, (pattern,))), 0)

    def end(self, unit: str) -> str | None:
        """The last unit of the range that begins with this one."""
        return next((last for first, last in self.again if first == unit), None)
