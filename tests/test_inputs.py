"""Bad study files, arguments and files of a user's own: one line names the key or file, and nothing is half written."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import TINY

from fedpipe import io
from fedpipe.__main__ import main
from fedpipe.errors import FedpipeError
from fedpipe.studyfile import load_study

SAID = re.compile(r"fedpipe: (data|partition|measure|assign|evaluate) .* seed \d+$|.*: round \d+/\d+")  # progress
Refused = Callable[..., str]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny study as `tiny.yaml` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return Path("tiny.yaml")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(*arguments)`: the one line that `fedpipe` ends with."""

    def call(*arguments: str, status: int = 2) -> str:
        assert main(list(arguments)) == status
        lines = [x for x in capsys.readouterr().err.splitlines() if not SAID.match(x)]
        assert len(lines) == 1 and lines[0].startswith("fedpipe: error: "), lines
        return lines[0].removeprefix("fedpipe: error: ")

    return call


def half_written(folder: Path) -> list[Path]:
    """Artefacts that cannot be read, and temporary files."""
    bad = []
    for file in (f for f in folder.rglob("*") if f.is_file()):
        try:
            if file.suffix in (".parquet", ".arrow", ".safetensors"):
                io.read_meta(file)
            elif file.suffix == ".tmp":
                bad.append(file)
        except FedpipeError:
            bad.append(file)
    return bad


