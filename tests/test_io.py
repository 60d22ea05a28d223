"""Artefacts: whole or not at all, equal from everybody, and whatever is altered is found and named."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import TINY

from fedpipe import io, packed
from fedpipe.__main__ import main
from fedpipe.errors import Damaged, FedpipeError
from fedpipe.fingerprint import fingerprint
from fedpipe.local import Job, run_jobs
from fedpipe.paths import StudyPaths
from fedpipe.states import read_world, write_owns, write_states
from fedpipe.studyfile import load_study
from fedpipe.types import Tensors

ROWS = [{"round": t, "loss": 1 / (t + 1)} for t in range(40)]
KINDS = ("x.safetensors", "x.parquet", "x.arrow")


def write(path: Path, meta: dict[str, Any] | None = None) -> Path:
    """A small artefact of the kind its name says."""
    if path.suffix == ".safetensors":
        io.write_tensors(path, {"model/a": torch.arange(64.0).reshape(8, 8), "model/b": torch.ones(3)}, meta or {})
    else:
        io.write_table(path, pa.Table.from_pylist(ROWS), meta or {})
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for name in KINDS:
        path = write(tmp_path / name, {"made": "by a test"})
        assert io.read_meta(path)["made"] == "by a test"
    assert io.read_table(tmp_path / "x.parquet").to_pylist() == ROWS == io.map_arrow(tmp_path / "x.arrow").to_pylist()
    tensors, _ = io.read_tensors(tmp_path / "x.safetensors")
    assert list(tensors) == ["model/a", "model/b"] and tensors["model/a"][1, 0] == 8
    raw = (tmp_path / "x.safetensors").read_bytes()
    tensors["model/a"].zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == raw, "the map is private"


# ------------------------------------------------------------------------------------------------ damage
@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    raw = path.read_bytes()
    seals = [m.start() + i for m in io._SEAL.finditer(raw) for i in (0, 5, 36)]  # the checksum's own bytes too
    spread = range(0, len(raw), max(1, len(raw) // 200))
    generator = random.Random(0)
    for at in [*spread, *seals, len(raw) - 1]:
        flipped = raw[at] ^ (1 << generator.randrange(8))
        path.write_bytes(raw[:at] + bytes([flipped]) + raw[at + 1 :])
        with pytest.raises(Damaged, match=name):
            io.read_meta(path)
    path.write_bytes(raw)
    io.read_meta(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_short_or_longer_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    raw = path.read_bytes()
    for wrong in (*(raw[: len(raw) * k // 8] for k in range(8)), raw[:-1], raw[1:], raw + b"\0", raw + raw):
        path.write_bytes(wrong)
        with pytest.raises(Damaged, match=name):
            io.read_meta(path)
        if path.suffix == ".arrow":
            with pytest.raises(Damaged, match=name):
                io.map_arrow(path)


@pytest.mark.parametrize("name", KINDS)
def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as later:
        later.setattr(io, "FORMAT", 99)
        path = write(tmp_path / name)
    read = io.read_tensors if path.suffix == ".safetensors" else io.read_table
    for reading in (read, io.read_meta, *([io.map_arrow] if path.suffix == ".arrow" else [])):
        with pytest.raises(FedpipeError, match=rf"{name}: artefact format 99, this version reads {io.FORMAT}"):
            reading(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    (tmp_path / "a.safetensors").write_bytes(save({"model/a": torch.ones(2)}))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    (tmp_path / "c.arrow").write_text("no Arrow at all")
    write(tmp_path / "x.safetensors").rename(tmp_path / "d.parquet")  # sealed, but not what the name says
    write(tmp_path / "x.parquet").rename(tmp_path / "e.safetensors")
    write(tmp_path / "x.parquet").rename(tmp_path / "f.arrow")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(FedpipeError) as said:
            io.read_meta(path)
        assert str(said.value).startswith(f"{path}: ") and "\n" not in str(said.value)
    with pytest.raises(FedpipeError, match="nowhere.parquet: no such file"):
        io.read_table(tmp_path / "nowhere.parquet")


EIGHT = """
import hashlib, random, sys
from pathlib import Path
import torch
from fedpipe import io
folder, who = Path(sys.argv[1]), int(sys.argv[2])
def shuffled(pairs):
    pairs = list(pairs)
    random.Random(who).shuffle(pairs)
    return dict(pairs)
