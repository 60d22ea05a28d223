"""Profiles: what the cluster's makes of a workflow, and a study run through stand-ins for Slurm's commands."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY
from snakemake.cli import parse_args

from fedpipe.__main__ import main
from fedpipe.fingerprint import fingerprint

CLUSTER = ROOT / "tests/cluster"  # sbatch, squeue, ...: jobs are processes of this machine
QUICKSTART = ROOT / "workflows/studies/quickstart.yaml"
EXECUTORS = {"profiles/local": "None", "profiles/slurm": "'slurm'"}  # none named: the local one


def snakemake(*arguments: str, limit: int = 60, **environment: str) -> str:
    """Standard output and error of a snakemake command in the repository's root that ends well."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def jobs(text: str) -> dict[str, int]:
    table = text.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def resources(text: str) -> dict[str, dict[str, str]]:
    """Resources of each rule's last job, from what a dry run prints."""
    found = re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", text, re.MULTILINE)
    return {rule: dict(item.split("=", 1) for item in line.split(", ")) for rule, line in found}


def settings(*arguments: str) -> dict[str, str]:
    """What Snakemake makes of a command line in the repository's root, profiles included."""
    with contextlib.chdir(ROOT):
        found = vars(parse_args(list(arguments))[1])
    return {key: re.sub(r" at 0x\w+", "", repr(value)) for key, value in found.items()}


def test_every_profile_has_its_executor() -> None:
    assert {f"profiles/{p.name}" for p in (ROOT / "profiles").iterdir()} == {*EXECUTORS, "profiles/default"}
    for profile, executor in EXECUTORS.items():
        assert settings("--profile", profile)["executor"] == executor


@pytest.mark.parametrize("profile", EXECUTORS)
def test_the_default_profile_takes_nothing_from_another(profile: str) -> None:
    """It is read in addition to every profile and wins over it."""
    alone, both = settings("--profile", profile, "--workflow-profile", "none"), settings("--profile", profile)
    changed = {key for key, value in both.items() if value != alone[key]}
    assert changed - {"workflow_profile"} <= {"rerun_triggers", "rerun_incomplete", "scheduler", "printshellcmds"}
    assert "RerunTrigger.MTIME" in both["rerun_triggers"] and "INPUT" not in both["rerun_triggers"]


def test_a_profile_by_name(tmp_path: Path) -> None:
    """`make profiles` lets the cluster's be found by its name: executor, granularity and memory are seen."""
    make = ["make", "-s", "profiles", f"XDG_CONFIG_HOME={tmp_path}"]
    for _ in range(2):
        assert subprocess.run(make, cwd=ROOT, capture_output=True).returncode == 0
    config = (f"out={tmp_path}", "rounds=3", "seeds=[0]")
    text = snakemake("--profile", "slurm", "-n", "--config", *config, XDG_CONFIG_HOME=str(tmp_path))
    assert "Using profiles slurm and workflow specific profile profiles/default" in text
    assert "executor slurm, 4 train jobs and one aggregate a round, keep last" in text
    assert resources(text)["train"]["mem_mb"] == "8000"
    (tmp_path / "snakemake/slurm").unlink()
    (tmp_path / "snakemake/slurm").mkdir()
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "another profile of this name is there" in done.stdout


def test_slurm_in_a_dry_run(tmp_path: Path) -> None:
    """A dry run shows its profile, the file of its granularity, its jobs and what each asks for; `--config` leaves the
    granularity as it is."""
    config = (f"study={QUICKSTART}", f"out={tmp_path / 'out'}", "rounds=3", "seeds=[0]", "methods=[fedavg]")
    text = snakemake("-n", "--profile", "profiles/slurm", "--directory", str(tmp_path), "--config", *config)
    assert "Using profiles profiles/slurm and workflow specific profile profiles/default" in text
    assert f"{ROOT}/profiles/slurm/granularity.yaml" in text
    assert jobs(text)["train"] == 3 * 4 and "segment_kept" not in jobs(text)
    asked = resources(text)
    memory = {rule: int(asked[rule]["mem_mb"]) for rule in ("data", "train", "aggregate_kept", "evaluate")}
    assert memory == {"data": 2000, "train": 8000, "aggregate_kept": 4000, "evaluate": 4000}
    assert {found["runtime"] for found in asked.values()} == {"60"}


def test_a_dry_run_names_executor_and_granularity(tmp_path: Path) -> None:
    text = snakemake("-n", "--profile", "profiles/slurm", "--config", f"out={tmp_path}", "rounds=3", "seeds=[0]")
    assert "executor slurm, 4 train jobs and one aggregate a round, keep last" in text
    text = snakemake("-n", "--profile", "profiles/local", "--config", f"out={tmp_path}", "rounds=3", "seeds=[0]")
    assert "executor local, 20 rounds a job, keep last" in text


def test_granularity_is_chosen_on_the_command_line(tmp_path: Path) -> None:
    config = (f"out={tmp_path}", "jobs_per_round=none", "segment=5", "seeds=[0]", "methods=[fedavg]")
    text = snakemake("-n", "--profile", "profiles/slurm", "--config", *config)
    assert (jobs(text)["segment"], jobs(text)["segment_kept"]) == (3, 1) and "train" not in jobs(text)
    assert (resources(text)["segment"]["mem_mb"], resources(text)["segment"]["runtime"]) == ("8000", "240")


# ------------------------------------------------------------------------------------------ through Slurm's commands
@pytest.mark.slow
def test_a_study_through_slurm(tmp_path: Path) -> None:
    """The same bytes as in process, on a cluster without accounting; a job lost with its node runs again and asks for
    twice the memory."""
    study, cluster = tmp_path / "tiny.yaml", tmp_path / "cluster"
    study.write_text(yaml.safe_dump(TINY))
    cluster.mkdir()
    (cluster / "lose").write_text("rule_train\n")
    short = ("data", "partition", "measure", "assign"), ("evaluate", "table", "report")
    text = snakemake(
        *("--profile", "profiles/slurm", "--directory", str(tmp_path / "work")),
        *("--slurm-init-seconds-before-status-checks", "1"),
        *("--groups", *(f"{rule}={group[0]}" for group in short for rule in group)),
        *("--config", f"study={study}", f"out={tmp_path / 'slurm'}", "jobs_per_round=2"),
        limit=400,
        PATH=f"{CLUSTER}:{os.environ['PATH']}",
        CLUSTER=str(cluster),
    )
    commands = (cluster / "submitted").read_text()
    assert commands.count(f"--configfiles {ROOT}/profiles/slurm/granularity.yaml") == 9, text
    submitted = re.findall(r"--comment rule_([a-z]+).* -p main .*--mem (\d+) ", commands)
    asked = {rule: sorted(int(m) for r, m in submitted if r == rule) for rule, _ in submitted}
    assert asked["train"] == [8000, 8000, 8000, 8000, 16000], text
    assert asked["aggregate"] == [4000, 4000] and len(submitted) == 9, text
    assert main(["run", str(study), "--out", str(tmp_path / "loop")]) == 0
    assert fingerprint(tmp_path / "slurm") == fingerprint(tmp_path / "loop"), text
