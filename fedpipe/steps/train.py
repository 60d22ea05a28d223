"""Step train: one job's share of a round. Job j of J trains the groups whose index is j modulo J."""

from pathlib import Path

from fedpipe import io, packed
from fedpipe.errors import FedpipeError
from fedpipe.opened import METRICS, PEAKS, TIMES, Opened
from fedpipe.states import read_world
from fedpipe.studyfile import load_run


def run(
    run: Path, data: Path, partition: Path, plans: Path, route: Path, state: Path, own: Path, *, out: Path,
    job: int = 0, jobs: int = 1,
) -> None:  # fmt: skip
    """Write the folder of what each client sends (`update.pack`) and keeps (`own.pack`), and `metrics.arrow`.

    A job without a group writes an empty table. Raises FedpipeError when a client fails and the study does not drop it.
    """
    if not 0 <= job < jobs:
        raise FedpipeError(f"job: {job} of {jobs} jobs; wanted 0 <= job < jobs")
    opened = Opened(load_run(run), data, partition, plans, route)
    world, t = read_world(state, own, opened.rt.first_state())
    groups = opened.groups(t, world)
    with opened.timed(t):
        sent = opened.rounds.train(t, world, groups[job::jobs])
    opened.log(sent)
    with io.new_folder(out) as folder:
        arrived = [(f"{s.row['client']}{s.row['part']}", s) for s in sent if s.message]
        packed.write(folder / "update.pack", ((name, s.message.image) for name, s in arrived if s.message))
        kept = ((name, io.encode(s.own, {"client": s.row["client"], "round": t})) for name, s in arrived if s.own)
        packed.write(folder / "own.pack", kept)
        io.write_table(folder / "times.obs.parquet", opened.seconds, opened.meta, TIMES)
        io.write_table(folder / "peaks.obs.parquet", opened.rounds.peaks, opened.meta, PEAKS)
        holds = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        io.write_table(
            folder / "metrics.arrow", opened.log_rows, {**opened.meta, "jobs": jobs, "holds": holds}, METRICS
        )
