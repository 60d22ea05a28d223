"""Split-Mix on plain MLPs. Hong et al., ICLR 2022 (arXiv 2203.09747), algorithm 1."""

from collections.abc import Mapping, Sequence

from oracles import plain


def server(bases: Sequence[plain.Weights], ends: Sequence[tuple[int, Mapping[int, plain.Weights]]]
           ) -> list[plain.Weights]:  # fmt: skip
    """Every base: the mean, by samples, over the clients that trained it; as it was where none did. ends: samples and,
    by base, what each client came to."""
    out = []
    for b, old in enumerate(bases):
        mine = [(n, trained[b]) for n, trained in ends if b in trained]
        out.append(plain.mean([w for _, w in mine], [n for n, _ in mine]) if mine else old)
    return out
