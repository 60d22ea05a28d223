"""Steps data and partition: what is decoded, who gets which row, and what a person is told when it cannot be done."""

import importlib.util
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedpipe.config import Budgets, Data, Partition, Study
from fedpipe.data.build import build
from fedpipe.data.dataset import _opened, load
from fedpipe.data.draw import apportion, draw_by_class
from fedpipe.data.partitioners import owners
from fedpipe.data.share import histogram, test_owners, validation
from fedpipe.errors import Damaged, FedpipeError
from fedpipe.io import map_arrow, read_table, table_meta, write_table
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.rng import rng
from fedpipe.steps import data, partition

test_owners.__test__ = False  # a function of the package, not a test
KINDS = ["iid", "dirichlet", "dir", "balanced-dir", "shards"]
Y = np.arange(5000) % 10  # 500 rows of each of ten classes


def steps(root: Path, spec: dict, **keys) -> RunPaths:
    """Run both steps on a study's `data` keys."""
    study = StudyPaths(root, Study(name="t", data=spec, cohort=1, methods=["fedavg"], **keys))
    study.write_specs()
    (paths,) = study.runs
    data.run(paths.data_spec, data=paths.data)
    partition.run(paths.partition_spec, paths.data, partition=paths.partition, clients=paths.clients)
    return paths


def counts(seed: int = 0, y: np.ndarray = Y, **keys) -> np.ndarray:
    """Rows [clients, classes] that a partitioner gives."""
    spec = Partition(**keys)
    classes = int(y.max()) + 1
    return histogram(owners(y, classes, None, spec, rng(seed)), y, spec.clients, classes)


def png(level: int, mode: str = "L", size: tuple[int, int] = (6, 4)) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level, 0, 255)).save(sink, "png")
    return sink.getvalue()


