"""Study keys that change what is run: grids, clients that are away or drop out, runs that stop early."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import SKEWED, Game, equal, make_run

from fedpipe import io
from fedpipe.__main__ import main
from fedpipe.config import Study
from fedpipe.errors import FedpipeError
from fedpipe.fingerprint import fingerprint
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.report.summaries import BYTES
from fedpipe.steps.evaluate import SCHEMA as METRICS
from fedpipe.steps.select import run as select_step
from fedpipe.stopping import Watch, look
from fedpipe.studyfile import load_run, load_study

ROOT = Path(__file__).parent.parent
TABLES = ("rounds.parquet", "curve.parquet", "times.parquet", "peaks.parquet")  # an option each, what a round writes
BASE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "rows": 240, "size": 8, "partition": {"kind": "iid", "clients": 6}},
    "model": {"name": "mlp", "hidden": [16]},
    "methods": ["fedavg"],
    "rounds": 2,
    "cohort": 4,
    "local": {"batch": 16, "optimizer": {"lr": 0.1}},
}


def written(folder: Path, **keys: Any) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**BASE, **keys}))
    return file


def played(study: Path, out: Path, segment: int = 20) -> list[RunPaths]:
    assert main(["run", str(study), "--out", str(out), "--segment", str(segment)]) == 0
    return StudyPaths(out, load_study(study)).runs


def table_of(out: Path) -> dict[str, dict[str, Any]]:
    return {r["label"]: r for r in io.read_table(out / "table.parquet").to_pylist()}


# -------------------------------------------------------------------------------------------------------------- grids
def test_a_grid_is_one_run_and_row_per_value(tmp_path: Path) -> None:
    study = written(tmp_path, methods=["fedavg", {"fedprox": {"mu": {"grid": [0.01, 1.0]}}}])
    runs = played(study, tmp_path / "out")
    assert len({p.folder for p in runs}) == 3 and all(p.metrics.is_file() for p in runs)
    rows = table_of(tmp_path / "out")
    assert list(rows) == ["fedavg", "fedprox (mu=0.01)", "fedprox (mu=1.0)"]
    assert len({r["loss"] for r in rows.values()}) == 3


def test_grids_multiply_and_lists_are_values(tmp_path: Path) -> None:
    entry = {"./mine.py:record": {"b": {"grid": ["x", "y"]}, "a": {"grid": [[1, 2], "1e-3"]}, "betas": [0.9, 0.99]}}
    study = load_study(written(tmp_path, methods=[entry]))
    settings = [r.method.settings for r in study.runs()]
    assert [(s["a"], s["b"]) for s in settings] == [([1, 2], "x"), ([1, 2], "y"), (0.001, "x"), (0.001, "y")]
    assert all(s["betas"] == [0.9, 0.99] for s in settings)
    assert Study.model_validate_json(study.model_dump_json()) == study, "a grid survives the file the steps read"


def test_chosen_methods_keep_their_grid(tmp_path: Path) -> None:
    study = written(tmp_path, methods=["fedavg", {"fedprox": {"mu": {"grid": [0.01, 0.1]}}}])
    assert [r.label for r in load_study(study, methods=["fedprox"]).runs()] == [
        "fedprox (mu=0.01)",
        "fedprox (mu=0.1)",
    ]


# ------------------------------------------------------------------------------------------------- keys of one entry
def test_an_entry_has_keys_of_its_own(tmp_path: Path) -> None:
    longer = {"fedprox": {"mu": {"grid": [0.01, 1.0]}}, "keys": {"local": {"epochs": 3, "optimizer": {"lr": 0.2}}}}
    narrow = {"fedavg": {}, "keys": {"model": {"hidden": [8]}}, "label": "narrow"}
    methods = ["fedavg", longer, narrow, {"fedavg": None, "keys": {"model": "linear"}}]
    study = written(tmp_path, methods=methods, local={"batch": 16, "optimizer": {"lr": 0.1, "momentum": 0.5}})
    runs = {p.run.label: p.run for p in played(study, tmp_path / "out")}
    own = "epochs=3, optimizer={'lr': 0.2}"
    assert list(runs) == ["fedavg", f"fedprox (mu=0.01, {own})", f"fedprox (mu=1.0, {own})", "narrow",
                          "fedavg (model=linear)"]  # fmt: skip
    assert [(r.local.epochs, r.local.batch, r.local.optimizer.lr) for r in runs.values()] == [
        (1, 16, 0.1), (3, 16, 0.2), (3, 16, 0.2), (1, 16, 0.1), (1, 16, 0.1)]  # fmt: skip
    assert {r.local.optimizer.momentum for r in runs.values()} == {0.5}
    networks = [(r.model.name, r.model.model_extra) for r in runs.values()]
    assert networks[3:] == [("mlp", {"hidden": [8]}), ("linear", {})]
    rows = table_of(tmp_path / "out")
    assert list(rows) == list(runs) and len({r["loss"] for r in rows.values()}) == 5
    assert rows["narrow"]["payload_up"] < rows["fedavg"]["payload_up"]
    alone = written(tmp_path, local={"epochs": 3, "batch": 16, "optimizer": {"lr": 0.2, "momentum": 0.5}},
                    methods=[{"fedprox": {"mu": 1.0}}])  # fmt: skip
    played(alone, tmp_path / "alone")
    (same,) = table_of(tmp_path / "alone").values()
    assert same["loss"] == rows[f"fedprox (mu=1.0, {own})"]["loss"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"local": {"epochz": 2}}, "methods: fedavg: keys.local.epochz: Extra inputs"),
        ({"budgets": {"bytes": {"1MiB": 3}}}, "methods: fedavg: keys: budgets: clients per budget add up to 3"),
        ({"rounds": 3}, "methods.0.keys.rounds: Input should be 'data', 'model'"),
        ({}, "methods: fedavg stands there twice"),
    ],
)
def test_bad_keys_of_an_entry(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FedpipeError, match="study.yaml") as e:
        load_study(written(tmp_path, methods=[{"fedavg": {}, "keys": keys}, "fedavg"]))
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"nu": {"grid": [1]}}, "methods.fedprox: no setting 'nu'; there are mu"),
        ({"mu": {"grid": ["big"]}}, "methods.fedprox.mu: wanted float, got 'big'"),
        ({"mu": {"grid": []}}, "fedprox.mu.grid: wanted a list of values, at least one"),
        ({"mu": {"grid": 0.1}}, "fedprox.mu.grid: wanted a list of values"),
        ({"mu": {"grid": [1], "scale": "log"}}, "fedprox.mu: scale stands beside grid"),
        ({"mu": {"grid": [0.1, 0.1]}}, "methods: fedprox (mu=0.1) stands there twice"),
    ],
)
def test_bad_grids(setting: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(written(tmp_path, methods=[{"fedprox": setting}])), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists(), "found before anything is made"


# ------------------------------------------------------------------------------------------- availability and dropout
def rows_of(route: list[dict[str, Any]]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(round, client) of those who train, and of those whose updates are mixed."""
    trains = {(r["round"], r["client"]) for r in route if r["kind"] == "train"}
    return trains, {(r["round"], int(u)) for r in route if r["kind"] == "mix" for u in r["updates"]}


