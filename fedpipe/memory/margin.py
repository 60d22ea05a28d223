"""The share of a budget that stays free above a predicted peak."""


def with_margin(peak: int, margin: float) -> int:
    """Bytes a budget must have for a predicted peak: more by a share of it."""
    return int(peak * (1 + margin)) + 1 if margin else peak


def without_margin(budget: int, margin: float) -> int:
    """The largest peak whose bytes with margin a budget holds."""
    peak = int(budget / (1 + margin))
    return next(p for p in range(peak + 1, -2, -1) if with_margin(p, margin) <= budget)
