"""What a table says of its anchors and of published differences, as sentences."""

from collections.abc import Iterator
from math import sqrt
from statistics import fmean, stdev

from fedpipe.config import Study
from fedpipe.report.intervals import interval
from fedpipe.report.results import Row

Scores = dict[str, dict[int, float]]  # accuracy in points, by label and seed


def remarks(study: Study, rows: list[Row]) -> list[str]:
    """Sentences on a study's anchors and claims, of its runs' summaries; none where it has neither."""
    scores: Scores = {}
    for r in rows:
        if r["accuracy"] is not None:
            scores.setdefault(r["label"], {})[r["seed"]] = 100 * r["accuracy"]
    return [*_anchors(study, scores), *_claims(study, scores)]


def _pairs(scores: Scores, one: str, other: str) -> list[float]:
    a, b = scores.get(one, {}), scores.get(other, {})
    return [a[s] - b[s] for s in a if s in b]


def _above(pairs: list[float]) -> bool:
    """Whether the mean is more than two standard errors above 0; what a single pair is nobody can say."""
    return len(pairs) > 1 and fmean(pairs) > 2 * stdev(pairs) / sqrt(len(pairs))


def _anchors(study: Study, scores: Scores) -> Iterator[str]:
    if (a := study.anchors) is None:
        return
    wrong = []
    if not _above(_pairs(scores, a.above, a.below)):
        wrong.append(f"{a.above} is not more than two standard errors above {a.below}")
    for other in a.others:
        pairs = _pairs(scores, a.below, other)
        if len(pairs) < 2:
            wrong.append(f"{other} has no two seeds in common with {a.below}")
        elif _above(pairs):
            wrong.append(f"{other} is more than two standard errors below {a.below}")
    if wrong:
        yield f"This table is void: {'; '.join(wrong)}."
    else:
        kept = f", and {', '.join(a.others)} not below it" if a.others else ""
        yield f"Anchors hold: {a.above} is more than two standard errors above {a.below}{kept}."


def _claims(study: Study, scores: Scores) -> Iterator[str]:
    for claim in study.claims:
        known = [o for o in claim.against if o in scores]
        best = max(known, key=lambda o: fmean(scores[o].values()), default=None)
        pairs = _pairs(scores, claim.method, best) if best else []
        if not pairs:
            yield f"{claim.method} against {', '.join(claim.against)}: not measured. Published: {claim.published}."
            continue
        found = f"{fmean(pairs):+.2f} points"
        d = interval(pairs)
        if (low := d["low"]) is not None and (high := d["high"]) is not None:
            told = "the interval excludes 0" if low > 0 or high < 0 else "no difference is shown"
            found += f" [{low:+.2f}, {high:+.2f}], {told}"
        of = f", the best of {', '.join(claim.against)}" if len(claim.against) > 1 else ""
        yield f"{claim.method} against {best}{of}: {found}. Published: {claim.published}."