def test_who_is_away_has_no_row_and_who_drops_out_no_update(tmp_path: Path) -> None:
    games = [
        Game(make_run(m, SKEWED, rounds=12, availability=0.7, dropout=0.4), tmp_path) for m in ("fedavg", "scaffold")
    ]
    whole = Game(make_run("fedavg", SKEWED, rounds=12), tmp_path)
    (trains, mixed), others, (drawn, all_mixed) = (rows_of(g.opened.route) for g in (games[0], games[1], whole))
    assert others == (trains, mixed), "the same draws for every method of a seed"
    assert drawn == all_mixed and len(drawn) == 48 and mixed < trains < drawn
    assert 0.5 < len(trains) / 48 < 0.9 and 0.4 < len(mixed) / len(trains) < 0.8


def test_a_client_that_drops_out_trained_and_keeps_what_it_keeps(tmp_path: Path) -> None:
    game = Game(make_run("scaffold", SKEWED, rounds=6, dropout=0.4), tmp_path)
    trains, mixed = rows_of(game.opened.route)
    assert trains - mixed and mixed
    for t in range(6):
        before = game.state
        owns = dict(game.world.owns)
        game.play(1)
        by_client = {s.row["client"]: s for s in game.sent if s.row["round"] == t}
        for client, sent in by_client.items():
            m = sent.metrics[0]
            assert m["steps"] > 0 and m["payload_down"] > 0
            assert (m["payload_up"] > 0) == (m["header_up"] > 0) == ((t, client) in mixed)
            assert game.world.owns[client][0] == t and game.world.owns[client] != owns.get(client)
        assert equal(before, game.state) == (not any((t, c) in mixed for c in by_client))


