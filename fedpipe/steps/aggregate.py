"""Step aggregate: mix what a round's jobs brought into the next state, whatever folder it came from."""

from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.messages import Filed
from fedpipe.opened import Opened
from fedpipe.packed import Packed
from fedpipe.rounds import Rows, Sent
from fedpipe.states import read_world
from fedpipe.studyfile import load_run

Brought = dict[
    tuple[int, str], list[tuple[dict[str, Any], Packed, Packed]]
]  # of (client, part): metrics, where it lies


def run(
    run: Path, data: Path, partition: Path, plans: Path, route: Path, state: Path, own: Path, trained: list[Path],
    *, next_state: Path, next_own: Path, rounds: Path, curve: Path, times: Path, peaks: Path,
) -> None:  # fmt: skip
    """Write the state after the round of `state`, every own file, the round's metrics and its point of the curve.

    Raises FedpipeError when the job folders lack a client of the round, or an update is not what its plan promises.
    """
    spec = load_run(run)
    opened = Opened(spec, data, partition, plans, route)
    world, t = read_world(state, own, opened.rt.first_state())
    points = opened.evaluated(0, world) if t == 0 else []
    brought: Brought = {}
    for folder in trained:
        update, own_ = Packed(folder / "update.pack"), Packed(folder / "own.pack")
        for m in io.read_table(folder / "metrics.arrow").to_pylist():
            brought.setdefault((m["client"], m["part"]), []).append((m, update, own_))
    sent = [_sent(r, t, brought) for g in opened.groups(t, world) for r in g]
    opened.log(sent)
    world = opened.rounds.mix(t, world, sent)
    points += opened.evaluated(t + 1, world)
    opened.pass_observations(trained)
    opened.write_world(next_state, next_own, world, t + 1)
    opened.write_metrics(rounds, curve, times, peaks, points, t)


def _sent(row: dict[str, Any], t: int, brought: Brought) -> Sent:
    found = brought.get((row["client"], row["part"]))
    if not found:
        raise FedpipeError(f"aggregate: no job folder holds client {row['client']} of round {t}")
    _, update, own = found[0]
    if other := next((u for _, u, _ in found if u is not update), None):
        both = f"{update.path.parent} and {other.path.parent} both"
        raise FedpipeError(f"aggregate: {both} hold client {row['client']} of round {t}")
    rows: Rows = [m for m, _, _ in found]
    name = f"{row['client']}{row['part']}"
    if rows[0]["failed"]:
        return Sent(row, None, {}, rows)
    kept = io.decode(own.image(name), own.said(name))[0] if name in own.images else {}
    return Sent(row, Filed(update.image(name), update.said(name)), kept, rows)
