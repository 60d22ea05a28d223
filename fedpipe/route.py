"""Routes: who starts from which state and who averages what, as rows. The engine adds plan, group, own and reply."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fedpipe.config import Run
from fedpipe.context import RouteCtx
from fedpipe.rng import rng
from fedpipe.types import Mix, Plan, Train

SCHEMA = pa.schema(
    [("kind", pa.string()), ("round", pa.int32()), ("client", pa.int32()), ("part", pa.string())]
    + [("start", pa.string()), ("own", pa.int32()), ("reply", pa.string()), ("plan", pa.string())]
    + [
        ("budget", pa.int64()),
        ("group", pa.int32()),
        ("witness", pa.bool_()),
        ("out", pa.string()),
        ("base", pa.string()),
    ]
    + [("updates", pa.list_(pa.string())), ("states", pa.list_(pa.string())), ("owner", pa.string())]
)


def star(ctx: RouteCtx) -> Iterator[Train | Mix]:
    """Server and cohort: everybody drawn starts from the server's state, the server averages what comes back."""
    for t in range(ctx.rounds):
        cohort = list(ctx.cohort(t))
        yield from (Train(t, i, f"server@{t}") for i in cohort)
        yield Mix(t, f"server@{t + 1}", f"server@{t}", tuple(Train(t, i, "").id for i in cohort))


def thinned(rows: Iterable[Train | Mix], run: Run) -> Iterator[Train | Mix]:
    """Rows without the clients that are not there, and Mix rows without the updates that do not come back.

    The draws are a client's in a round, whatever the method: a client that is not there has no row; one that drops
    out received the model and trained, and keeps what it keeps, but nobody gets its update.
    """

    def there(client: int, round: int) -> bool:
        return run.availability == 1 or bool(rng(run.seed, round, client, "availability").random() < run.availability)

    def reports(client: int, round: int) -> bool:
        return run.dropout == 0 or bool(rng(run.seed, round, client, "dropout").random() >= run.dropout)

    for r in rows:
        if isinstance(r, Mix):
            clients = [int(u.split(":")[0]) for u in r.updates]
            came = (u for u, c in zip(r.updates, clients, strict=True) if there(c, r.round) and reports(c, r.round))
            yield replace(r, updates=tuple(came))
        elif there(r.client, r.round):
            yield r


def _witnesses(
    rows: list[Train | Mix], plan_of: Callable[[int, int], str | None], full_batch: Callable[[int], bool]
) -> set[Train]:
    """The row of each plan whose client is measured: the first with a full batch, else the first at all."""
    found: dict[str, Train] = {}
    trains = (r for r in rows if isinstance(r, Train))
    for r in sorted(trains, key=lambda r: (not full_batch(r.client), r.round)):
        if pid := plan_of(r.client, r.round):
            found.setdefault(pid, r)
    return set(found.values())


def schedule(
    rows: Iterable[Train | Mix],
    plan_of: Callable[[int, int], str | None],
    plans: dict[str, Plan],
    stack_key: Callable[[int, str], Any],
    stack_size: int,
    full_batch: Callable[[int], bool],
) -> list[dict[str, Any]]:
    """Rows of `route.parquet`.

    plan_of(client, round) names a plan or None (the client sits out); stack_key(client, plan) says who may be trained
    together, at most stack_size; full_batch(client) whether its batches have the study's size. The witness of a
    plan is a group of its own.
    """
    order = list(rows)
    witnesses = _witnesses(order, plan_of, full_batch)
    out: list[dict[str, Any]] = []
    last_own: dict[int, int] = {}
    made: dict[str, str] = {}  # id of a Train row -> the state its last update went into
    groups: dict[tuple[Any, ...], tuple[int, int]] = {}  # key -> (group, members)
    count, at_round, kept = 0, -1, list[tuple[int, int]]()
    for r in order:
        if r.round != at_round:
            last_own.update(kept)
            count, at_round, groups, kept = 0, r.round, {}, []
        if isinstance(r, Mix):
            came = [u for u in r.updates if plan_of(int(u.split(":")[0]), r.round)]
            made |= {u: r.out for u in came}
            mixed = {"kind": "mix", "round": r.round, "part": "", "out": r.out, "base": r.base}
            out.append({**mixed, "updates": came, "states": list(r.states), "owner": r.owner})
            continue
        pid = plan_of(r.client, r.round)
        if pid is None:
            continue
        alone = r in witnesses or stack_size == 1
        slot = (r.client, r.part) if alone else (pid, stack_key(r.client, pid))
        group, members = groups.get(slot, (-1, stack_size))
        if members >= stack_size:
            group, members, count = count, 0, count + 1
        groups[slot] = (group, members + 1)
        if plans[pid].keep:
            kept.append((r.client, r.round))
        out.append(
            {"kind": "train", "round": r.round, "client": r.client, "part": r.part, "start": r.start, "plan": pid}
            | {"own": last_own.get(r.client), "reply": made.get(r.id) if plans[pid].reply else None}
            | {"group": group, "witness": r in witnesses}
        )
    return out


def reads(row: dict[str, Any]) -> list[str]:
    """States that a row reads."""
    return [row[k] for k in ("start", "reply", "base") if row.get(k)] + [*(row.get("states") or ())]


def judged(newest: dict[str, str]) -> set[str]:
    """Of the newest state of each node, those that stand for the run: the server's, or all where there is none."""
    return {newest["server"]} if "server" in newest else set(newest.values())


def needed_states(rows: list[dict[str, Any]], t: int) -> set[str]:
    """States that rows of round t or later read, and those that stand for the run after the rounds before t."""
    newest: dict[str, str] = {}
    needed = set()
    for r in rows:
        if r["round"] < t and r["kind"] == "mix":
            newest[r["out"].split("@")[0]] = r["out"]
        elif r["round"] >= t:
            needed |= {*reads(r)}
    made_later = {r["out"] for r in rows if r["kind"] == "mix" and r["round"] >= t}
    return (needed - made_later) | judged(newest)