tensors = shuffled((f"model/{n}", torch.arange(n * 6.0).reshape(n, 6).to(t)) for n, t in
                   enumerate([torch.float32, torch.float64, torch.int64, torch.float16] * 5))
meta = shuffled([("round", 3), ("client", 1), ("names", {"b": 1, "a": 2}), ("weight", 0.1)])
io.write_tensors(folder / "x.safetensors", tensors, meta)
import pyarrow as pa
schema = pa.schema([("round", pa.int32()), ("loss", pa.float64()), ("name", pa.string())])
rows = [shuffled([("round", t), ("loss", t / 7), ("name", f"n{t % 3}")]) for t in range(50)]
for name in ("x.parquet", "x.arrow"):
    io.write_table(folder / name, rows, meta, schema)
print(*(hashlib.sha256((folder / f"x.{k}").read_bytes()).hexdigest() for k in ("safetensors", "parquet", "arrow")))
"""


def test_eight_processes_write_the_same_bytes(tmp_path: Path) -> None:
    started = []
    for who in range(8):
        (tmp_path / str(who)).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(who)}
        command = [sys.executable, "-c", EIGHT, str(tmp_path / str(who)), str(who)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    said = {p.communicate(timeout=100)[0] for p in started}
    assert len(said) == 1 and len(said.pop().split()) == 3


# ------------------------------------------------------------------------------------ whole or not at all
def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [no_space, interrupt])
def test_a_write_that_fails_leaves_the_old(tmp_path: Path, monkeypatch, call: str, fault: Callable[..., None]) -> None:
    old, new = write(tmp_path / "old.parquet", {"k": 1}), tmp_path / "new.parquet"
    raw = old.read_bytes()
    write_states(tmp_path / "state", {"server@0": {"model/a": torch.zeros(2)}}, 0, {})
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fault)
        for path in (old, new):
            with pytest.raises((FedpipeError, KeyboardInterrupt), match=rf"{path}: could not|^$"):
                write(path, {"k": 2})
        for name in ("state", "other"):
            with pytest.raises((FedpipeError, KeyboardInterrupt)):
                write_states(tmp_path / name, {"server@1": {"model/a": torch.ones(2)}}, 1, {})
    assert old.read_bytes() == raw
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.parquet", "state"]
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["server@0.safetensors"]


KILLED = """
import os, sys
from pathlib import Path
from fedpipe import io
path, folder = Path(sys.argv[1]), Path(sys.argv[2])
replace, left = os.replace, int(sys.argv[3])
def die(*arguments):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    replace(*arguments)
os.replace = die
if left == 0:
    io.write_text(path, "new")
with io.new_folder(folder) as f:
    (f / "a").write_text("new")
    (f / "b").write_text("new")
