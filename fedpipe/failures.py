"""Clients that fail while they train: caught, put into words, and either the end of the run or left out of a round."""

import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedpipe.errors import FedpipeError

if TYPE_CHECKING:
    from fedpipe.loop.client import Result

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or what it raises. The exception's frames lose their locals: in them it would hold on to
    the very memory that ran out."""
    outcome = _caught(work)
    error: BaseException | None = outcome if isinstance(outcome, Exception) else None
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    return outcome


def _caught(work: Callable[[], T]) -> T | Exception:
    """Not part of `attempt`: only frames that have returned can be cleared."""
    try:
        return work()
    except Exception as e:
        return e


def judge(row: dict[str, Any], why: str | None, on: str, cause: Exception | None = None) -> bool:
    """Whether the client of a row failed. If so that is one line: of a FedpipeError where `on` is `stop`, else on
    standard error."""
    if why is None:
        return False
    if on == "stop":
        raise FedpipeError(f"{_who(row)}: {why}; on_client_failure: drop goes on without it") from cause
    _tell(row, f"dropped, {why}")
    return True


def over_budget(row: dict[str, Any], found: dict[int, str], how: str, warned: set[tuple[str, int]]) -> str | None:
    """Why a client that was measured has failed, of what there is to say of its phases: nothing, unless `how` is
    enforce. Under `warn` a line says it, once of a plan and phase: those in `warned` have been said."""
    if how == "enforce":
        return next((f"{why}; raise margin, or budget: warn goes on" for why in found.values()), None)
    for phase, why in found.items():
        if (row["plan"], phase) not in warned:
            warned.add((row["plan"], phase))
            _tell(row, f"{why}; going on")
    return None


def _tell(row: dict[str, Any], what: str) -> None:
    print(f"fedpipe: {_who(row)}: {what}", file=sys.stderr, flush=True)


def _who(row: dict[str, Any]) -> str:
    return f"client {row['client']}, round {row['round']}"


def not_finite(result: "Result") -> str | None:
    """What to say of training that came to values that are not finite."""
    bad = next((n for n, t in (result.sent | result.own).items() if not bool(t.isfinite().all())), None)
    last = float(result.phases[-1][2])
    return bad and f"{bad} is not finite after training (last loss {last:.3g}); lower local.optimizer.lr"


def said(error: Exception) -> str:
    """An exception in one line; one that is no FedpipeError has no words for users, so its place is named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedpipeError) else f"{where(error)}: {type(error).__name__}: {text}"


def where(error: BaseException) -> str:
    """The innermost line that is no library's: what a user can look at."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib"))
    last = ([f for f in frames if Path(f.filename).is_file() and not f.filename.startswith(libraries)] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
