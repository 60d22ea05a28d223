"""One byte flipped in, or the loss of, each kind of artefact: named, and made again by the same command."""

import shutil
from pathlib import Path

import pytest
import yaml
from test_pipeline import run_of, snakemake

from fedpipe.__main__ import main
from fedpipe.fingerprint import fingerprint
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.studyfile import load_study

STUDY = {
    "name": "damaged",
    "data": {"name": "digits", "rows": 200, "size": 8, "partition": {"kind": "iid", "clients": 4, "val": 0.2}},
    "model": {"name": "mlp"},
    "methods": ["scaffold", {"fedprox": {"mu": {"grid": [0.0, 0.5]}}}],
    "rounds": 4,
    "cohort": 2,
    "seeds": [0, 1],
    "select": {"on": "validation", "seed": 0},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("damage") / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def run(study: Path, out: Path) -> None:
    assert main(["run", str(study), "--out", str(out), "--segment", "2", "--keep", "segments"]) == 0


@pytest.fixture(scope="module")
def done(study: Path) -> tuple[Path, str]:
    """The study in this process, states of segments kept; and its digest."""
    out = study.parent / "done"
    run(study, out)
    return out, fingerprint(out)


def kinds(p: RunPaths, tuned: RunPaths, root: Path) -> dict[str, Path]:
    """One file of each kind that a study's folder holds."""
    own = next(p.own(2).glob("*.safetensors"))
    found = {
        "data": p.data,
        "partition": p.partition,
        "clients": p.clients,
        "histogram": p.clients.with_name("histogram.png"),
        "chosen": tuned.chosen[0],
        "prediction": p.prediction,
        "tried": p.tried,
        "plans": p.plans,
        "assignment": p.assignment,
        "route": p.route,
        "first_state": p.state(0) / "server@0.safetensors",
        "state": p.state(2) / "server@2.safetensors",
        "own": own,
        "last_state": p.state(4) / "server@4.safetensors",
        "last_own": p.own(4) / own.name if (p.own(4) / own.name).is_file() else next(p.own(4).glob("*.safetensors")),
        "rounds": p.rounds(2),
        "curve": p.curve(4),
        "times": p.times(2),
        "peaks": p.peaks(2),
        "metrics": p.metrics,
        "table": root / "table.parquet",
        "observed": root / "table.obs.parquet",
        "text": root / "table.md",
        "tex": root / "table.tex",
        "figure": root / "figures/accuracy_rounds.svg",
        "picture": root / "figures/accuracy_rounds.png",
        "report": root / "report.html",
        "run": p.spec,
        "spec": p.measure_spec,
        "study": root / "study.json",
    }
    assert all(f.is_file() for f in found.values())
    return found


KINDS = [
    "data",
    "partition",
    "clients",
    "histogram",
    "chosen",
    "prediction",
    "tried",
    "plans",
    "assignment",
    "route",
    "first_state",
    "state",
    "own",
    "last_state",
    "last_own",
    "rounds",
    "curve",
    "times",
    "peaks",
    "metrics",
    "table",
    "observed",
    "text",
    "tex",
    "figure",
    "picture",
    "report",
    "run",
    "spec",
    "study",
]
SPECS = ("run", "spec", "study")  # written anew by every command: a lost one, or another study, is no matter


def of_kind(out: Path, study: Path, kind: str) -> Path:
    tuned = next(p for p in StudyPaths(out, load_study(study)).runs if p.run.selection)
    found = kinds(run_of(out, study, "scaffold"), tuned, out)
    assert list(found) == KINDS
    return found[kind]


def spoil(file: Path, how: str) -> None:
    """Hard links are broken first: the damage is to be this file's alone."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.unlink()
    if how == "flip":
        file.write_bytes(raw)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "delete"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_process(
    kind: str, how: str, study: Path, done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, digest = done
    file = of_kind(out, study, kind)
    spoil(file, how)
    run(study, out)
    if kind not in SPECS or (how == "flip" and kind != "study"):
        assert f"{file}: " in capsys.readouterr().err
    assert file.is_file() and fingerprint(out) == digest
    capsys.readouterr()
    run(study, out)
    assert "nothing to do, every step is done" in capsys.readouterr().err


# Of every rule at least one output, so that each is seen to run again.
BY_RULE = [
    "partition delete",
    "histogram delete",
    "chosen flip",
    "tried delete",
    "route flip",
    "first_state delete",
    "state flip",
    "last_own delete",
    "rounds flip",
    "peaks delete",
    "metrics flip",
    "figure delete",
    "report flip",
]


@pytest.fixture(scope="module")
def flow(study: Path) -> Path:
    """The study by Snakemake."""
    out = study.parent / "flow"
    snakemake(study, out, "-c2", segment=2, keep="segments", worker=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("what", BY_RULE)
def test_by_the_workflow(what: str, study: Path, flow: Path, done: tuple[Path, str]) -> None:
    kind, how = what.split()
    file = of_kind(flow, study, kind)
    spoil(file, how)
    said = snakemake(study, flow, "-c2", segment=2, keep="segments", worker=True)
    assert f"fedpipe: {file}: {'damaged' if how == 'flip' else 'missing'}; making it again" in said
    assert file.is_file() and fingerprint(flow) == done[1]


def test_only_what_depends_on_it_runs_again(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state in the middle: the segments of that run from there on; a curve: its own segment and those after it."""
    out = tmp_path / "out"
    command = ["run", str(study), "--out", str(out), "--segment", "1", "--keep", "all", "--methods", "scaffold"]
    assert main(command) == 0
    p, before = run_of(out, study, "scaffold"), fingerprint(out)
    kept = {f: f.stat().st_mtime_ns for f in out.rglob("*.parquet") if f.is_file()}
    spoil(p.rounds(3), "flip")
    shutil.rmtree(p.state(2))
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{p.rounds(3)}: damaged; making it again" in said
    assert f"{p.state(2) / 'server@2.safetensors'}: missing; making it again" in said
    assert fingerprint(out) == before
    again = {f for f, t in kept.items() if f.stat().st_mtime_ns != t}
    assert {p.rounds(3)} <= again and not again & {p.plans, p.rounds(1), p.metrics, p.prediction}
