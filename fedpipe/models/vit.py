"""ViT-Tiny (arXiv 2010.11929; the sizes of timm's vit_tiny: width 192, 12 layers, 3 heads) with patches of 4.

Pre-norm layers, a class token, learnt positions, exact GELU; the head normalises the class token and classifies it.
Files of timm's and of transformers' (ViTForImageClassification) give it first values.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpipe.errors import FedpipeError
from fedpipe.kernels.common import Backend
from fedpipe.models.norms import layer_norm
from fedpipe.recompute import Linear, Pure, rebuilt
from fedpipe.types import Tensors

EPS = 1e-6
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x by weight and bias
_NAME = re.compile(r"(?:vit\.)?(?:(?:blocks|encoder\.layer)\.(\d+)\.)?(.+?)(\.weight|\.bias)?")
_AROUND = {
    "cls_token": "stem.token", "pos_embed": "stem.positions", "patch_embed.proj": "stem.proj",
    "norm": "head.norm", "head": "head.linear",
    "embeddings.cls_token": "stem.token", "embeddings.position_embeddings": "stem.positions",
    "embeddings.patch_embeddings.projection": "stem.proj", "layernorm": "head.norm", "classifier": "head.linear",
}  # fmt: skip
_INSIDE = {
    "norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2",
    "layernorm_before": "norm1", "attention.attention.query": "qkv", "attention.output.dense": "proj",
    "layernorm_after": "norm2", "intermediate.dense": "fc1", "output.dense": "fc2",
}  # fmt: skip


class Embed(nn.Module):
    """Patches as tokens behind a class token, with positions: [batch, C, H, W] -> [batch, 1 + patches, dim]."""

    def __init__(self, shape: tuple[int, int, int], patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape[0], dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.positions = nn.Parameter(torch.empty(1, 1 + shape[1] // patch * (shape[2] // patch), dim))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions


class Layer(nn.Module):
    """x + proj(attention(qkv(norm1(x)))), then y + fc2(gelu(fc1(norm2(y)))): [batch, tokens, dim] to the same.

    In units of x, 16 are saved for the backward: x, norm1, qkv (3), attention, y, norm2, fc1 (4), gelu (4). Level 1
    builds both norms and the GELU again, and saves 10; level 2 fc1 too, by its product, and saves 6. backend: of the
    norms, at every level; a study's choice comes with a level, so without one they are torch's. All layers give as many
    tokens, so the link drops none and there is nothing to leave out (`exits`).
    """

    levels = (0, 1, 2)

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, level: int = 0, backend: Backend = "reference") -> Tensor:
        norm: Norm = partial(layer_norm, eps=EPS, backend=backend)
        if level:
            (qkv,) = rebuilt(Pure(norm), Linear(), x, _of(self.norm1), _of(self.qkv))
        else:
            qkv = self.qkv(norm(x, *_of(self.norm1)))
        x = x + self.proj(self.attention(qkv))
        return x + self.mlp(x, level, norm)

    def attention(self, qkv: Tensor) -> Tensor:
        b, t, d = qkv.shape
        q, k, v = qkv.view(b, t, 3, self.heads, d // 3 // self.heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d // 3)

    def mlp(self, x: Tensor, level: int, norm: Norm) -> Tensor:
        if not level:
            out: Tensor = self.fc2(F.gelu(self.fc1(norm(x, *_of(self.norm2)))))
        elif level == 1:
            (hidden,) = rebuilt(Pure(norm), Linear(), x, _of(self.norm2), _of(self.fc1))
            (out,) = rebuilt(Pure(F.gelu), Linear(), hidden, (), _of(self.fc2))
        else:
            (out,) = rebuilt(Pure(partial(up, norm)), Linear(), x, (*_of(self.norm2), *_of(self.fc1)), _of(self.fc2))
        return out


def up(norm: Norm, x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The wide half of the MLP."""
    return F.gelu(F.linear(norm(x, weight, bias), w, b))


def _of(module: nn.LayerNorm | nn.Linear) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


class Head(nn.Module):
    """linear(norm(class token)): [batch, tokens, dim] -> [batch, classes]."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x[:, 0]))

    def behind(self, shape: tuple[int, ...]) -> "Head":
        """A head for the tokens of another layer."""
        return Head(shape[-1], self.linear.out_features)

    @staticmethod
    def renamed(found: Tensors) -> Tensors:
        """The tensors of a file with timm's or transformers' names by vit_tiny's; what these lack is left out.

        transformers' query, key and value [dim, dim] are one qkv [3 dim, dim]; its norms have eps 1e-12, these `EPS`.
        """
        out: Tensors = {}
        for name, t in found.items():
            layer, module, kind = m.groups("") if (m := _NAME.fullmatch(name)) else ("", name, "")
            ours = (_INSIDE if layer else _AROUND).get(module)
            if ours is None:
                continue
            if module.endswith("query"):
                parts = [name.replace("query", part) for part in ("query", "key", "value")]
                t = torch.cat([found[p] for p in parts if p in found])
            out[(f"b{int(layer) + 1}." if layer else "") + ours + kind] = t
        return out


def vit_tiny(
    shape: tuple[int, int, int], classes: int, patch: int = 4, depth: int = 12, dim: int = 192, heads: int = 3
) -> list[tuple[str, nn.Module]]:
    """Units stem, b1 .. b<depth>, head for images (C, H, W) of whole patches; 5,362,762 parameters for 3x32x32 and 10.

    A layer has 444,864 parameters and an MLP four times as wide as dim, which heads divide.
    """
    if shape[1] % patch or shape[2] % patch:
        raise FedpipeError(
            f"model vit_tiny: images of {shape[1]}x{shape[2]}; wanted sides that patches of {patch} divide"
        )
    if depth < 1 or dim % heads:
        raise FedpipeError(
            f"model vit_tiny: depth {depth}, dim {dim}, heads {heads}; wanted depth >= 1 and heads | dim"
        )
    layers = [(f"b{k}", Layer(dim, heads, 4 * dim)) for k in range(1, depth + 1)]
    return [("stem", Embed(shape, patch, dim)), *layers, ("head", Head(dim, classes))]