@pytest.mark.parametrize(
    ("item", "key", "wanted"),
    [
        ("roundz=3", "roundz", "unknown key"),
        ("data.partition.client=3", "data.partition.client", "unknown key"),
        ("a.b=3", "a", "unknown key"),
        ("rounds=0", "rounds", "greater than or equal to 1"),
        ("rounds=abc", "rounds", "valid integer.*got 'abc'"),
        ("rounds=1.5", "rounds", "valid integer"),
        ("rounds=true", "rounds", "wanted a number"),
        ("rounds=", "rounds", "valid integer"),
        ("seeds=[1, x]", "seeds.1", "valid integer"),
        ("seeds=[1, 1]", "seeds", "1 stands there twice"),
        ("seeds=[]", "seeds", "at least 1 item"),
        ("name=../x", "name", "match pattern"),
        ("device=tpu", "device", "'auto', 'cpu' or 'cuda'"),
        ("stack=0", "stack", "'auto' or .*greater than or equal to 1"),
        ("local.optimizer.lr=.nan", "local.optimizer.lr", "finite"),
        ("local.optimizer.lr=.inf", "local.optimizer.lr", "finite"),
        ("local.optimizer.lr=0", "local.optimizer.lr", "greater than 0"),
        ("cohort=7", "cohort", "7 clients a round, but data.partition.clients is 6"),
        ("data.partition.alpha=0", "data.partition.alpha", "greater than 0"),
        ("budgets={bytes: {1MiB: 4}}", "budgets", "add up to 4, data.partition.clients is 6"),
        ("budgets={bytes: {1Q: 6}}", "budgets.bytes", "'1Q' is no size; write bytes"),
        ("budgets={bytes: {1..2MiB: 6}}", "budgets.bytes", "is no size"),
        ("budgets={bytes: {0: 6}}", "budgets.bytes.0", "greater than or equal to 1"),
        ("budgets={bytes: 3}", "budgets.bytes", "valid dictionary"),
        ("budgets={like_width: {1.5: 6}}", "budgets.like_width.1.5", "less than or equal to 1"),
        ("budgets={bytes: {1MiB: 6}, like_width: {0.5: 6}}", "budgets", "like_width are given; wanted one of"),
        ("budgets={bytes: {-1MiB: 6}}", "budgets.bytes", "'-1MiB' is no size"),
        ("budgets={bytes: {1MiB: .nan}}", "budgets.bytes.1MiB", "finite"),
        ("budgets={like_width: {.inf: 6}}", "budgets.like_width.inf", "finite"),
        ("budgets={like_width: {wide: 6}}", "budgets.like_width.wide", "valid number"),
        ("budgets={fraction: {1.5: 6}}", "budgets", "fraction 1.5 is above 1; wanted at most 1, or surplus: true"),
        ("budgets={fraction: {0.5: 5}}", "budgets", "add up to 5, data.partition.clients is 6"),
        ("budgets={surplus: true}", "budgets", "wanted with fraction alone"),
        ("budgets={scenario: poor}", "budgets.scenario", "'fair', 'lack' or 'surplus'"),
        ("budgets={devices: [{name: a, bytes: 1MiB}]}", "budgets.devices.0.share", "Field required"),
        ("budgets={devices: [{name: a, bytes: 1Q, share: 1}]}", "budgets.devices.0.bytes", "'1Q' is no size"),
        ("budgets={devices: [{name: a, bytes: 1MiB, share: .nan}]}", "budgets.devices.0.share", "finite"),
        ("budgets={devices: [{name: a, bytes: 1MiB, share: 0.5}]}", "budgets", "shares add up to 0.5; wanted 1"),
        ("budgets={form: 3}", "budgets.form", "unknown key"),
        ("budget=strict", "budget", "'enforce', 'warn' or 'off'"),
        ("methods=[]", "methods", "at least 1 item"),
        ("methods=fedavg", "methods", "valid list"),
        ("methods=[fedavg, fedavg]", "methods", "fedavg stands there twice"),
        ("methods=[{fedprox: 3}]", "methods.0.settings", "valid dictionary"),
        ("methods=[{fedprox: {mu: .nan}}]", "methods.0.fedprox.mu", "finite"),
        ("model=3", "model", "valid dictionary"),
        ("paper={fedavg: 90}", "paper.fedavg", "accuracy in 0..1"),
        ("paper={other: 0.9}", "paper.other", "one of the study's methods"),
    ],
)
def test_a_wrong_value_names_file_and_key(study: Path, refused: Refused, item: str, key: str, wanted: str) -> None:
    line = refused("run", str(study), "--out", "r", "--set", item)
    assert line.startswith(f"tiny.yaml: {key}: ") and re.search(wanted, line), line
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--set", "rounds"], "--set rounds: wanted key=value"),
        (["--set", "=3"], "--set =3: wanted key=value"),
        (["--set", "rounds.x=3"], "--set rounds.x=3: rounds is not a group of keys"),
        (["--set", "rounds=[1"], "--set rounds=[1: not readable as YAML"),
        (["--methods", "fedavg,nope"], "methods: 'nope' is not known; there are depthfl"),
        (["--methods", ""], "methods: '' is not known; there are depthfl"),
        (["--set", "methods=[fedavgg]"], "methods: 'fedavgg' is not known; there are depthfl"),
        (["--set", "methods=[./mine.py]"], "methods: './mine.py' is not known; there are"),
        (["--set", "methods=[{fedprox: {mu: high}}]"], "methods.fedprox.mu: wanted float, got 'high'"),
        (["--set", "methods=[{fedavg: {mu: 1}}]"], "methods.fedavg: no setting 'mu'; there are part"),
        (["--set", "model=nett"], "model: 'nett' is not known; there are cnn, cnn4, linear, mlp, mobilenet, "),
        (["--set", "model=./mine.py"], "model: './mine.py' is not known; there are"),
        (["--set", "model=./absent.py:net"], "absent.py: no such file, named in the study as absent.py:name"),
        (["--set", "methods=[./absent.py:method]"], "absent.py: no such file, named in the study as absent.py:name"),
        (["--methods", "fedavg,fedavg"], "tiny.yaml: methods: fedavg stands there twice"),
        (["--segment", "0"], "--segment: 0; wanted a number of rounds, at least 1"),
        (["--segment", "x"], "argument --segment: invalid int value: 'x'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--out", "tiny.yaml"], "tiny.yaml/.lock: could not be written"),
        (["--out", "/dev/null/x"], "/dev/null/x/.lock: could not be written"),
    ],
)
def test_a_wrong_argument_is_named(study: Path, refused: Refused, arguments: list[str], wanted: str) -> None:
    assert refused("run", str(study), *arguments).startswith(wanted)
    assert list(Path().iterdir()) == [study]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "no such study file"),
        (b"", "wanted a group of keys"),
        (b"- 1\n", "wanted a group of keys"),
        (b"a: [1\n", "not readable as YAML"),
        (bytes(range(256)), "not readable as YAML"),
        (b"a: !!python/object:os.x {}\n", "not readable as YAML"),
        (b"rounds: 2\nrounds: 3\n", "not readable as YAML (key rounds stands there twice"),
        (b"data: {rows: 2, rows: 3}\n", "not readable as YAML (key rows stands there twice"),
        (b"name: x\n", "methods: Field required"),
        (b"3: 3\nname: x\nmethods: [fedavg]\n", "3: Keys should be strings"),
    ],
)
def test_a_file_that_is_no_study(study: Path, refused: Refused, text: bytes | None, wanted: str) -> None:
    if text is not None:
        Path("bad.yaml").write_bytes(text)
    assert refused("run", "bad.yaml", "--out", "r").startswith(f"bad.yaml: {wanted}")
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["show", "nowhere"], "nowhere/table.parquet: no such file"),
        (["digest", "nowhere"], "nowhere: no runs in this folder"),
        (["data", "--run", "nowhere.json", "--data", "d.arrow"], "nowhere.json: no such run file"),
        (["data", "--run", "tiny.yaml", "--data", "d.arrow"], "tiny.yaml: Invalid JSON"),
        (["table", "--study", "tiny.yaml"], "the following arguments are required: --runs, --table"),
        (["trian"], "argument command: invalid choice: 'trian'"),
    ],
)
def test_other_commands(study: Path, refused: Refused, arguments: list[str], wanted: str) -> None:
    assert refused(*arguments).startswith(wanted)
    assert list(Path().iterdir()) == [study]