"""


def test_a_kill_leaves_nothing_half(tmp_path: Path) -> None:
    """Killed before the first rename, and between the two renames that bring a folder in place of an old one."""
    file, folder = tmp_path / "x.json", tmp_path / "folder"
    for renames in (0, 1):
        io.write_text(file, "old")
        with io.new_folder(folder) as f:
            (f / "a").write_text("old")
        command = [sys.executable, "-c", KILLED, str(file), str(folder), str(renames)]
        assert subprocess.run(command).returncode == 9
        assert file.read_text() == "old"
        assert not folder.exists() or [p.read_text() for p in folder.iterdir()] == ["old"]
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")], "a kill leaves its temporary"
    io.write_text(file, "new")
    with io.new_folder(folder) as f:
        (f / "a").write_text("new")
    assert file.read_text() == "new" and [p.name for p in folder.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The tiny study's file, and the digest of its results where nothing went wrong."""
    root = tmp_path_factory.mktemp("io")
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["run", str(root / "tiny.yaml"), "--out", str(root / "r")]) == 0
    return root / "tiny.yaml", fingerprint(root / "r")


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """No file may grow beyond 30 kB, as on a full disk, until the returned function is called."""
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield lift
    lift()
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_one_line(undisturbed, tmp_path: Path, capsys, small_files: Callable[[], None]) -> None:
    status = main(["run", str(undisturbed[0]), "--out", str(tmp_path)])
    small_files()
    lines = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert status == 2 and len(lines) == 1 and "data.arrow: could not be written (" in lines[0], lines
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*.tmp"))


def test_a_run_stopped_again_and_again_ends_alike(undisturbed, tmp_path: Path, monkeypatch, capsys) -> None:
    """Stopped at every eighth rename, a run goes on each time with what is whole, among temporaries left behind."""
    study, wanted = undisturbed
    replace, left, stops = os.replace, 0, 0

    def limited(source: Any, target: Any) -> None:
        nonlocal left
        if left == 0:
            shutil.copy(source, f"{source}.left.tmp") if Path(source).is_file() else None
            interrupt()
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", limited)
    while stops < 20:
        left = 8
        if main(["run", str(study), "--out", str(tmp_path)]) == 0:
            break
        stops += 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("fedpipe: interrupted; run the same command again")
        for file in (f for f in tmp_path.rglob("*") if f.suffix in (".parquet", ".arrow", ".safetensors")):
            io.read_meta(file)
    assert 3 <= stops < 20
    assert fingerprint(tmp_path) == wanted


