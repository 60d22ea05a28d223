"""Where every artefact of a study lies: one place for the workflow, the command line and the in-process loop."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpipe.config import Partition, Run, Study
from fedpipe.io import canonical, digest, write_text

_SHARED = {"method": {"name": "none"}, "seed": 0, "cohort": 1}


def for_data(run: Run) -> Run:
    """The run with only what decoding the data depends on; everything else as the defaults have it."""
    kept = run.data.partition.column if run.data.partition.kind == "natural" else None
    bare = Partition(kind="natural" if kept else "iid", column=kept)
    return Run.model_validate({**_SHARED, "data": run.data.model_copy(update={"partition": bare}).model_dump()})


def for_partition(run: Run) -> Run:
    """The run with only what sharing the rows out depends on."""
    return Run.model_validate(
        {**_SHARED, "data": run.data.model_dump(), "budgets": run.budgets.model_dump(), "seed": run.seed}
    )


def for_measure(run: Run) -> Run:
    """The run with only what predictions depend on: not the seed, who is there, or how it is evaluated."""
    dropped = {"seed", "availability", "dropout", "evaluate", "stop", "on_client_failure"}
    return Run.model_validate({"seed": 0, **{k: v for k, v in run.spec.items() if k not in dropped}})


def _id(stem: str, run: Run) -> str:
    return f"{stem}-{digest(canonical(run.spec))}"


def data_id(run: Run) -> str:
    return _id(run.data.name.strip("./").replace("/", "-"), for_data(run))


def partition_id(run: Run) -> str:
    return _id(f"{run.data.partition.kind.split('.')[-1]}-s{run.seed}", for_partition(run))


def measure_id(run: Run) -> str:
    return _id(run.id.split("-s")[0], for_measure(run))


@dataclass(frozen=True)
class RunPaths:
    """The files of one run. Rounds are six digits wide so that names sort."""

    root: Path
    run: Run

    @cached_property
    def folder(self) -> Path:
        return self.root / "runs" / self.run.id

    @property
    def spec(self) -> Path:
        return self.folder / "run.json"

    @property
    def data_spec(self) -> Path:
        """What the data step reads: a run with everything it does not depend on left at the defaults."""
        return self.data.with_name("spec.json")

    @property
    def partition_spec(self) -> Path:
        return self.partition.with_name("spec.json")

    @property
    def measure_spec(self) -> Path:
        return self.prediction.with_name("spec.json")

    @cached_property
    def data(self) -> Path:
        return self.root / "data" / data_id(self.run) / "data.arrow"

    @cached_property
    def partition(self) -> Path:
        return self.root / "partition" / partition_id(self.run) / "partition.parquet"

    @property
    def clients(self) -> Path:
        return self.partition.with_name("clients.parquet")

    @cached_property
    def prediction(self) -> Path:
        return self.root / "measure" / measure_id(self.run) / "prediction.parquet"

    @property
    def tried(self) -> Path:
        """Observations of the measure step."""
        return self.prediction.with_name("measure.obs.parquet")

    @property
    def plans(self) -> Path:
        return self.folder / "plans.parquet"

    @property
    def assignment(self) -> Path:
        return self.folder / "assignment.parquet"

    @property
    def route(self) -> Path:
        return self.folder / "route.parquet"

    def state(self, t: int) -> Path:
        return self.folder / "state" / f"{t:06d}"

    def own(self, t: int) -> Path:
        return self.folder / "own" / f"{t:06d}"

    def rounds(self, t: int) -> Path:
        """Metrics of the rounds that end in state t."""
        return self.folder / "rounds" / f"{t:06d}.parquet"

    def curve(self, t: int) -> Path:
        """Pooled test loss and accuracy at the evaluation rounds up to state t."""
        return self.folder / "curve" / f"{t:06d}.parquet"

    def times(self, t: int) -> Path:
        """Seconds of the rounds that end in state t (observation)."""
        return self.rounds(t).with_suffix(".obs.parquet")

    def peaks(self, t: int) -> Path:
        """Measured peaks of the witnesses of these rounds (observation)."""
        return self.rounds(t).with_suffix(".peaks.obs.parquet")

    def train(self, round: int, job: int) -> Path:
        """What one of a round's jobs has trained."""
        return self.folder / "train" / f"{round:06d}" / str(job)

    @property
    def chosen(self) -> list[Path]:
        """The file the values of this run's grids are read from; none where it has no grid."""
        return [self.root / "select" / self.run.selection / "chosen.parquet"] if self.run.selection else []

    @property
    def select_spec(self) -> Path:
        """The run with the seed its grids are tuned at, and its grids."""
        return self.chosen[0].with_name("spec.json")

    @property
    def tuned(self) -> list[Path]:
        """Metrics of the runs that this run's settings are selected by."""
        return [RunPaths(self.root, c).metrics for c in self.run.candidates]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.parquet"


@dataclass(frozen=True)
class StudyPaths:
    """The files of a study under its results folder."""

    root: Path
    study: Study

    @cached_property
    def runs(self) -> list[RunPaths]:
        return [RunPaths(self.root, r) for r in self.study.runs()]

    @property
    def compared(self) -> list[RunPaths]:
        """The runs the table is made of: all but those that values are selected by."""
        return [RunPaths(self.root, r) for r in self.study.compared()]

    @property
    def spec(self) -> Path:
        return self.root / "study.json"

    @property
    def table(self) -> Path:
        return self.root / "table.parquet"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def write_specs(self) -> None:
        """Write the study and run specifications the steps read; files of equal content are left, others named."""
        texts = {self.spec: self.study.model_dump_json(indent=1)}
        for p in self.runs:
            narrowed = {p.data_spec: for_data, p.partition_spec: for_partition, p.measure_spec: for_measure}
            texts |= {p.spec: canonical(p.run.spec)}
            if p.run.select:
                grids = p.run.but(seed=p.run.select.seed, select=None, selection=None)
                texts |= {p.select_spec: canonical(grids.spec)}
            texts |= {path: canonical(narrow(p.run).spec) for path, narrow in narrowed.items() if path not in texts}
        for path, text in texts.items():
            if path != self.spec and path.is_file() and path.read_bytes() != f"{text}\n".encode():
                print(
                    f"fedpipe: {path}: damaged; writing it again", file=sys.stderr
                )  # its folder is named by its content
            write_text(path, text + "\n")


def segments(rounds: int, every: int) -> list[tuple[int, int]]:
    """(first, last) states of the segments of a run: (0, every), (every, 2 every), ..."""
    return [(t, min(t + every, rounds)) for t in range(0, rounds, every)]


KEEP = ("last", "segments", "all")


def lasting(study: Study, every: int, keep: str) -> set[int]:
    """Rounds whose state outlives its use: the last one (`last`), every end of a segment of `every` rounds and every
    evaluation (`segments`), or all."""
    if keep == "last":
        return {study.rounds}
    ends = {last for _, last in segments(study.rounds, every)}
    return set(range(1, study.rounds + 1)) if keep == "all" else {*ends, *study.runs()[0].evaluations} - {0}