def test_powers_of_ten_are_numbers(study: Path) -> None:
    """In YAML 1.1 `1e-3` is text; so a setting of a method would be, and 1e-05 read back from JSON."""
    found = load_study(study, ["local.optimizer.lr=1e-3", "methods=[{fedprox: {mu: 1e-3}}, {name: fedbabu}]"])
    assert found.local.optimizer.lr == 0.001
    assert found.methods[0].settings == {"mu": 0.001}
    assert load_study(study, ['local={"optimizer": {"lr": "2E+1"}}']).local.optimizer.lr == 20
    Path("study.json").write_text(load_study(study, ["methods=[{fedprox: {mu: 0.00001}}]"]).model_dump_json())
    assert load_study(Path("study.json")).methods[0].settings == {"mu": 0.00001}


def test_chosen_methods_keep_every_setting_of_theirs(study: Path) -> None:
    two = "methods=[{fedprox: {mu: 1}}, {fedprox: {mu: 2}}, fedavg]"
    found = load_study(study, [two, "paper={fedavg: 0.9, fedprox: 0.8}"], ["fedprox", "fedepth"])
    assert [(m.name, m.settings) for m in found.methods] == [
        ("fedprox", {"mu": 1}), ("fedprox", {"mu": 2}), ("fedepth", {})
    ]  # fmt: skip
    assert found.paper == {"fedprox": 0.8}


