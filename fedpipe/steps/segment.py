"""Step segment: K rounds in one process, from one state to a later one. Rounds are those of `train` and `aggregate`."""

from contextlib import nullcontext
from pathlib import Path

from fedpipe.opened import Opened
from fedpipe.report.terminal import Progress
from fedpipe.states import read_world
from fedpipe.studyfile import load_run


def run(
    run: Path, data: Path, partition: Path, plans: Path, route: Path, state: Path, own: Path, last: int,
    *, next_state: Path, next_own: Path, rounds: Path, curve: Path, times: Path, peaks: Path,
) -> None:  # fmt: skip
    """Train and mix from the round of `state` up to state `last`; write it, every own file, metrics and test curve.

    Once the study's `stop` is met, at whatever state, nobody trains and nothing is evaluated: states are handed on.

    Raises FedpipeError when the platform is not that of state 0, or a client fails and the study does not drop it.
    """
    spec = load_run(run)
    opened = Opened(spec, data, partition, plans, route)
    world, first = read_world(state, own, opened.rt.first_state())
    points = opened.evaluated(0, world) if first == 0 else []
    with Progress(f"{spec.label} seed {spec.seed}", spec.rounds, first) as progress:
        for t in range(first, last):
            with opened.timed(t) if world.watch.stopped is None else nullcontext():
                world = opened.round(t, world)
            world.states = opened.still_needed(world.states, t + 1)
            points += opened.evaluated(t + 1, world)
            progress.advance(t + 1, points[-1]["accuracy"] if points else None)
    opened.write_world(next_state, next_own, world, last)
    opened.write_metrics(rounds, curve, times, peaks, points, first)
