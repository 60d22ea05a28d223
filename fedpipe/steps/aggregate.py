"""Step aggregate: mix what a round's jobs brought into the next state, whatever folder it came from."""

from pathlib import Path
from typing import Any

from fedpipe import io
from fedpipe.errors import FedpipeError
from fedpipe.opened import Opened
from fedpipe.rounds import Rows, Sent
from fedpipe.states import read_world
from fedpipe.studyfile import load_run


def run(
    run: Path, data: Path, partition: Path, plans: Path, route: Path, state: Path, own: Path, trained: list[Path],
    *, next_state: Path, next_own: Path, rounds: Path, curve: Path, times: Path, peaks: Path,
) -> None:  # fmt: skip
    """Write the state after the round of `state`, every own file, the round's metrics and its point of the curve.

    Raises FedpipeError when the job folders lack a client of the round, or an update is not what its plan promises.
    """
    spec = load_run(run)
    opened = Opened(spec, data, partition, plans, route)
    world, t = read_world(state, own, opened.rt.state0)
    points = opened.evaluated(0, world) if t == 0 else []
    metrics: dict[tuple[int, str], list[tuple[dict[str, Any], Path]]] = {}
    for folder in trained:
        for m in io.read_table(folder / "metrics.arrow").to_pylist():
            metrics.setdefault((m["client"], m["part"]), []).append((m, folder))
    sent = [_sent(r, t, metrics) for g in opened.groups(t, world) for r in g]
    opened.log(sent)
    world = opened.rounds.mix(t, world, sent)
    points += opened.evaluated(t + 1, world)
    opened.pass_observations(trained)
    opened.write_world(next_state, next_own, world, t + 1)
    opened.write_metrics(rounds, curve, times, peaks, points, t)


def _sent(row: dict[str, Any], t: int, metrics: dict[tuple[int, str], list[tuple[dict[str, Any], Path]]]) -> Sent:
    found = metrics.get((row["client"], row["part"]))
    if not found:
        raise FedpipeError(f"aggregate: no job folder holds client {row['client']} of round {t}")
    if len({str(folder) for _, folder in found}) > 1:
        raise FedpipeError(f"aggregate: {found[0][1]} and {found[-1][1]} both hold client {row['client']} of round {t}")
    rows: Rows = [m for m, _ in found]
    name, folder = f"{row['client']}{row['part']}@{t}.safetensors", found[0][1]
    if rows[0]["failed"]:
        return Sent(row, None, {}, rows)
    kept, update = folder / "own" / name, folder / "update" / name
    io.read_meta(update)  # a damaged update is named by its file
    return Sent(row, update.read_bytes(), io.read_tensors(kept)[0] if kept.is_file() else {}, rows)
