"""SCAFFOLD with option II, straight from arXiv 1910.06378 algorithm 1, global step 1.

Local step y <- y - lr (g(y) - c_i + c); after K steps c_i+ = c_i - c + (x - y) / (K lr);
server x <- x + mean_S (y - x), c <- c + |S| / N mean_S (c_i+ - c_i).
"""

from collections.abc import Callable, Sequence
from typing import Any

from oracles.plain import Weights


def rounds(
    x: Weights,
    c: Weights,
    ci: dict[int, Weights],
    cohorts: Sequence[Sequence[int]],
    batches: Callable[[int, int], Sequence[Any]],
    gradient: Callable[[Weights, Any], Weights],
    lr: float,
) -> tuple[Weights, Weights, dict[int, Weights]]:
    """(x, c, c_i) after a round of each cohort; `ci` has an entry for all N clients, batches(t, i) are the K steps'."""
    ci, all_clients, at = dict(ci), len(ci), range(len(x))
    for t, cohort in enumerate(cohorts):
        dy, dc = [], []
        for i in cohort:
            y, steps = list(x), 0
            for batch in batches(t, i):
                g = gradient(y, batch)
                y = [y[k] - lr * (g[k] - ci[i][k] + c[k]) for k in at]
                steps += 1
            new = [ci[i][k] - c[k] + (x[k] - y[k]) / (steps * lr) for k in at]
            dy.append([y[k] - x[k] for k in at])
            dc.append([new[k] - ci[i][k] for k in at])
            ci[i] = new
        share = len(cohort) / all_clients
        x = [x[k] + sum(d[k] for d in dy) / len(cohort) for k in at]
        c = [c[k] + share * (sum(d[k] for d in dc) / len(cohort)) for k in at]
    return x, c, ci