@pytest.mark.parametrize(("key", "value", "trained"), [("availability", 0.0, 0), ("dropout", 1.0, 12)])
def test_a_round_without_updates_leaves_the_state(key: str, value: float, trained: int, tmp_path: Path) -> None:
    game = Game(make_run("fedavg", SKEWED, **{key: value}), tmp_path)
    first = game.state
    game.play()
    assert game.t == 3 and equal(first, game.state) and len(game.sent) == trained


def test_the_defaults_draw_nothing(tmp_path: Path) -> None:
    runs = [Game(make_run("fedavg", SKEWED, **k), tmp_path) for k in ({}, {"availability": 1, "dropout": 0})]
    assert runs[0].paths.folder == runs[1].paths.folder
    assert Counter(len(r["updates"]) for r in runs[0].opened.route if r["kind"] == "mix") == {4: 3}


# --------------------------------------------------------------------------------------------------------------- stop
def test_a_target_stops_the_run_at_the_same_round_in_every_way_of_running(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rounds": 20, "methods": ["fedavg", "scaffold"], "dropout": 0.2}
    game = Game(make_run("fedavg", BASE, rounds=20, dropout=0.2), tmp_path / "whole")
    curve = [p for t in range(21) for p in game.play(int(t > 0)).opened.evaluated(t, game.world)]
    looked = [c["accuracy"] for c in curve if c["round"] % 3 == 0 and c["round"]]
    target = looked[2] - 1e-9
    due = 3 * (1 + next(i for i, a in enumerate(looked) if a >= target))
    assert due < 18
    study = written(tmp_path, **keys, stop={"metric": "accuracy", "target": target, "every": 3})
    outs = {k: tmp_path / f"by{k}" for k in (5, 20)}
    for k, out in outs.items():
        p = played(study, out, k)[0]
        assert io.table_meta(io.read_table(p.rounds(20)))["stopped"] == due
        assert io.table_meta(io.read_table(p.curve(20)))["stopped"] == due
        last = io.read_tensors(p.state(20) / "server@20.safetensors")[0]
        assert equal(last, Game(make_run("fedavg", BASE, rounds=20, dropout=0.2), tmp_path / "game").play(due).state)
    assert len({fingerprint(o) for o in outs.values()}) == 1
    row = table_of(outs[5])["fedavg"]
    assert (row["rounds"], row["rounds_to_target"], row["reached"], row["idle_rounds"]) == (due, due, 1, 0)
    assert row["bytes_to_target"] == sum(row[f"{k}_{d}"] for k in ("payload", "header") for d in ("up", "down"))
    sent = [m for s in game.sent if s.row["round"] < due for m in s.metrics]
    assert row["bytes_to_target"] == sum(m[b] for m in sent for b in BYTES)
    assert row["lost_updates"] == sum(m["payload_up"] == 0 for m in sent) > 0
    seen = io.read_table(outs[5] / "table.obs.parquet").to_pylist()[0]
    assert seen["seconds_to_target"] == seen["seconds"] > 0
    assert "Rounds to target" in (outs[5] / "table.md").read_text()


def test_jobs_of_a_round_hand_a_stopped_state_on(tmp_path: Path) -> None:
    """Round by round as train and aggregate jobs: the files of a segment, also after the stop."""
    study = written(tmp_path, rounds=4, stop={"metric": "loss", "target": 100.0, "every": 2})
    (p,) = played(study, tmp_path / "out", 4)
    world = ["--run", p.spec, "--data", p.data, "--partition", p.partition, "--plans", p.plans, "--route", p.route]
    state, own, trained = p.state(0), p.own(0), []
    for t in range(4):
        made = {k: tmp_path / f"{t}-{k}" for k in ("job", "state", "own", *TABLES)}
        begin = ["--state", state, "--own", own]
        ends = ["--next-state", made["state"], "--next-own", made["own"]]
        ends += [x for name in TABLES for x in (f"--{name.partition('.')[0]}", made[name])]
        assert main([str(a) for a in ["train", *world, *begin, "--out", made["job"]]]) == 0
        assert main([str(a) for a in ["aggregate", *world, *begin, "--trained", made["job"], *ends]]) == 0
        trained.append(io.read_table(made["rounds.parquet"]).num_rows)
        state, own = made["state"], made["own"]
    assert trained == [4, 4, 0, 0]
    name = "server@4.safetensors"
    assert (state / name).read_bytes() == (p.state(4) / name).read_bytes()
    assert [r["round"] for r in io.read_table(p.curve(4)).to_pylist()] == [0, 1, 2]
    assert {r["round"] for r in io.read_table(p.rounds(4)).to_pylist()} == {0, 1}
    assert io.table_meta(io.read_table(tmp_path / "3-curve.parquet"))["stopped"] == 2


def test_a_target_out_of_reach_and_patience(tmp_path: Path) -> None:
    study = written(tmp_path, rounds=3, stop={"target": 1.0})
    played(study, tmp_path / "never")
    row = table_of(tmp_path / "never")["fedavg"]
    assert (row["rounds"], row["reached"], row["rounds_to_target"], row["bytes_to_target"]) == (3, 0, None, None)
    still = written(tmp_path, rounds=8, availability=0.0, stop={"metric": "loss", "patience": 2})
    (p,) = played(still, tmp_path / "still", 3)
    assert io.table_meta(io.read_table(p.rounds(8)))["stopped"] == 3, "the first look is the best, two do not better it"
    row = table_of(tmp_path / "still")["fedavg"]
    assert (row["rounds"], row["idle_rounds"], row["reached"]) == (3, 3, None)
    assert "to target" not in (tmp_path / "still/table.md").read_text()


def test_validation_rows_decide_where_there_are_some(tmp_path: Path) -> None:
    data = {**BASE["data"], "partition": {"kind": "iid", "clients": 6, "val": 0.3}}
    run = make_run("fedavg", BASE, data=data, rounds=6, stop={"metric": "loss", "patience": 1})
    game = Game(run, tmp_path)
    points = [p for t in range(3) for p in game.play(int(t > 0)).opened.evaluated(t, game.world)]
    assert [p["val_samples"] for p in points] == [72] * 3 and points[0]["samples"] == 48
    assert game.world.watch.best == min(p["val_loss"] for p in points[1:]) != points[-1]["loss"]


def test_looks(tmp_path: Path) -> None:
    run = make_run("fedavg", BASE, rounds=20, evaluate={"every": 4}, stop={"patience": 2, "every": 5})
    assert run.evaluations == [0, 4, 5, 8, 10, 12, 15, 16, 20] and run.looks == [5, 10, 15, 20]
    watch, seen = Watch(), []
    for t, accuracy in zip(run.evaluations, [0.1, 0.9, 0.5, 0.1, 0.6, 0.9, 0.6, 0.9, 0.2], strict=True):
        watch = look(watch, run, {"round": t, "accuracy": accuracy, "loss": 1.0})
        seen.append((watch.best, watch.since, watch.stopped))
    assert seen[4] == (0.6, 0, None) and seen[6] == (0.6, 1, None) and seen[8] == (0.6, 2, 20)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stop", {"metric": "f1", "target": 0.5}, "stop.metric: Input should be 'accuracy' or 'loss' (got 'f1')"),
        ("stop", {"metric": "accuracy"}, "stop: wanted one of target and patience"),
        ("stop", {"target": 0.5, "patience": 2}, "stop: wanted one of target and patience"),
        ("stop", {"target": 90}, "stop: target: wanted an accuracy in 0..1"),
        ("stop", {"patience": 0}, "stop.patience"),
        ("stop", {"patience": 1, "every": 0}, "stop.every"),
        ("availability", 1.5, "availability"),
        ("dropout", -0.1, "dropout"),
        ("dropout", True, "dropout: wanted a number"),
    ],
)
def test_bad_keys(key: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FedpipeError, match="study.yaml") as e:
        load_study(written(tmp_path, **{key: value}))
    assert said in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------- select
