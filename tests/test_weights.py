"""First values of a model: a safetensors file of our own names or of others', a hub model, a state of a study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from engine import IID, Game, distance, make_run
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fedpipe.config import Study
from fedpipe.digest import step_digest
from fedpipe.errors import FedpipeError
from fedpipe.models import weights
from fedpipe.models.chain import Chain
from fedpipe.models.vit import vit_tiny
from fedpipe.paths import RunPaths, StudyPaths
from fedpipe.states import write_states
from fedpipe.types import Tensors

MLP: dict[str, Any] = {"name": "mlp", "hidden": [16, 16, 16]}
HUB = "WinKawaks/vit-tiny-patch16-224"
DIM, DEPTH, HEADS, SHAPE = 12, 2, 3, (3, 8, 8)


def vit(seed: int, classes: int = 5) -> tuple[Chain, Tensors]:
    """A small ViT of values that are all drawn, norms' too, and its state."""
    chain = Chain(vit_tiny(SHAPE, classes, depth=DEPTH, dim=DIM, heads=HEADS), SHAPE).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in chain.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return chain, {f"model/{n}": t.clone() for n, t in chain.state_dict().items()}


TIMM = {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
TIMM_AROUND = {"patch_embed.proj": "stem.proj", "norm": "head.norm", "head": "head.linear"}


def timm(own: Tensors) -> Tensors:
    out = {"cls_token": own["model/stem.token"], "pos_embed": own["model/stem.positions"]}
    names = TIMM_AROUND | {f"blocks.{k}.{n}": f"b{k + 1}.{mine}" for k in range(DEPTH) for n, mine in TIMM.items()}
    kinds = ("weight", "bias")
    return out | {f"{n}.{kind}": own[f"model/{mine}.{kind}"] for n, mine in names.items() for kind in kinds}


def transformers(own: Tensors, vit: str = "vit.") -> Tensors:
    out = {
        f"{vit}embeddings.cls_token": own["model/stem.token"],
        f"{vit}embeddings.position_embeddings": own["model/stem.positions"],
    }
    for kind in ("weight", "bias"):
        out[f"{vit}embeddings.patch_embeddings.projection.{kind}"] = own[f"model/stem.proj.{kind}"]
        for k in range(DEPTH):
            layer, unit = f"{vit}encoder.layer.{k}", f"model/b{k + 1}"
            out[f"{layer}.attention.attention.query.{kind}"] = own[f"{unit}.qkv.{kind}"][:DIM].clone()
            out[f"{layer}.attention.attention.key.{kind}"] = own[f"{unit}.qkv.{kind}"][DIM : 2 * DIM].clone()
            out[f"{layer}.attention.attention.value.{kind}"] = own[f"{unit}.qkv.{kind}"][2 * DIM :].clone()
            out[f"{layer}.attention.output.dense.{kind}"] = own[f"{unit}.proj.{kind}"]
            out[f"{layer}.intermediate.dense.{kind}"] = own[f"{unit}.fc1.{kind}"]
            out[f"{layer}.output.dense.{kind}"] = own[f"{unit}.fc2.{kind}"]
            out[f"{layer}.layernorm_before.{kind}"] = own[f"{unit}.norm1.{kind}"]
            out[f"{layer}.layernorm_after.{kind}"] = own[f"{unit}.norm2.{kind}"]
        out[f"{vit}layernorm.{kind}"] = own[f"model/head.norm.{kind}"]
        out[f"classifier.{kind}"] = own[f"model/head.linear.{kind}"]
    return out


def without_prefix(own: Tensors) -> Tensors:
    return transformers(own, "")


def logits(w: Tensors, x: Tensor) -> Tensor:
    """ViTForImageClassification of transformers, from its own tensors."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def split(x: Tensor) -> Tensor:
        return x.view(len(x), -1, HEADS, DIM // HEADS).transpose(1, 2)

    patches = "vit.embeddings.patch_embeddings.projection"
    x = F.conv2d(x, w[f"{patches}.weight"], w[f"{patches}.bias"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([w["vit.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + w["vit.embeddings.position_embeddings"]
    for k in range(DEPTH):
        at = f"vit.encoder.layer.{k}"
        y = norm(f"{at}.layernorm_before", x)
        q, k_, v = (split(linear(f"{at}.attention.attention.{n}", y)) for n in ("query", "key", "value"))
        scores = (q @ k_.transpose(2, 3) / (DIM // HEADS) ** 0.5).softmax(-1)
        x = x + linear(f"{at}.attention.output.dense", (scores @ v).transpose(1, 2).reshape(x.shape))
        y = F.gelu(linear(f"{at}.intermediate.dense", norm(f"{at}.layernorm_after", x)))
        x = x + linear(f"{at}.output.dense", y)
    return linear("classifier", norm("vit.layernorm", x)[:, 0])


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(FedpipeError) as e:
        run()
    assert str(e.value).startswith("model.weights: ") and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A hub whose cache is empty and that must not be asked."""
    weights._downloaded.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("the hub was asked"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    return monkeypatch


# ------------------------------------------------------------------------------------------- files
def test_a_file_gives_first_values_and_its_content_counts(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "first.safetensors"
    game = Game(make_run("fedavg", rounds=1), root).play()
    save_file({n: t.contiguous() for n, t in game.state.items()}, file)
    run = make_run("fedavg", model={**MLP, "weights": str(file)}, rounds=1)
    again = Game(run, root)
    assert distance(again.state, game.state) == 0
    before = step_digest("assign", run)
    save_file({n: t + 1 for n, t in game.state.items() if not n.startswith("model/head")}, file)
    assert step_digest("assign", run) != before
    moved = Game(run, root)
    apart = {n: float((moved.state[n] - t).abs().max()) for n, t in game.state.items()}
    assert all(a == pytest.approx(1) for n, a in apart.items() if "head" not in n)
    drawn = Game(make_run("fedavg", rounds=1), root).state
    assert all(torch.equal(moved.state[n], drawn[n]) for n in drawn if "head" in n)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"stem.1.weight": torch.zeros(3, 3)}, r"stem.1.weight has shape [3, 3], wanted [16, 256]"),
        ({}, "no tensor stem.1.weight; wanted all of the network's but its heads'"),
        (None, "no file"),
    ],
)
def test_a_file_of_another_network_is_refused(
    tensors: Tensors | None, message: str, root: Path, tmp_path: Path, hub: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    if tensors is not None:
        save_file(tensors, file)
    assert message in refused(lambda: Game(make_run("fedavg", model={**MLP, "weights": str(file)}), root))


@pytest.mark.parametrize("named", [timm, transformers, without_prefix])
def test_other_names_of_a_vit_give_the_same_tensors(named: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    file, (whole, want), (chain, first) = tmp_path / "vit.safetensors", vit(0), vit(1)
    save_file(named(want), file)
    found = weights.taken(first, chain, file)
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)
    assert distance(first, want) > 0.1
    chain.load_state_dict({n[6:]: t for n, t in found.items()})
    x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(chain(x), whole(x))
    assert (chain(x) - logits(transformers(want), x)).abs().max() < 1e-5


@pytest.mark.parametrize("named", [timm, transformers])
def test_a_vit_of_other_classes_keeps_the_classifier_alone(named: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    file, (_, want), (chain, first) = tmp_path / "vit.safetensors", vit(0), vit(1, classes=7)
    save_file(named(want), file)
    found = weights.taken(first, chain, file)
    for name in found:
        assert torch.equal(found[name], (first if "head.linear" in name else want)[name]), name
    assert not torch.equal(found["model/head.norm.weight"], first["model/head.norm.weight"])


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("vit.layernorm.weight", "no tensor head.norm.weight; wanted"),
        ("vit.embeddings.cls_token", "no tensor stem.token; wanted"),
        ("vit.encoder.layer.1.attention.attention.key.bias", "b2.qkv.bias has shape [24], wanted [36]"),
        ("vit.encoder.layer.1.attention.attention.query.bias", "no tensor b2.qkv.bias; wanted"),
    ],
)
def test_a_vit_that_lacks_a_tensor_is_refused(lacking: str, message: str, tmp_path: Path) -> None:
    file, (chain, first) = tmp_path / "vit.safetensors", vit(0)
    save_file({n: t for n, t in transformers(first).items() if n != lacking}, file)
    assert f"{file}: {message}" in refused(lambda: weights.taken(first, chain, file))


