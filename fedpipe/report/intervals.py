"""What a few seeds say: intervals of means and p values of paired differences. Of scipy its functions alone: its tests
take a second to import."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtr, stdtrit


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1) and the 95 % t-interval of the mean; null where too few values give none."""
    mean = fmean(values) if values else None
    if mean is None or len(values) < 2:
        return {"mean": mean, "std": None, "low": None, "high": None}
    spread = stdev(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * spread / sqrt(len(values))
    return {"mean": mean, "std": spread, "low": mean - half, "high": mean + half}


def p_value(pairs: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test that the mean of differences is 0; null for fewer than two."""
    if len(pairs) < 2:
        return None
    spread = stdev(pairs) / sqrt(len(pairs))
    return 2 * float(stdtr(len(pairs) - 1, -abs(fmean(pairs)) / spread)) if spread else float(not fmean(pairs))


def holm(values: list[float | None]) -> list[float | None]:
    """Holm's adjustment of the p values of one column, 1979: together they err with no more than their bound."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    out, worst = list(values), 0.0
    for k, (p, i) in enumerate(order):
        out[i] = worst = max(worst, min(1.0, p * (len(order) - k)))
    return out
