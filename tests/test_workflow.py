"""The workflow without training: what it would run, what it reads, what it refuses; digests of code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpipe import digest, schema
from fedpipe.config import Run
from fedpipe.errors import FedpipeError

ROOT = Path(__file__).parent.parent
NOT_WANTED = "Specify a conda environment or container for each rule."  # one environment serves every step


def snakemake(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def dry_run(out: Path, *config: str, **environment: str) -> str:
    done = snakemake("-n", "-c1", "--config", f"out={out}", *config, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def jobs(text: str) -> dict[str, int]:
    table = text.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def test_lint() -> None:
    done = snakemake("--lint")
    found = re.findall(r"^    \* (.*):$", done.stderr, re.MULTILINE)
    assert NOT_WANTED in found, done.stderr
    assert set(found) == {NOT_WANTED}, done.stderr


def test_quickstart_lists_every_job(tmp_path: Path) -> None:
    once = {"data": 1, "table": 1, "report": 1, "all": 1}
    per_run = {"partition": 3, "measure": 2, "assign": 6, "evaluate": 6}  # seeds, methods, both
    assert jobs(dry_run(tmp_path)) == {**once, **per_run, "segment_kept": 6}
    assert jobs(dry_run(tmp_path, "segment=5")) == {**once, **per_run, "segment": 18, "segment_kept": 6}


def test_config_replaces_keys_of_the_study(tmp_path: Path) -> None:
    grid = "methods=[fedavg, {fedprox: {mu: {grid: [0, 0.5]}}}]"
    dry_run(tmp_path, "rounds=3", "seeds=[7]", "local={optimizer: {lr: 1e-3}}", "budgets={bytes: {9MiB: 40}}", grid)
    study = json.loads((tmp_path / "study.json").read_text())
    assert (study["rounds"], study["seeds"], study["budgets"]["bytes"]) == (3, [7], {str(9 * 2**20): 40})
    assert study["local"]["optimizer"] == {"name": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ("round=3", "round: unknown key"),
        ("rounds=0", "rounds: Input should be greater than or equal to 1 (got 0)"),
        ("segment=0", "segment: wanted a whole number, at least 1, got 0"),
        ("study=nowhere.yaml", "nowhere.yaml: no such study file; here are workflows/studies/"),
        ("methods=[fedavgg]", "methods: 'fedavgg' is not known; there are depthfl"),
        ("model=./nowhere.py:net", "nowhere.py: no such file"),
        ("methods=[{fedprox: {nu: {grid: [0, 1]}}}]", "methods.fedprox: no setting 'nu'; there are mu"),
        ("methods=[{fedprox: {mu: {grid: [0, a]}}}]", "methods.fedprox.mu: wanted float, got 'a'"),
        ("stop={metric: f1, target: 0.5}", "stop.metric: Input should be 'accuracy' or 'loss' (got 'f1')"),
    ],
)
def test_bad_config_is_one_line(tmp_path: Path, config: str, wanted: str) -> None:
    done = snakemake("-n", "-c1", "--config", f"out={tmp_path}", config)
    lines = [x for x in done.stderr.splitlines() if x and "workflow specific profile" not in x]
    assert done.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("error: ") and wanted in lines[0], done.stderr


def test_default_profile_holds_only_what_is_right_everywhere() -> None:
    profile = yaml.safe_load((ROOT / "profiles/default/config.yaml").read_text())
    assert set(profile) <= {"rerun-triggers", "rerun-incomplete", "scheduler", "printshellcmds"}
    assert profile["rerun-triggers"] == ["mtime", "params"]


def test_parsing_loads_no_heavy_module(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "heavy = ('torch', 'datasets', 'matplotlib', 'sklearn', 'scipy')\n"
        "atexit.register(lambda: print('loaded:', [m for m in heavy if m in sys.modules]))\n"
    )
    assert "loaded: []" in dry_run(tmp_path / "out", PYTHONPATH=str(tmp_path))


def test_schema_is_current() -> None:
    committed = (ROOT / "workflows/schemas/study.schema.json").read_text()
    assert committed == schema.schema_text(), "run `make format`"


# --------------------------------------------------------------------------------------- digests of code
@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fedpipe", tmp_path / "fedpipe", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(root: Path, file: str, old: str, new: str) -> None:
    path = root / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    forget()


def forget() -> None:
    """Digests are kept for a process, in which no file is expected to change."""
    digest._parsed.cache_clear()
    digest.code_digest.cache_clear()


def training(root: Path, method: str) -> str:
    run = Run.model_validate({"method": {"name": method}, "seed": 0})
    return digest.step_digest("segment", run, root)


METHODS = ("fedavg", "fedprox", "heterofl", "fedepth")


def test_comments_docstrings_and_layout_do_not_count(copy: Path) -> None:
    before = {m: training(copy, m) for m in METHODS}
    edit(copy, "fedpipe/rng.py", '"""Every random draw', '"""Each random draw')
    edit(copy, "fedpipe/rng.py", "import numpy as np\n", "import numpy as np  # arrays\n\n\n\n")
    assert before == {m: training(copy, m) for m in METHODS}
    edit(copy, "fedpipe/rng.py", 'purpose), "little")', 'purpose), "big")')
    after = {m: training(copy, m) for m in METHODS}
    assert all(before[m] != after[m] for m in METHODS)


def test_an_edited_method_counts_for_itself_and_those_that_import_it(copy: Path) -> None:
    child = copy / "fedpipe/methods/child.py"
    child.write_text(
        "from dataclasses import replace\nfrom fedpipe.methods import heterofl\nmethod = heterofl.method\n"
    )
    names = (*METHODS, "child")
    before = {m: training(copy, m) for m in names}
    edit(copy, "fedpipe/methods/heterofl.py", "\nmethod = ", "\nADDED = 1\nmethod = ")
    after = {m: training(copy, m) for m in names}
    assert [m for m in names if before[m] != after[m]] == ["heterofl", "child"]


def test_an_edited_step_counts_for_itself(copy: Path) -> None:
    steps = ("data", "partition", "table")
    before = {s: digest.step_digest(s, root=copy) for s in steps}
    with open(copy / "fedpipe/steps/table.py", "a") as f:
        f.write("\nADDED = 1\n")
    forget()
    after = {s: digest.step_digest(s, root=copy) for s in steps}
    assert [s for s in steps if before[s] != after[s]] == ["table"]


def test_a_users_own_file_counts(tmp_path: Path) -> None:
    (tmp_path / "help.py").write_text("A = 1\n")
    own = tmp_path / "mine.py"
    own.write_text("import help\nfrom fedpipe.methods import fedprox\n\nmethod = fedprox.method\n")
    first = training(digest.ROOT, f"{own}:method")
    edit(tmp_path, "mine.py", "\n\n", "\n\n# a comment\n")
    assert training(digest.ROOT, f"{own}:method") == first
    edit(tmp_path, "help.py", "1", "2")
    assert training(digest.ROOT, f"{own}:method") != first
    own.write_text("method = (\n")
    forget()
    with pytest.raises(FedpipeError, match=r"mine.py: not readable as Python"):
        training(digest.ROOT, f"{own}:method")