def test_patches_of_16_make_it_the_vit_tiny_that_is_published() -> None:
    with torch.device("meta"):
        units = vit_tiny((3, 224, 224), 1000, patch=16)
    assert sum(p.numel() for _, unit in units for p in unit.parameters()) == 5_717_416


# ------------------------------------------------------------------------------------------- hub
def test_a_hub_model_is_asked_for_once_and_its_content_counts(tmp_path: Path, hub: pytest.MonkeyPatch) -> None:
    file, (_, want), (chain, first) = tmp_path / "model.safetensors", vit(0), vit(1)
    save_file(transformers(want), file)
    asked: list[Any] = []
    hub.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: asked.append((name, timeout)))
    hub.setattr(huggingface_hub, "hf_hub_download", lambda name, at: asked.append((name, at)) or str(file))
    run = make_run("fedavg", model={"name": "vit_tiny", "weights": HUB})
    before = step_digest("segment", run)
    assert distance(weights.taken(first, chain, Path(HUB)), want) == 0
    assert step_digest("segment", run) == before != step_digest("segment", make_run("fedavg", model="vit_tiny"))
    assert asked == [(HUB, 10), (HUB, "model.safetensors")]
    save_file(transformers(first), file)
    assert step_digest("segment", run) != before


def test_a_hub_model_in_the_cache_is_taken_without_a_question(tmp_path: Path, hub: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "cache" / f"models--{HUB.replace('/', '--')}"
    file = cached / "snapshots" / ("0" * 40) / "model.safetensors"
    for path, text in ((file, "weights"), (cached / "refs" / "main", "0" * 40)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert weights.located(HUB) == file


def test_a_hub_model_out_of_reach_is_one_line(hub: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    hub.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    run = make_run("fedavg", model={"name": "vit_tiny", "weights": HUB})
    message = refused(lambda: step_digest("segment", run))
    assert f"no file or folder {HUB}, and no model.safetensors of '{HUB}'" in message and "(ConnectionError)" in message
    assert "wanted a safetensors file, a folder results/<study> of one run, or a hub id <org>/<name>" in message


def test_offline_only_the_cache_is_looked_in(hub: pytest.MonkeyPatch) -> None:
    from huggingface_hub.file_download import hf_hub_download

    hub.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and it is not in the cache" in refused(lambda: weights.located(HUB))


@pytest.mark.parametrize("name", ["folder/w.safetensors", "../org/name", "/org/name", "a/b/c", "vit_tiny"])
def test_the_hub_is_asked_for_nothing_but_its_ids(name: str, hub: pytest.MonkeyPatch) -> None:
    assert refused(lambda: weights.located(name)).startswith(f"model.weights: no file {name}; wanted")


# ------------------------------------------------------------------------------------------- studies
def ended(folder: Path, game: Game, **keys: Any) -> RunPaths:
    """A run's folder with two states, as if it had ended."""
    p = RunPaths(folder, make_run("fedavg", **keys))
    write_states(p.state(9), {"server@9": {n: t + 1 for n, t in game.state.items()}}, 9, {})
    write_states(p.state(10), {f"server@{t}": {n: v + t for n, v in game.state.items()} for t in (9, 10)}, 10, {})
    p.metrics.touch()
    return p


def test_a_study_gives_the_last_state_of_its_one_run(root: Path, tmp_path: Path) -> None:
    game = Game(make_run("fedavg", rounds=1), root)
    p = ended(tmp_path / "study", game)
    assert weights.located(p.root) == p.state(10) / "server@10.safetensors"
    run = make_run("fedavg", model={**MLP, "weights": str(p.root)}, rounds=1)
    assert distance(Game(run, root).state, {n: t + 10 for n, t in game.state.items()}) == 0
    named = {**MLP, "weights": str(p.state(10) / "server@10.safetensors")}
    assert step_digest("assign", run) == step_digest("assign", make_run("fedavg", model=named, rounds=1))
    p.metrics.unlink()
    assert "it has not ended" in refused(lambda: weights.located(p.root))


def test_a_study_of_other_numbers_of_runs_is_refused(root: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}: 0 runs in this folder; wanted one run" in refused(lambda: weights.located(tmp_path))
    game = Game(make_run("fedavg", rounds=1), root)
    for seeds in ([0], [1]):
        ended(tmp_path, game, seeds=seeds)
    run = make_run("fedavg", model={**MLP, "weights": str(tmp_path)})
    assert f"{tmp_path}: 2 runs in this folder; wanted one run" in refused(lambda: step_digest("assign", run))


def test_runs_of_a_study_as_it_was_do_not_count(root: Path, tmp_path: Path) -> None:
    game = Game(make_run("fedavg", rounds=1), root)
    stale, now = (ended(tmp_path, game, seeds=seeds) for seeds in ([0], [1]))
    StudyPaths(tmp_path, Study.model_validate({**IID, "methods": ["fedavg"], "seeds": [1]})).write_specs()
    assert stale.folder != now.folder
    assert weights.located(tmp_path) == now.state(10) / "server@10.safetensors"