def write_parquet(file: Path, columns: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def image_column(levels) -> pa.Array:
    return pa.array([{"bytes": png(v), "path": None} for v in levels])


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> RunPaths:
    spec = {"name": "digits", "partition": {"clients": 40, "alpha": 0.3, "val": 0.1}}
    return steps(tmp_path_factory.mktemp("digits"), spec, budgets={"bytes": {"5MiB": 10, "1GB": 30}})


# ------------------------------------------------------------------------------------------------ data
def test_digits_are_decoded_once_and_normalised(digits):
    found = load(digits.data)
    assert found.x.shape == (1797, 1, 16, 16) and found.shape == (1, 16, 16) and found.classes == 10
    assert found.names == tuple("0123456789") and int(found.x.max()) == 255
    assert found.test.sum() == 1797 // 5 and not found.test[: 1797 - 359].any()
    x, y = found.batch(torch.from_numpy(np.flatnonzero(~found.test)), torch.float64)
    assert abs(float(x.mean())) < 1e-9 and abs(float(x.std(correction=0)) - 1) < 1e-9
    assert y.dtype == torch.int64 and y.bincount().min() > 130


def test_pixels_are_views_of_the_file_and_writing_to_them_spares_it(digits):
    before, held = digits.data.read_bytes(), pa.total_allocated_bytes()
    found = load(digits.data)
    assert pa.total_allocated_bytes() - held < found.x.numel() / 10
    found.x[0] = 7
    assert digits.data.read_bytes() == before and load(digits.data) is found
    _opened.cache_clear()
    assert int(load(digits.data).x[0].max()) != 7


def test_damage_is_found(digits, tmp_path):
    raw = bytearray(digits.data.read_bytes())
    raw[len(raw) // 2] ^= 1
    for name, content in (("flipped", raw), ("short", raw[:-100]), ("empty", b"")):
        (tmp_path / f"{name}.arrow").write_bytes(content)
        with pytest.raises(Damaged, match=f"{name}.arrow"):
            map_arrow(tmp_path / f"{name}.arrow")


def test_equal_studies_give_equal_bytes(digits, tmp_path):
    again = steps(
        tmp_path,
        {"name": "digits", "partition": {"clients": 40, "alpha": 0.3, "val": 0.1}},
        budgets={"bytes": {"5MiB": 10, "1GB": 30}},
    )
    pictures = [again.clients.with_name(f"histogram.{kind}") for kind in ("svg", "png")]
    for file in [again.data, again.partition, again.clients, *pictures]:
        assert file.read_bytes() == (digits.root / file.relative_to(again.root)).read_bytes(), file.name


def test_rows_are_drawn_by_class(tmp_path):
    table, meta = build(Data(rows=100, size=8))
    label, test = table.column("label").to_numpy(), table.column("test").to_numpy()
    assert meta["shape"] == [1, 8, 8] and test.sum() == 20 and (~test).sum() == 100
    assert np.bincount(label[~test]).tolist() == [10] * 10
    with pytest.raises(FedpipeError, match="data.rows: 1439 asks for 1439 train rows, there are 1438"):
        build(Data(rows=1439))


def test_parquet_and_image_folders_are_read_by_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPIPE_DATA", str(tmp_path))
    levels = {"train": [0, 40, 80, 120, 160, 200, 240, 255], "test": [10, 250]}
    for split, values in levels.items():
        labels = [0 if v < 128 else 1 for v in values]
        write_parquet(tmp_path / "flat" / f"{split}.parquet", {"image": image_column(values), "label": labels})
        for v, c in zip(values, labels, strict=True):
            file = tmp_path / "tree" / split / str(c) / f"{v:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(v))
    flat, tree = (build(Data(name=name)) for name in ("flat", "tree"))
    assert flat[0].equals(tree[0]) and flat[1]["shape"] == [1, 4, 6] and flat[1]["names"] == ["0", "1"]
    assert flat[0].column("image").to_pylist()[1] == [40] * 24
    assert flat[1]["source"] == "FEDPIPE_DATA/flat, Parquet" and tree[1]["source"] == "FEDPIPE_DATA/tree, image folder"
    assert build(Data(name="flat", size=5))[1]["shape"] == [1, 5, 5]


def test_mixed_images_become_rgb_and_uneven_sizes_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPIPE_DATA", str(tmp_path))
    images = [png(9), png(7, "RGB"), *[png(v) for v in range(8)]]
    write_parquet(tmp_path / "mixed" / "train.parquet", {"pixels": images, "label": [0, 1] * 5})
    table, meta = build(Data(name="mixed", test=None))
    assert meta["shape"] == [3, 4, 6] and table.num_rows == 10 and sum(table.column("test").to_pylist()) == 2
    assert [9] * 72 in table.column("image").to_pylist()
    images[3] = png(1, size=(3, 3))
    write_parquet(tmp_path / "mixed" / "train.parquet", {"pixels": images, "label": [0, 1] * 5})
    with pytest.raises(FedpipeError, match=r"data.size: images differ in size \(3x3 to 6x4\)"):
        build(Data(name="mixed"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image": "picture"}, r"data.image: no column 'picture' \(columns: image, fine, coarse, writer\)"),
        ({}, "data.label: fine, coarse, writer could all be it; name one"),
        ({"label": "image"}, "data.label: column 'image' holds no class labels"),
        ({"label": "fine", "image": "fine"}, "data.image: column 'fine' holds no images"),
        ({"label": "fine", "train": "training"}, "data.train: two has no split 'training'; it has train"),
        ({"label": "fine", "test": "validation"}, "data.test: two has no split 'validation'; it has train"),
        (
            {"label": "fine", "partition": {"kind": "natural", "column": "who"}},
            "data.partition.column: no column 'who'",
        ),
    ],
)
def test_unclear_columns_are_listed(tmp_path, monkeypatch, keys, message):
    monkeypatch.setenv("FEDPIPE_DATA", str(tmp_path))
    columns = {"image": image_column([1, 2]), "fine": [0, 1], "coarse": [0, 0], "writer": [5, 6]}
    write_parquet(tmp_path / "two" / "train.parquet", columns)
    with pytest.raises(FedpipeError, match=message):
        build(Data(name="two", **keys))


def test_missing_data_says_where_it_looked(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FEDPIPE_DATA", raising=False)
    with pytest.raises(FedpipeError, match="data.name: no data set 'no_such_set' .FEDPIPE_DATA is not set") as e:
        build(Data(name="no_such_set"))
    assert "no_such_set/train.parquet" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setenv("FEDPIPE_DATA", str(tmp_path))
    with pytest.raises(FedpipeError, match=f"FEDPIPE_DATA={tmp_path}"):
        build(Data(name="no_such_set"))
    (tmp_path / "void").mkdir()
    with pytest.raises(FedpipeError, match="void: no data set; wanted <split>.parquet"):
        build(Data(name="void"))


# ------------------------------------------------------------------------------------------- partition
def test_every_row_is_used_once_and_clients_count_them(digits):
    rows, clients = read_table(digits.partition), read_table(digits.clients).to_pylist()
    found = load(digits.data)
    assert rows.column("row").to_pylist() == list(range(1797))
    split, owner = np.array(rows.column("split").to_pylist()), rows.column("client").to_numpy()
    assert (found.test == (split == "test")).all()
    for c in clients:
        mine = owner == c["client"]
        assert [c["samples"], c["val"], c["test"]] == [(mine & (split == s)).sum() for s in ("train", "val", "test")]
        assert c["labels"] == np.bincount(found.y[mine & (split == "train")], minlength=10).tolist()
        assert c["val"] == int(0.1 * (c["samples"] + c["val"])) and c["samples"] >= 2
    given = [tuple(c[k] for k in ("group", "kind", "value", "name")) for c in clients]
    assert given == [(0, "bytes", 5 * 2**20, "5 MiB")] * 10 + [(1, "bytes", 10**9, "953.7 MiB")] * 30


def test_budgets_are_kinds_and_values_or_none():
    labels, none = np.ones((3, 2), np.int64), np.zeros(3, np.int64)
    for keys, group, kinds, values in (
        ({}, [0, 0, 0], [None] * 3, [None] * 3),
        ({"bytes": {1024: 3}}, [0, 0, 0], ["bytes"] * 3, [1024] * 3),
        ({"like_width": {1.0: 2, 0.5: 1}}, [0, 1, 1], ["width"] * 3, [0.5, 1.0, 1.0]),
        ({"scenario": "surplus"}, [0, 1, 2], ["width"] * 3, [1 / 6, 1 / 3, 1 / 2]),
    ):
        table = partition.clients_table(labels, none, none, Budgets(**keys))
        assert [table.column(c).to_pylist() for c in ("group", "kind", "value")] == [group, kinds, values]


@pytest.mark.parametrize("kind", KINDS)
def test_a_partitioner_gives_each_row_to_one_client_by_its_seed(kind):
    a, b, c = (counts(seed, kind=kind, clients=20) for seed in (0, 0, 1))
    assert a.sum(0).tolist() == [500] * 10 and a.sum(1).min() >= 2
    assert (a == b).all() and (a != c).any()


def test_which_rows_a_client_gets_is_random():
    spec = Partition(kind="balanced-dir", clients=20)
    owner = owners(Y, 10, None, spec, rng(0))
    halves = histogram(owner[:2500], Y[:2500], 20, 10).sum(1)
    assert halves.min() > 90 and halves.max() < 160  # of 250 rows each: no client has only early or late ones


def test_sizes_differ_by_at_most_one():
    for kind in ("iid", "balanced-dir", "shards"):
        sizes = counts(kind=kind, clients=30, shards=1).sum(1)
        assert sizes.max() - sizes.min() <= 1, kind
    assert counts(kind="balanced-dir", clients=100).sum(1).tolist() == [50] * 100
    assert counts(kind="iid", clients=10).min() > 25  # 50 expected of each class


def test_small_alpha_means_few_labels():
    for kind in ("dirichlet", "dir", "balanced-dir"):
        # Share of its largest class in a client's rows, averaged: 0.1 when all classes are alike.
        few, many = (
            np.mean([counts(s, kind=kind, clients=20, alpha=a).max(1).sum() / len(Y) for s in range(3)])
            for a in (0.1, 100)
        )
        assert few > 0.5 and many < 0.15, (kind, few, many)


def test_dirichlet_shares_have_the_variance_of_their_law():
    # Share of one class ~ Beta(alpha, (K-1) alpha): variance (1/K)(1 - 1/K)/(K alpha + 1).
    share = np.concatenate([counts(s, kind="dirichlet", clients=20, alpha=1.0) / 500 for s in range(40)])
    assert share.var() == pytest.approx((1 / 20) * (19 / 20) / 21, rel=0.1)


def test_dir_stops_giving_to_full_clients():
    plain, capped = (
        np.mean([counts(s, kind=kind, clients=20, alpha=0.3).sum(1).max() for s in range(10)])
        for kind in ("dirichlet", "dir")
    )
    assert capped < plain
    spec = {"kind": "dir", "clients": 20, "alpha": 0.3, "min_samples": 50}
    for seed in range(5):
        table = counts(seed, **spec)
        held = np.cumsum(table, 1) - table  # before each class
        # One row of rounding may fall on the last client.
        assert table.sum(1).min() >= 50 and (table[held >= 250] <= 1).all()


def test_balanced_dir_is_the_weighted_draw_without_replacement():
    # The first client of a small problem against the definition, drawn row by row: equal means.
    y, weights = np.repeat([0, 1, 2], [6, 10, 4]), np.array([0.7, 0.1, 0.2])
    from fedpipe.data.partitioners import _weighted

    g, left = rng(0), np.array([6, 10, 4])
    ours = np.mean([_weighted(weights, left, 8, g) for _ in range(4000)], 0)
    p = weights[y] / weights[y].sum()
    theirs = np.mean([np.bincount(y[g.choice(20, 8, replace=False, p=p)], minlength=3) for _ in range(4000)], 0)
    assert np.abs(ours - theirs).max() < 0.1
    exhausted = _weighted(np.array([1.0, 0.0, 0.0]), left, 8, g)
    assert exhausted[0] == 6 and exhausted.sum() == 8


def test_shards_hold_few_labels():
    table = counts(kind="shards", clients=50, shards=2)
    assert (table > 0).sum(1).max() == 2 and table.sum(1).tolist() == [100] * 50
    uneven = np.random.default_rng(0).integers(0, 10, 1437)
    labels = (counts(y=uneven, kind="shards", clients=40, shards=2) > 0).sum(1)
    assert labels.max() <= 4 and labels.mean() < 2.4  # a shard that crosses a border has two labels


def test_test_rows_follow_training_rows():
    labels = counts(kind="dirichlet", clients=20, alpha=0.3)
    y = np.arange(1000) % 10
    owner = test_owners(y, labels, rng(0))
    due = labels * 100 / labels.sum(0)
    assert np.abs(histogram(owner, y, 20, 10) - due).max() < 1
    assert (owner == test_owners(y, labels, rng(0))).all() and (owner != test_owners(y, labels, rng(1))).any()
    untrained = test_owners(np.full(100, 9), np.array([[30] + [0] * 9, [10] + [0] * 9]), rng(0))
    assert np.bincount(untrained).tolist() == [75, 25]


def test_validation_is_a_share_of_every_client():
    owner = np.repeat(np.arange(4, dtype=np.int32), [2, 10, 15, 100])
    aside = validation(owner, 0.2, rng(0))
    assert np.bincount(owner[aside], minlength=4).tolist() == [0, 2, 3, 20]
    assert not validation(owner, 0.0, rng(0)).any()


def test_apportion_is_exact():
    assert apportion(np.array([1, 1, 1]), 4).tolist() == [2, 1, 1]
    assert apportion(np.array([0, 5, 3]), 4).tolist() == [0, 3, 1]
    drawn = draw_by_class(np.repeat([0, 1], [30, 10]), 2, 8, rng(0))
    assert (drawn < 30).sum() == 6 and len(set(drawn.tolist())) == 8


def test_natural_ids_are_clients(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPIPE_DATA", str(tmp_path))
    writers = [10, 9, 10, 9, 2, 2, 11, 9]
    columns = {"image": image_column(range(8)), "label": [0, 1] * 4, "writer": writers}
    write_parquet(tmp_path / "w" / "train.parquet", columns)
    test = {"image": image_column(range(3)), "label": [0, 1, 0], "writer": [9, 99, 2]}
    write_parquet(tmp_path / "w" / "test.parquet", test)
    how = {"kind": "natural", "column": "writer", "clients": 2}
    paths = steps(tmp_path / "out", {"name": "w", "label": "label", "partition": how})
    rows = read_table(paths.partition).to_pylist()
    # Ids 2, 9, 10 have two rows; the first two in order are clients 0 and 1; the others' rows stay unused.
    assert [(r["row"], r["client"]) for r in rows if r["split"] == "train"] == [(1, 1), (3, 1), (4, 0), (5, 0), (7, 1)]
    owner = {r["row"] - 8: r["client"] for r in rows if r["split"] == "test"}
    assert owner[0] == 1 and owner[2] == 0 and set(owner) == {0, 1, 2}
    with pytest.raises(FedpipeError, match="clients: 4, but column 'writer' has 3 ids"):
        steps(tmp_path / "out", {"name": "w", "label": "label", "partition": {**how, "clients": 4}})
    with pytest.raises(FedpipeError, match="data.partition.column: kind natural needs"):
        steps(tmp_path / "out", {"name": "w", "label": "label", "partition": {**how, "column": None}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clients": 5001}, "clients: 5001 clients with min_samples 2 need 10002 training rows, there are 5000"),
        ({"kind": "shards", "shards": 600}, "10 clients of 600 shards need 6000 training rows"),
        (
            {"clients": 200, "alpha": 0.01, "min_samples": 20},
            "1000 draws with alpha 0.01 never gave each of 200 clients",
        ),
        ({"kind": "even"}, "kind: unknown 'even'; wanted iid, dirichlet, dir, balanced-dir, shards, natural"),
        ({"kind": "no_such_package.Parts"}, "kind: no_such_package.Parts: no module 'no_such_package'"),
        ({"kind": "json.Parts"}, "kind: json.Parts: json has no 'Parts'"),
    ],
)
def test_what_cannot_be_shared_out_is_said_in_one_line(keys, message):
    with pytest.raises(FedpipeError, match=message) as e:
        counts(**keys)
    assert "\n" not in str(e.value)


class _Halves:
    """A partitioner with the interface of flwr-datasets': rows are dealt out in turn."""

    def __init__(self, num_partitions: int, seed: int, skip: int = 0) -> None:
        self.num_partitions, self.skip, self.dataset = num_partitions, skip, None

    def load_partition(self, k: int):
        return self.dataset.select(range(k + self.skip, len(self.dataset), self.num_partitions))


def test_partitioners_by_class_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_parts", SimpleNamespace(Halves=_Halves))
    assert counts(kind="their_parts.Halves", clients=5).sum(1).tolist() == [1000] * 5
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    with pytest.raises(FedpipeError, match="left 5 rows out"):
        counts(kind="their_parts.Halves", clients=5, settings={"skip": 5})
    with pytest.raises(FedpipeError, match="their_parts.Halves failed"):
        counts(kind="their_parts.Halves", clients=5, settings={"wrong": 5})


@pytest.mark.skipif(importlib.util.find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed")
@pytest.mark.filterwarnings("default")  # theirs to mend
def test_dirichlet_agrees_with_flwr_datasets():
    path = "flwr_datasets.partitioner.DirichletPartitioner"
    theirs = [counts(s, kind=path, clients=20, settings={"alpha": 0.5, "min_partition_size": 2}) for s in range(12)]
    ours = [counts(s, kind="dirichlet", clients=20, alpha=0.5) for s in range(12)]
    for measure in (
        lambda t: t.max(1).sum() / t.sum(),
        lambda t: t.sum(1).std() / 250,
        lambda t: (t > 0).sum(1).mean(),
    ):
        assert np.mean([measure(t) for t in ours]) == pytest.approx(np.mean([measure(t) for t in theirs]), rel=0.1)


def test_pictures_of_few_and_many_clients():
    from fedpipe.data.picture import draw

    for clients in (3, 1500):
        labels = np.random.default_rng(0).integers(0, 9, (clients, 12))
        one, two = (draw(labels, [f"class {c}" for c in range(12)]) for _ in range(2))
        assert one == two and one["png"][1:4] == b"PNG" and len(one["svg"]) < 300_000
        assert b"class 11" in one["svg"] and b"<dc:date>" not in one["svg"]


def test_a_table_survives_being_mapped(tmp_path):
    write_table(tmp_path / "t.arrow", pa.table({"a": [1, 2]}), {"step": "x"})
    table = map_arrow(tmp_path / "t.arrow")
    assert table.column("a").to_pylist() == [1, 2] and table_meta(table)["step"] == "x"


# ------------------------------------------------------------------------------------------- real data
def _needs(name: str) -> None:
    if not (Path(os.environ.get("FEDPIPE_DATA", "/nowhere")) / name).is_dir():
        pytest.skip(f"FEDPIPE_DATA is not set, or has no {name}")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "shape"), [("cifar10", (3, 32, 32)), ("mnist_writers", (1, 28, 28))], ids=["cifar10", "mnist"]
)
def test_real_images(tmp_path, name, shape):
    _needs(name)
    label = "label"  # mnist_writers has other columns of whole numbers
    paths = steps(tmp_path, {"name": name, "label": label, "rows": 500, "partition": {"clients": 10}})
    found = load(paths.data)
    assert found.shape == shape and len(found.y) == 600 and found.test.sum() == 100 and found.classes == 10
    assert found.y.bincount().min() >= 40


@pytest.mark.real_data
@pytest.mark.slow
def test_cifar10_has_the_published_moments(tmp_path):
    _needs("cifar10")
    found = load(steps(tmp_path, {"name": "cifar10", "partition": {"kind": "iid"}}).data)
    assert found.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-5)
    assert found.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-5)


@pytest.mark.real_data
@pytest.mark.slow
def test_writers_of_mnist_are_clients(tmp_path):
    _needs("mnist_writers")
    how = {"kind": "natural", "column": "writer_id", "clients": 539}
    clients = read_table(steps(tmp_path, {"name": "mnist_writers", "partition": how}).clients)
    assert sum(clients.column("samples").to_pylist()) == 60_000 and sum(clients.column("test").to_pylist()) == 10_000