SELECT: dict[str, Any] = {
    "data": {**BASE["data"], "partition": {"kind": "iid", "clients": 6, "val": 0.3}},
    "methods": ["fedavg", {"fedprox": {"mu": {"grid": [100.0, 0.01]}}}],  # the first is far too strong
    "seeds": [0, 1, 2],
    "select": {"on": "validation", "seed": 0},
}


def test_a_grid_is_tuned_on_validation_rows_at_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = written(tmp_path, **SELECT), tmp_path / "out"
    runs = played(study, out)
    assert [(p.run.label, p.run.seed) for p in runs] == [
        *(("fedprox (mu=100.0)", 0), ("fedprox (mu=0.01)", 0)),
        *(("fedavg", 1), ("fedavg", 2)),
        *(("fedprox (mu of [100.0, 0.01]) selected", s) for s in (1, 2)),
    ]
    (chosen,) = runs[-1].chosen
    rows = io.read_table(chosen).to_pylist()
    assert [r["chosen"] for r in rows] == [r["accuracy"] == max(s["accuracy"] for s in rows) for r in rows]
    assert [r["samples"] for r in rows] == [72, 72] and [r["chosen"] for r in rows] == [False, True]
    assert load_run(runs[-1].spec).method.settings == {"mu": 0.01}
    table = table_of(out)
    assert list(table) == ["fedavg", "fedprox (mu=0.01) selected"] and {r["seeds"] for r in table.values()} == {2}
    assert main(["run", str(study), "--out", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().err


def snakemake(study: Path, out: Path, *options: str) -> str:
    command = [sys.executable, "-m", "snakemake", *options, "--directory", out, "--config", f"study={study}"]
    done = subprocess.run([*command, f"out={out}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_selecting_is_a_job_that_the_runs_wait_for(tmp_path: Path) -> None:
    said = snakemake(written(tmp_path, **SELECT), tmp_path / "out", "-n", "-c1")
    assert {k: int(n) for k, n in re.findall(r"^(select|partition|measure|assign|evaluate) +(\d+)$", said, re.M)} == {
        **{"select": 1, "partition": 3, "assign": 6, "evaluate": 6},
        "measure": 4,  # of each candidate, of the grid with what is chosen, of the method without one
    }


@pytest.mark.slow
def test_selecting_by_jobs_gives_the_same_bytes(tmp_path: Path) -> None:
    study = written(tmp_path, **{**SELECT, "methods": SELECT["methods"][1:], "seeds": [1]})
    played(study, tmp_path / "here")
    snakemake(study, tmp_path / "jobs", "-j2")
    assert fingerprint(tmp_path / "jobs") == fingerprint(tmp_path / "here")
    assert "Nothing to be done" in snakemake(study, tmp_path / "jobs", "-j2")


def test_the_test_rows_do_not_choose(tmp_path: Path) -> None:
    run = Study.model_validate({**BASE, **SELECT}).compared()[-1]
    spec, files = tmp_path / "spec.json", []
    assert run.select is not None
    bare = run.but(select=None, selection=None, seed=0)
    spec.write_text(bare.model_dump_json())
    for point, (val, test) in zip(run.candidates, [(0.5, 0.9), (0.7, 0.1)], strict=True):
        files.append(tmp_path / f"{val}.parquet")
        shared = {"client": None, "loss": 1.0, "samples": 9}
        both = [{**shared, "column": "global", "accuracy": test}, {**shared, "column": "validation", "accuracy": val}]
        io.write_table(files[-1], both, {"label": point.label}, METRICS)
    args = ["select", "--run", spec, "--metrics", *files, "--chosen", tmp_path / "chosen.parquet"]
    assert main([str(a) for a in args]) == 0
    rows = io.read_table(tmp_path / "chosen.parquet").to_pylist()
    assert [(r["accuracy"], r["chosen"]) for r in rows] == [(0.5, False), (0.7, True)]
    with pytest.raises(FedpipeError, match="none are of fedprox"):
        select_step(spec, files[:1], chosen=tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data": BASE["data"]}, "select: data.partition.val is 0"),
        ({"seeds": [0]}, "select.seed: 0 is the only one of seeds"),
        ({"select": {"on": "test"}}, "select.on: Input should be 'validation' (got 'test')"),
    ],
)
def test_bad_selections(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FedpipeError) as e:
        load_study(written(tmp_path, **{**SELECT, **keys}))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_kept_tables_can_be_compared_with_the_code_wherever_it_lies() -> None:
    """Also those that begin with weights which are not there."""
    command = [sys.executable, str(ROOT / "benchmarks/studies/run.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("note: ") for line in done.stdout.splitlines())
