"""What runs again after an edit, and what another workflow has made already: jobs counted in Snakemake's own log."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_pipeline import run_of

from fedpipe.__main__ import main
from fedpipe.fingerprint import fingerprint

STUDY = {
    "name": "again",
    "data": {"name": "digits", "rows": 200, "size": 8, "partition": {"kind": "iid", "clients": 4}},
    "model": {"name": "./net.py:net"},
    "methods": ["fedavg", "heterofl", "child", "./mine.py:method"],
    "rounds": 2,
    "cohort": 2,
}
NET = """from torch import nn

def net(shape, classes):
    size = shape[0] * shape[1] * shape[2]
    return [("stem", nn.Sequential(nn.Flatten(), nn.Linear(size, 8))), ("head", nn.Linear(8, classes))]
"""
CHILD = """from dataclasses import replace
from fedpipe.methods import heterofl
method = replace(heterofl.method, name="child")
"""
MINE = "from fedpipe.types import Method\nmethod = Method(name='mine')\n"
OF_A_RUN = {"measure", "assign", "segment_kept", "evaluate"}


class Tree:
    """A copy of the package and its workflow, whose files can be edited."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("fedpipe", "workflows", "profiles"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Snakefile", root)
        (root / "fedpipe/methods/child.py").write_text(CHILD)
        (root / "net.py").write_text(NET)
        (root / "mine.py").write_text(MINE)
        (root / "study.yaml").write_text(yaml.safe_dump(STUDY))

    def snakemake(self, *options: str, **environment: str) -> str:
        config = ["study=study.yaml", "out=results/again"]
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-c2", *options, "--config", *config],
            cwd=self.root, env={**os.environ, "PYTHONPATH": str(self.root), **environment},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def due(self) -> dict[str, int]:
        """Jobs a dry run lists."""
        table = self.snakemake("-n").partition("Job stats:")[2].partition("total")[0]
        return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}

    def due_after(self, file: str, old: str, new: str) -> dict[str, int]:
        """Jobs due after an edit, which is then taken back."""
        path = self.root / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        try:
            return self.due()
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The study run to its end by the copy."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    tree.snakemake()
    assert tree.due() == {}
    return tree


OUTPUT = {"table": 1, "report": 1, "all": 1}


@pytest.mark.slow
def test_an_edit_runs_again_what_depends_on_it(tree: Tree) -> None:
    of_a_run = dict.fromkeys(OF_A_RUN, 1)
    of_two, of_all = (dict.fromkeys(OF_A_RUN, n) for n in (2, 4))
    training = {k: v for k, v in of_all.items() if k in ("segment_kept", "evaluate")}
    line = "\nADDED = 1\n"
    for file, old, new, wanted in [
        ("fedpipe/methods/heterofl.py", "\nmethod = ", f"{line}method = ", of_two),  # with the method built on it
        ("fedpipe/methods/child.py", "\nmethod = ", f"{line}method = ", of_a_run),
        ("fedpipe/methods/fedavg.py", "\nmethod = ", f"{line}method = ", of_a_run),
        ("mine.py", "\nmethod = ", f"{line}method = ", of_a_run),
        ("net.py", "\ndef net", f"{line}def net", of_all),
        ("fedpipe/aggregate.py", "\ndef mean", f"{line}def mean", training),
        ("fedpipe/steps/table.py", "\ndef run", f"{line}def run", {}),
    ]:
        due = tree.due_after(file, old, new)
        # `fedpipe/aggregate.py` is imported wherever rounds are, so `assign` and `measure` may be due as well
        assert {k: v for k, v in due.items() if k in wanted} == wanted and OUTPUT.items() <= due.items(), file
        if file != "fedpipe/aggregate.py":
            assert set(due) == {*wanted, *OUTPUT}, (file, due)


@pytest.mark.slow
def test_a_comment_runs_nothing_again(tree: Tree) -> None:
    package = ("methods/heterofl.py", "loop/client.py", "steps/table.py")
    for file in ("mine.py", "net.py", *(f"fedpipe/{name}" for name in package)):
        text = (tree.root / file).read_text()
        assert tree.due_after(file, text, f"# A comment.\n{text}\n\n# Another.\n") == {}, file


# ------------------------------------------------------------------------------- the cache between workflows
@pytest.mark.slow
def test_what_another_workflow_has_made_is_taken_from_the_cache(tmp_path: Path) -> None:
    """Two users, one cache: the second runs nothing of data, partition, measure and whole runs; a study with one method
    more makes that alone; a damaged entry is named and made again, in the cache as well."""
    study = tmp_path / "study.yaml"
    keys = {**STUDY, "model": {"name": "mlp"}}
    study.write_text(yaml.safe_dump({**keys, "methods": ["fedavg", "scaffold"]}))
    (tmp_path / "cache").mkdir()

    def user(name: str) -> tuple[Path, set[str]]:
        """Their results, and the folders of these whose files were made and put into the cache."""
        folder, config = tmp_path / name, [f"study={study}", "out=results"]
        command = [sys.executable, "-m", "snakemake", "-c2", "--cache", "--directory", folder, "--config", *config]
        environment = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stderr)
        return folder / "results", set(re.findall(r"Moving output file results/(\w+/[a-z]+)", done.stderr))

    said: list[str] = []
    first, ran = user("ada")
    assert ran == {"data/digits", "partition/iid", "measure/fedavg", "measure/scaffold", "runs/fedavg", "runs/scaffold"}
    second, ran = user("ben")
    assert ran == set() and run_of(second, study, "scaffold").metrics.resolve().parent == tmp_path / "cache"
    assert main(["run", str(study), "--out", str(tmp_path / "alone")]) == 0
    assert fingerprint(first) == fingerprint(second) == fingerprint(tmp_path / "alone")
    study.write_text(yaml.safe_dump({**keys, "methods": ["fedavg", "scaffold", "fedprox"]}))
    third, ran = user("cy")
    assert ran == {"measure/fedprox", "runs/fedprox"}
    state = run_of(third, study, "scaffold").state(2) / "server@2.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-1] ^= 1
    state.write_bytes(raw)
    third, ran = user("cy")
    assert ran == {"runs/scaffold"} and f"{state.relative_to(tmp_path / 'cy')}: damaged; making it again" in said[-1]
    assert state.is_file() and state.read_bytes() != raw
