"""What a results folder holds and what of it nothing needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from fedpipe import disk, guard
from fedpipe.__main__ import main
from fedpipe.fingerprint import fingerprint
from fedpipe.io import link
from fedpipe.paths import StudyPaths
from fedpipe.studyfile import load_study


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A study of two rounds, every state kept; its first method has been replaced since."""
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(TINY))
    command = ["run", str(study), "--out", str(tmp_path / "out"), "--segment", "1", "--keep", "all", "--methods"]
    assert main([*command, "fedavg"]) == main([*command, "scaffold"]) == 0
    return tmp_path / "out"


def test_du_counts_linked_files_once(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = dict(disk.usage(out))
    (run,) = StudyPaths(out, load_study(out / "study.json")).runs
    assert parts[f"runs/{run.run.id}/state"] == sum(f.stat().st_size for f in run.folder.glob("state/*/*"))
    assert set(parts) >= {"data", "partition", "measure", "table.parquet"}
    link(run.state(2) / "server@2.safetensors", out / "linked.safetensors")
    assert sum(dict(disk.usage(out)).values()) == sum(parts.values())
    capsys.readouterr()
    assert main(["du", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f"MiB  {out}") and len(lines) == len(parts) + 2


def test_gc_removes_what_nothing_needs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = StudyPaths(out, load_study(out / "study.json")).runs
    last = (run.state(2) / "server@2.safetensors").read_bytes()
    (out / "runs/.state.host.1.abc.tmp").mkdir()
    digest = [(t, b) for t, b in disk.usage(out) if run.run.id in t and "state" not in t and "own" not in t]
    gone = {f.relative_to(out).parts[0] for f in disk.unneeded(out)}
    assert gone == {"runs", "measure"}, "the other method's run and prediction, a state and own folder of this one"
    wanted = {run.state(1), run.own(1), out / "runs/.state.host.1.abc.tmp"}
    assert wanted < set(disk.unneeded(out)) and not {run.state(2), run.folder} & set(disk.unneeded(out))
    assert main(["gc", str(out)]) == 0 and "with --yes" in capsys.readouterr().err
    assert wanted < set(disk.unneeded(out)), "listed, not removed"
    assert main(["gc", str(out), "--yes"]) == 0
    assert list(disk.unneeded(out)) == [] and len(list(out.glob("runs/*"))) == 1
    assert [(t, b) for t, b in disk.usage(out) if run.run.id in t and "state" not in t and "own" not in t] == digest
    assert fingerprint(out) and (run.state(2) / "server@2.safetensors").read_bytes() == last


def test_gc_is_refused_beside_a_command_at_work_and_elsewhere(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with guard.held(out):
        done = subprocess.run([sys.executable, "-m", "fedpipe", "gc", str(out)], capture_output=True, text=True)
    assert done.returncode == 2 and "another command is at work here" in done.stderr
    capsys.readouterr()
    assert main(["gc", str(out / "runs")]) == main(["du", str(out / "nowhere")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "study.json: no such file" in said[0] and "nowhere: no such folder" in said[1]
