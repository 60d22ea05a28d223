"""Whole studies, every way of running: one digest."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from fedpipe import io
from fedpipe.__main__ import main
from fedpipe.fingerprint import fingerprint
from fedpipe.packed import Packed
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.studyfile import load_study

ROOT = Path(__file__).parent.parent
IDENT = {
    "name": "ident",
    "data": {"name": "digits", "rows": 400, "size": 8, "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 8}},
    "model": {"name": "mlp", "hidden": [48] * 7},
    "methods": ["fedavg", "fedepth", "scaffold"],
    "rounds": 20,
    "cohort": 4,
    "local": {"epochs": 1, "batch": 32, "optimizer": {"lr": 0.1}},
    "budgets": {"bytes": {"130000": 3, "1MiB": 5}},
}


KINDS = ("state", "own", "rounds.parquet", "curve.parquet", "times.obs.parquet", "peaks.obs.parquet")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "ident.yaml"
    file.write_text(yaml.safe_dump(IDENT))
    return file


@pytest.fixture(scope="module")
def out(study: Path) -> Path:
    """The study run in this process, in one segment."""
    assert main(["run", str(study), "--out", str(study.parent / "whole"), "--segment", "20"]) == 0
    return study.parent / "whole"


def snakemake(study: Path, out: Path, *options: str, workdir: Path | None = None, **config: object) -> str:
    chosen = [f"study={study}", f"out={out}", *(f"{k}={v}" for k, v in config.items())]
    done = subprocess.run(
        # a working directory of its own: two workflows that start at once in one trip over each other's locks
        [sys.executable, "-m", "snakemake", *options, "--directory", workdir or out, "--config", *chosen],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_of(out: Path, study: Path, method: str) -> RunPaths:
    return next(p for p in StudyPaths(out, load_study(study)).runs if p.run.method.name == method)


def test_the_study_is_not_trivial(study: Path, out: Path) -> None:
    """Partial participation, stacks above one, clients that keep state, states that moved."""
    p = run_of(out, study, "scaffold")
    rows = [r for r in io.read_table(p.route).to_pylist() if r["kind"] == "train"]
    assert {r["client"] for r in rows} == {3, 4, 5, 6, 7}, "the budget of the first three is too small"
    assert set(Counter(r["round"] for r in rows).values()) >= {1, 2, 3}
    assert max(Counter((r["round"], r["group"]) for r in rows).values()) > 1
    assert sum(r["witness"] for r in rows) == 1
    assert {f.name.split("@")[0] for f in p.own(20).iterdir()} == {str(r["client"]) for r in rows}
    depth = io.read_table(run_of(out, study, "fedepth").plans).to_pylist()
    assert sorted(Counter(r["plan"] for r in depth).values()) == [1, 4]
    curve = io.read_table(p.curve(20)).to_pylist()
    assert [c["round"] for c in curve] == list(range(21)) and len({c["loss"] for c in curve}) > 15


def test_segments_change_no_bit(study: Path, out: Path) -> None:
    other = study.parent / "fives"
    assert main(["run", str(study), "--out", str(other), "--segment", "5"]) == 0
    assert len(list(run_of(other, study, "fedavg").folder.glob("rounds/*0.parquet"))) == 2
    assert fingerprint(other) == fingerprint(out)


@pytest.mark.parametrize(("jobs", "segment", "trained"), [("-j1", 20, (0, 3)), ("-j2", 5, (9, 3))])
def test_snakemake_gives_the_same_bytes(
    jobs: str, segment: int, trained: tuple[int, int], study: Path, out: Path
) -> None:
    other = study.parent / f"snakemake{jobs}"
    said = snakemake(study, other, jobs, segment=segment)
    counts = [re.search(rf"^{rule} +(\d+)$", said, re.MULTILINE) for rule in ("segment", "segment_kept")]
    assert tuple(int(c[1]) if c else 0 for c in counts) == trained
    assert "scaffold seed 0: round 20/20" in said, "progress is seen"
    assert fingerprint(other) == fingerprint(out)
    for method in IDENT["methods"]:
        ours, theirs = (run_of(o, study, method).state(20) / "server@20.safetensors" for o in (out, other))
        assert ours.read_bytes() == theirs.read_bytes()
    assert "Nothing to be done" in snakemake(study, other, jobs, segment=segment)


def test_another_seed_gives_another_digest(study: Path, out: Path) -> None:
    other = study.parent / "seed1"
    assert main(["run", str(study), "--out", str(other), "--set", "seeds=[1]", "--methods", "fedavg"]) == 0
    states = [next((o / "runs").glob("fedavg-*/state/000020/*")).read_bytes() for o in (out, other)]
    assert states[0] != states[1] and fingerprint(other) != fingerprint(out)


def test_a_second_run_does_nothing(study: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f: f.stat().st_mtime_ns for f in out.rglob("[!.]*") if f.is_file()}
    begin = time.monotonic()
    assert main(["run", str(study), "--out", str(out), "--segment", "20"]) == 0
    assert time.monotonic() - begin < 5
    assert "nothing to do, every step is done" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in out.rglob("[!.]*") if f.is_file()} == before


@pytest.mark.parametrize("jobs", [1, 3])
def test_train_and_aggregate_as_files_are_the_segment(jobs: int, study: Path, out: Path, tmp_path: Path) -> None:
    """Two rounds by single steps, J job folders a round, against the states of segments of one round."""
    p = run_of(out, study, "scaffold")
    world = ["--run", p.spec, "--data", p.data, "--partition", p.partition, "--plans", p.plans, "--route", p.route]
    state, own = p.state(0), p.own(0)
    for t in range(2):
        folders = [tmp_path / f"{t}-{j}" for j in range(jobs)]
        for j, folder in enumerate(folders):
            share = ["--state", state, "--own", own, "--out", folder, "--job", j, "--jobs", jobs]
            assert main([str(a) for a in ["train", *world, *share]]) == 0
        assert sum(len(Packed(f / "update.pack").images) for f in folders) >= 2
        to = [tmp_path / f"{t}-{kind}" for kind in KINDS]
        write = ["--next-state", to[0], "--next-own", to[1], "--rounds", to[2], "--curve", to[3]]
        write += ["--times", to[4], "--peaks", to[5]]
        assert (
            main([str(a) for a in ["aggregate", *world, "--state", state, "--own", own, "--trained", *folders, *write]])
            == 0
        )
        state, own = to[0], to[1]
    to = [tmp_path / f"segment-{kind}" for kind in KINDS]
    write = ["--next-state", to[0], "--next-own", to[1], "--rounds", to[2], "--curve", to[3]]
    write += ["--times", to[4], "--peaks", to[5]]
    assert (
        main([str(a) for a in ["segment", *world, "--state", p.state(0), "--own", p.own(0), "--last", 2, *write]]) == 0
    )
    for mine, other in ((state, to[0]), (own, to[1])):
        names = sorted(f.name for f in other.iterdir())
        assert names and names == sorted(f.name for f in mine.iterdir())
        assert all((mine / n).read_bytes() == (other / n).read_bytes() for n in names)


# ------------------------------------------------------------------------------------------------------ whole studies
@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    """One seed of the first study: four budgets, four plans; weak clients of the plain method left out, idle rounds."""
    study = ROOT / "workflows/studies/quickstart.yaml"
    snakemake(study, tmp_path, "-c2", seeds="[0]")
    rows = {r["label"]: r for r in io.read_table(tmp_path / "table.parquet").to_pylist()}
    plain, depth = rows["fedavg"], rows["fedepth"]
    assert (plain["taking_part"], plain["left_out"], depth["taking_part"], depth["left_out"]) == (10, 30, 40, 0)
    assert plain["idle_rounds"] > 0 and depth["idle_rounds"] == 0
    assert depth["accuracy"] > plain["accuracy"] and depth["accuracy"] > 0.5
    assigned = io.read_table(run_of_first(tmp_path, study, "fedepth").assignment).to_pylist()
    plans = {r["group"]: r["plan"] for r in assigned}
    assert len(plans) == 4 and len(set(plans.values())) == 4
    phases = Counter(r["plan"] for r in io.read_table(run_of_first(tmp_path, study, "fedepth").plans).to_pylist())
    assert min(phases.values()) == 1 and max(phases.values()) >= 3
    for peaks in tmp_path.glob("runs/*/rounds/*.peaks.obs.parquet"):
        assert all(r["measured"] <= r["budget"] for r in pq.read_table(peaks).to_pylist())
    assert "<svg" in (tmp_path / "report.html").read_text()


def run_of_first(out: Path, study: Path, method: str) -> RunPaths:
    return next(p for p in StudyPaths(out, load_study(study, ["seeds=[0]"])).runs if p.run.method.name == method)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_data(tmp_path: Path) -> None:
    study = ROOT / "workflows/studies/cifar10_smoke.yaml"
    snakemake(study, tmp_path, "-c2")
    for method in ("fedavg", "fedepth"):
        curve = io.read_table(run_of(tmp_path, study, method).curve(3)).to_pylist()
        assert [c["round"] for c in curve] == [0, 1, 2, 3]
        assert curve[3]["loss"] < curve[0]["loss"] and curve[3]["accuracy"] >= 0.15
    rows = {r["label"]: r for r in io.read_table(tmp_path / "table.parquet").to_pylist()}
    assert rows["fedavg"]["left_out"] > 0 and rows["fedepth"]["left_out"] == 0


@pytest.mark.slow
@pytest.mark.real_data
def test_another_image_set_by_its_data_line_alone(tmp_path: Path) -> None:
    lines = (ROOT / "workflows/studies/cifar10_smoke.yaml").read_text().splitlines(keepends=True)
    other = (
        "data: {name: mnist_writers, label: label, rows: 3000, partition: {kind: dirichlet, alpha: 0.3, clients: 20}}\n"
    )
    study = tmp_path / "mnist.yaml"
    study.write_text("".join(other if line.startswith("data:") else line for line in lines))
    assert main(["run", str(study), "--out", str(tmp_path / "out"), "--methods", "fedepth"]) == 0
    curve = io.read_table(run_of(tmp_path / "out", study, "fedepth").curve(3)).to_pylist()
    assert curve[3]["samples"] == 600 and curve[3]["loss"] < curve[0]["loss"]