def test_a_damaged_artefact_is_named_and_made_again(undisturbed, tmp_path: Path, capsys) -> None:
    study, wanted = undisturbed
    out = tmp_path / "r"
    shutil.copytree(study.parent / "r", out)
    (file,) = out.glob("partition/*/partition.parquet")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    (run,) = out.glob("runs/*/run.json")
    (data,) = out.glob("data/*/data.arrow")
    written = {"--plans": run.with_name("plans.parquet"), "--assignment": run.with_name("assignment.parquet")}
    world = {"--state": run.parent / "state/000002", "--own": run.parent / "own/000002"}
    options = {
        "--run": run,
        "--data": data,
        "--partition": file,
        **written,
        **world,
        "--metrics": tmp_path / "m.parquet",
    }
    assert main(["evaluate", *(str(x) for pair in options.items() for x in pair)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fedpipe: error: {file}: damaged") and said.count("\n") == 1
    assert not (tmp_path / "m.parquet").exists()
    assert main(["run", str(study), "--out", str(out)]) == 0
    assert f"{file}: damaged" in capsys.readouterr().err
    assert fingerprint(out) == wanted


# ------------------------------------------------------------------------- what a step is given by another
def arguments(job: Job) -> list[str]:
    words = [job.step]
    for name, value in {**job.reads, **job.writes}.items():
        words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def trained(undisturbed: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Job]:
    """Round 0 of the tiny study, trained by two jobs; gives the `aggregate` of copies of their folders."""
    study, _ = undisturbed
    (p,) = StudyPaths(study.parent / "r", load_study(study)).runs
    (segment,) = (j for j in run_jobs(p, p.run.rounds) if j.step == "segment")
    reads = {k: v for k, v in segment.reads.items() if k != "last"}
    root = tmp_path_factory.mktemp("trained")
    for job in (0, 1):
        share = {**reads, "job": job, "jobs": 2}
        assert main(arguments(Job("train", share, {"out": root / f"job{job}"}))) == 0

    def aggregate(folder: Path) -> Job:
        shutil.copytree(root, folder / "trained")
        shutil.copytree(reads["state"], folder / "state")
        shutil.copytree(reads["own"], folder / "own")
        jobs = [folder / f"trained/job{j}" for j in (0, 1)]
        world = {"state": folder / "state", "own": folder / "own", "trained": jobs}
        out = folder / "out"
        results = {k: out / f"{k}.parquet" for k in ("rounds", "curve", "times", "peaks")}
        return Job("aggregate", {**reads, **world}, {"next_state": out / "state", "next_own": out / "own", **results})

    return aggregate


def altered(path: Path, change: Callable[[Tensors], Any]) -> None:
    """The same file with other tensors, its seal right."""
    tensors, meta = io.read_tensors(path)
    change(tensors)
    io.write_tensors(path, tensors, meta)


def updates(folder: Path) -> list[tuple[Path, str]]:
    """Packed file and client of every update."""
    files = sorted(folder.glob("trained/*/update.pack"))
    return [(f, name) for f in files for name in packed.Packed(f).images]


def replaced(path: Path, name: str, image: bytes) -> None:
    """The same packed file with another image for a client."""
    images = {n: bytes(raw) for n, raw in packed.Packed(path).images.items()}
    packed.write(path, (images | {name: image}).items())


def test_untouched_updates_are_taken(trained, tmp_path: Path) -> None:
    job = trained(tmp_path)
    assert len(updates(tmp_path)) == TINY["cohort"]
    assert main(arguments(job)) == 0
    world, t = read_world(job.writes["next_state"], job.writes["next_own"], io.read_tensors(
        tmp_path / "state/server@0.safetensors")[0])  # fmt: skip
    assert t == 1 and list(world.states) == ["server@1"]


BIAS = "model/stem.1.bias"
CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(BIAS), f"{BIAS} is missing"),
    "renamed": (lambda t: t.update({"model/other": t.pop(BIAS)}), f"{BIAS} is missing"),
    "added": (lambda t: t.update({"model/other": torch.ones(1)}), "model/other is no tensor of the state"),
    "longer": (lambda t: t.update({BIAS: torch.ones(33)}), rf"{BIAS} has shape (33,), wanted (32,)"),
    "scalar": (lambda t: t.update({BIAS: torch.ones(())}), rf"{BIAS} has shape (), wanted (32,)"),
    "type": (lambda t: t.update({BIAS: t[BIAS].long()}), f"{BIAS} is torch.int64, wanted torch.float32"),
    "nan": (lambda t: t[BIAS].__setitem__(0, float("nan")), f"{BIAS} holds values that are not finite"),
    "inf": (lambda t: t[BIAS].__setitem__(3, -float("inf")), f"{BIAS} holds values that are not finite"),
    "mask": (lambda t: t.update({f"mask/{BIAS}": torch.ones(3)}), f"mask/{BIAS} has shape (3,), wanted (32,)"),
    **{
        f"private {p}": (lambda t, p=p: t.update({f"{p}/x": torch.ones(1)}), f"{p}/x is private")
        for p in ("own", "in", "re", "tmp")
    },
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_update_that_breaks_its_promise_is_refused(trained, tmp_path: Path, capsys, kind: str) -> None:
    job = trained(tmp_path)
    change, wanted = CHANGES[kind]
    path, client = updates(tmp_path)[1]
    tensors, meta = io.decode(packed.Packed(path).image(client))
    change(tensors)
    replaced(path, client, io.encode(tensors, meta))
    assert main(arguments(job)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fedpipe: error: update of client {client}, round 0: {wanted}"), said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_update_that_is_damaged_or_lost_is_refused(trained, tmp_path: Path, capsys) -> None:
    job = trained(tmp_path)
    path, client = updates(tmp_path)[0]
    raw = path.read_bytes()
    for wrong in (raw[:-1], raw[:9], b"", raw[:-1] + bytes([raw[-1] ^ 1]), raw[1:], raw + raw):
        path.write_bytes(wrong)
        assert main(arguments(job)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fedpipe: error: {path}") and ": damaged" in said and said.count("\n") == 1
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    assert main(arguments(job)) == 2
    assert capsys.readouterr().err.startswith(f"fedpipe: error: {path} (client {client}): damaged")
    path.unlink()
    assert main(arguments(job)) == 2
    assert path.name in (said := capsys.readouterr().err) and said.count("\n") == 1
    path.write_bytes(raw)
    first, second = job.reads["trained"]
    job.reads["trained"] = [first]
    assert main(arguments(job)) == 2
    assert "no job folder holds client" in (said := capsys.readouterr().err) and said.count("\n") == 1
    shutil.copytree(first, tmp_path / "again")
    job.reads["trained"] = [first, second, tmp_path / "again"]
    assert main(arguments(job)) == 2
    assert re.search(r"job0 and .*again both hold client", said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_update_of_somebody_else_is_refused(trained, tmp_path: Path, capsys) -> None:
    job = trained(tmp_path)
    (mine, who), (other, whose) = updates(tmp_path)[:2]
    replaced(mine, who, bytes(packed.Packed(other).image(whose)))
    assert main(arguments(job)) == 2
    said = capsys.readouterr().err
    assert f"update of client {who}, round 0: what arrived is of client {whose}, round 0" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_state_that_is_not_what_its_name_says_is_refused(trained, tmp_path: Path, capsys) -> None:
    job = trained(tmp_path)
    path = tmp_path / "state/server@0.safetensors"

    def refused(wanted: str) -> None:
        assert main(arguments(job)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fedpipe: error: {wanted}") and said.count("\n") == 1, said

    whole = path.read_bytes()
    altered(path, lambda t: t[BIAS].__setitem__(0, float("nan")))
    refused(f"{path}: {BIAS} holds values that are not finite")
    path.write_bytes(whole)
    altered(path, lambda t: t.update({BIAS: torch.ones(31)}))
    refused(f"{path}: {BIAS} is (31,) torch.float32, wanted (32,) torch.float32")
    path.write_bytes(whole[:-1])
    refused(f"{path}: damaged")
    path.write_bytes(whole)
    other = path.rename(path.with_name("server@1.safetensors"))
    refused(f"{other}: holds state server@0 of round 0, which is not what its name says")
    other.unlink()
    refused(f"{tmp_path / 'state'}: no state in this folder")
    path.write_bytes(whole)
    shutil.copy(path, tmp_path / "own/three@0.safetensors")
    refused(f"{tmp_path / 'own/three@0.safetensors'}: no name of an own file")
    shutil.rmtree(tmp_path / "own")
    refused(f"{tmp_path / 'own'}: no such folder")
    assert not (tmp_path / "out").exists()


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    like = {"model/a": torch.zeros(2, 3), "model/b": torch.zeros(1)}
    write_owns(tmp_path / "own", {}, {})
    for wrong, wanted in [
        ({"model/a": torch.zeros(3, 2)}, r"model/a is \(3, 2\) torch.float32, wanted \(2, 3\) torch.float32"),
        ({"model/a": torch.zeros(2, 3).double()}, r"model/a is \(2, 3\) torch.float64, wanted"),
        ({"model/c": torch.zeros(1)}, "model/c is not wanted"),
    ]:
        write_states(tmp_path / "state", {"server@4": {**like, **wrong}}, 4, {})
        with pytest.raises(FedpipeError, match=rf"server@4\.safetensors: {wanted}"):
            read_world(tmp_path / "state", tmp_path / "own", like)
    write_states(tmp_path / "state", {"server@4": {"model/a": like["model/a"]}}, 4, {})
    with pytest.raises(FedpipeError, match=r"server@4\.safetensors: model/b is missing"):
        read_world(tmp_path / "state", tmp_path / "own", like)
    write_states(tmp_path / "state", {"server@4": like}, 4, {})
    assert read_world(tmp_path / "state", tmp_path / "own", like)[1] == 4