MINE = """
import torch
from fedpipe.types import Method

def net(shape, classes, hidden=8):
    size = shape[0] * shape[1] * shape[2]
    stem = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, hidden), torch.nn.Tanh())
    return [("stem", stem), ("head", torch.nn.Linear(hidden, classes))]

def direction(grad, at, batch, ctx):
    return {n: ctx.h["factor"] * g for n, g in grad().items()}, {}

def leak(at, ctx):
    return {"own/secret": next(iter(at.values()))}, {}

def fault(at, batch, ctx):
    return 1 / 0

method = Method(h={"factor": 1.0}, direction=direction)
leaky = Method(end=leak)
faulty = Method(loss=fault)
number = 3
"""
FILES = {
    "mine.py": MINE,
    "raises.py": "raise ValueError('two\\nlines')\n",
    "stops.py": "import sys\nsys.exit(0)\n",
    "syntax.py": "def (:\n",
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that already holds the data and the partition of the tiny study."""
    root = tmp_path_factory.mktemp("started")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for name, text in FILES.items():
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("item", "wanted", "status"),
    [
        ("methods=[./mine.py:methodd]", "mine.py: no method 'methodd'; the file has .*method, leaky", 2),
        ("methods=[./mine.py:number]", r"methods: \./mine\.py:number is int, wanted a fedpipe\.types\.Method", 2),
        ("methods=[./raises.py:method]", r"raises\.py: could not be imported \(ValueError: two lines\)", 2),
        ("methods=[./stops.py:method]", r"stops\.py: could not be imported \(SystemExit: 0\)", 2),
        ("methods=[./syntax.py:method]", r"syntax\.py: not readable as Python \(invalid syntax", 2),
        ("methods=[./mine.py:leaky]", "own/secret is private and must not be sent", 2),
        ("methods=[./mine.py:faulty]", r"mine\.py, line 17: ZeroDivisionError: division by zero", 1),
        (
            "methods=[{./mine.py:method: {factorr: 2}}]",
            r"methods\.\./mine\.py:method: no setting 'factorr'; .*factor",
            2,
        ),
        ("model=./mine.py:nett", "mine.py: no function 'nett'", 2),
        ("model=./mine.py:number", "wanted a function", 2),
        ("model={name: mlp, depth: 3}", "model mlp takes no depth; it takes hidden", 2),
        ("model={name: mlp, hidden: 3}", r"small\.py, line \d+: TypeError", 1),
        ("data.partition={kind: iid, clients: 300}", r"data\.partition\.clients: 300 clients .* there are 240", 2),
        ("data.partition.kind=even", r"data\.partition\.kind: unknown 'even'; wanted iid", 2),
        ("data.rows=5000", r"data\.rows: 5000 asks for 5000 train rows, there are", 2),
        ("budgets={bytes: {1KiB: 6}}", r"budgets: .* method fedavg; it needs 0\.\d+ MiB, the largest is 0\.001", 2),
    ],
)
def test_what_only_a_step_can_know(
    started: Path, monkeypatch, refused: Refused, item: str, wanted: str, status: int
) -> None:
    monkeypatch.chdir(started)
    assert re.search(wanted, line := refused("run", "tiny.yaml", "--out", "r", "--set", item, status=status)), line
    assert not half_written(Path("r"))
    assert not list(Path("r").glob("runs/*/rounds")) and not list(Path("r").glob("table*"))


def test_missing_data_says_where_it_looked(study: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setenv("FEDPIPE_DATA", "some/folder")
    line = refused("run", "tiny.yaml", "--out", "r", "--set", "data={name: who/what, partition: {clients: 6}}")
    for part in ("data.name: no data set 'who/what'", "FEDPIPE_DATA=some/folder", "who/what/train.parquet"):
        assert part in line
    assert not list(Path("r").rglob("*.arrow"))


def test_a_users_model_and_method_run_to_the_table(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MINE)
    methods = "methods=[./mine.py:method, {./mine.py:method: {factor: 0.0}}]"
    assert main(["run", "tiny.yaml", "--out", "r", "--set", "model={name: './mine.py:net', hidden: 6}", methods]) == 0
    table = {r["label"]: r for r in pq.read_table("r/table.parquet").to_pylist()}
    assert set(table) == {"mine", "mine (factor=0.0)"}
    losses = {pq.read_table(f)["loss"][-1].as_py() for f in Path("r/runs").glob("mine-*/curve/*.parquet")}
    assert len(losses) == 2, "the setting reached the hook"
    states = [io.read_tensors(f)[0] for f in Path("r/runs").glob("mine-*/state/000002/*.safetensors")]
    assert all(s["model/stem.1.weight"].shape[0] == 6 for s in states)


def test_debug_shows_the_traceback(study: Path) -> None:
    with pytest.raises(FedpipeError, match="rounds"):
        main(["--debug", "run", "tiny.yaml", "--set", "rounds=0"])
    command = [sys.executable, "-m", "fedpipe", "run", "tiny.yaml", "--set", "rounds=0"]
    said = [
        subprocess.run([*command, *more], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        for more in ([], ["--debug"])
    ]
    assert said[0].returncode == 2 and said[0].stderr.count("\n") == 1 and not said[0].stdout
    assert said[1].returncode != 0 and "Traceback" in said[1].stderr and "FedpipeError" in said[1].stderr


def test_a_study_is_run_at_one_of_its_scales(study: Path, refused: Refused) -> None:
    scaled = {
        **TINY,
        "scale": "small",
        "scales": {"small": {"rounds": 1, "data": {"rows": 60}}, "paper": {"rounds": 500}},
    }
    study.write_text(yaml.safe_dump(scaled))
    small, paper = load_study(study), load_study(study, ["scale=paper", "cohort=2"])
    assert (small.rounds, small.data.rows, small.data.partition) == (
        1,
        60,
        load_study(study, ["scale=paper"]).data.partition,
    )
    assert (paper.rounds, paper.cohort, paper.name) == (500, 2, f"{TINY['name']}-paper")
    assert "scale: large; the study has paper, small" in refused("run", str(study), "--set", "scale=large")
    study.write_text(yaml.safe_dump(TINY))
    assert "scale: small; the study has none" in refused("run", str(study), "--set", "scale=small")
