"""What a process holds: few of a cohort's messages, no library it has no use for, nothing of a stage that is over."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from engine import IID, SKEWED, Game, equal, make_run

from fedpipe import allocator, arrow, local
from fedpipe.folding import foldable, played
from fedpipe.kernels.aggregate import reference
from fedpipe.opened import METRICS
from fedpipe.plans import SCHEMA as PLANS
from fedpipe.rounds import Rounds

WIDE: dict[str, Any] = {"model": {"name": "mlp", "hidden": [600, 64]}}
BIG = "model/h1.1.weight"  # of 600 x 64: larger than what is folded side by side
STUDY = """
name: small
data: {name: digits, rows: 60, partition: {kind: iid, clients: 3}}
model: {name: linear}
methods: [fedavg]
rounds: 2
cohort: 3
"""
TRACED = """
import sys
from fedpipe import tracing
with tracing.fake_mode():
    print("torch._dynamo" in sys.modules, "triton" in sys.modules)
import triton
"""
TABLES = """
import sys
from pathlib import Path
import pyarrow as pa
from fedpipe import arrow, io
io.write_table(Path("t.parquet"), [{"x": 1, "s": "a"}, {"x": 2}], {}, pa.schema({"x": pa.int32(), "s": pa.string()}))
found = io.read_table(Path("t.parquet"))
assert found.to_pylist() == [{"x": 1, "s": "a"}, {"x": 2, "s": None}] and arrow.numbers(found["x"]).tolist() == [1, 2]
print("pandas" in sys.modules)
"""


def folded(game: Game) -> Game:
    """Play all rounds, each message folded as it comes."""
    for t in range(game.t, game.opened.run.rounds):
        game.world, sent = played(game.opened.rounds, t, game.world, game.opened.rounds.groups(t))
        game.sent += sent
        game.t += 1
    return game


@pytest.mark.parametrize("method", ["fedavg", "heterofl", "scaffold", "fedbabu", "fedepth"])
@pytest.mark.parametrize("stack", [1, 4])
def test_messages_that_are_folded_as_they_come_give_the_same_bits(method: str, stack: int, root: Path) -> None:
    run = make_run(method, SKEWED, stack=stack, dropout=0.2)
    first, mine = Game(run, root).play(), folded(Game(run, root))
    assert foldable(mine.opened.rounds, 0) == (mine.opened.rt.method.aggregate is None)
    assert equal(first.state, mine.state)
    assert [s.metrics for s in first.sent] == [s.metrics for s in mine.sent]
    assert first.world.owns.keys() == mine.world.owns.keys()
    assert all(equal(first.world.own(c), mine.world.own(c)) for c in first.world.owns)


def test_few_messages_of_a_round_are_there_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    inner = Rounds._sent

    def watched(self: Rounds, *args: Any) -> Any:
        sent = inner(self, *args)
        made.append(weakref.ref(sent.message.tensors[BIG]))
        alive.append(sum(r() is not None for r in made))
        return sent

    monkeypatch.setattr(Rounds, "_sent", watched)
    monkeypatch.setattr(reference, "WAIT", 0)
    run = make_run("fedavg", **WIDE, stack=1, rounds=2)
    Game(run, root).play(1)
    assert max(alive) == run.cohort == 6
    made.clear(), alive.clear()
    folded(Game(run, root))
    assert len(alive) == 12 and max(alive) <= 3, "two that wait for each other, and the newest"


def test_a_round_whose_messages_are_read_twice_keeps_them(root: Path) -> None:
    game = Game(make_run("fedavg"), root)
    (row,) = [r for r in game.opened.rounds.by_round[0] if r["kind"] == "mix"]
    assert foldable(game.opened.rounds, 0)
    game.opened.rounds.by_round[0].append({**row, "out": "other@1"})
    assert not foldable(game.opened.rounds, 0)
    world, sent = played(game.opened.rounds, 0, game.world, game.opened.rounds.groups(0))
    assert equal(world.states["other@1"], world.states["server@1"]) and all(s.image for s in sent)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; glibc")
def test_freed_memory_goes_back_between_stages() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not allocator.keep_freed():
        pytest.skip("another C library")
    x = [torch.ones(1 << 20) for _ in range(16)]
    held = resident()
    del x
    allocator.give_back()
    assert held - resident() > 48 << 20


def test_memory_is_given_back_after_stages_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[None] = []
    monkeypatch.setattr(local, "give_back", lambda: given.append(None))
    (tmp_path / "study.yaml").write_text(STUDY)
    for _ in range(2):
        local.run_study(tmp_path / "study.yaml", [], None, tmp_path / "out", 1, "last")
        assert len(given) == 3, "before the rounds, after them, after the evaluation; nothing for what is done"


def run_alone(code: str, folder: Path, **env: str) -> str:
    path = {"PYTHONPATH": str(Path(local.__file__).parents[1]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=path | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip or torch.version.xpu), reason="triton runs there")
def test_tracing_on_a_cpu_takes_no_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_alone(TRACED, tmp_path) == "True False"
    assert run_alone(TRACED, tmp_path, TRITON_INTERPRET="1") == "True True"


def test_tables_take_no_pandas(tmp_path: Path) -> None:
    assert run_alone(TABLES, tmp_path) == "False"


def test_rows_are_the_tables_that_pyarrow_makes() -> None:
    index = [{"name": "a", "dim": 0, "start": 0, "stop": 3}]
    plans: list[dict[str, Any]] = [
        {"plan": "p0", "phase": 0, "live": ["model/*", "é"], "lr": 1, "carry": True, "index": index},
        {"plan": None, "live": [], "lr": None, "carry": None, "index": []},
        {"plan": "", "live": None, "carry": False, "index": None},
    ]
    metrics = [{"round": i, "client": 2**31 - 1, "failed": i % 3 == 0, "weight": float("nan")} for i in range(17)]
    for rows, schema in ((plans, PLANS), (metrics, METRICS), ([], PLANS), ([], METRICS)):
        made = arrow.table(rows, schema)
        made.validate(full=True)
        assert str(made.to_pylist()) == str(pa.Table.from_pylist(rows, schema=schema).to_pylist())
    with pytest.raises(TypeError):
        arrow.array([1.5], pa.int32())
    with pytest.raises(OverflowError):
        arrow.array([2**31], pa.int32())


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64(), pa.bool_()])
def test_numbers_of_a_column_in_pieces(kind: pa.DataType) -> None:
    whole = arrow.array([i % 2 for i in range(23)], kind)
    column = pa.chunked_array([whole[:9], whole[9:10], whole[10:10], whole[12:]])
    found = arrow.numbers(column)
    assert found.tolist() == column.to_pylist() and found.dtype == kind.to_pandas_dtype()
    assert arrow.numbers(pa.chunked_array([], kind)).dtype == kind.to_pandas_dtype()


def test_rows_that_are_evaluated_at_once(root: Path) -> None:
    images: dict[str, Any] = {"model": {"name": "cnn"}, "rounds": 1}
    plain, maps = Game(make_run("fedavg", IID), root), Game(make_run("fedavg", **images), root)
    told = Game(make_run("fedavg", **images, evaluate={"batch": 7}), root)
    coupled = Game(make_run("fedavg", model="preresnet20", rounds=1), root)  # by batch norm, to whoever is in the batch
    on_cpu = maps.opened.rt.device.type == "cpu"
    sizes = [g.opened.rt.evaluated_at_once for g in (plain, maps, told, coupled)]
    assert sizes == [100, 32 if on_cpu else 100, 7, 100]
    a, b = (g.opened.point(0, g.world) for g in (maps, told))
    assert a["accuracy"] == b["accuracy"] and a["loss"] == pytest.approx(b["loss"], rel=1e-6)
