"""A store of random rows and the textbook formulas on it in fp64."""

import torch
from torch import Tensor

from logra_kernels.store import GradientStore

LAYERS = {"a.up": (3, 4), "a.down": (2, 5), "b.up": (2, 3)}
WIDTHS = [12, 10, 6]
N, Q = 37, 3


def make_store(path, dtype: str = "fp32", seed: int = 0):
    """(store, rows [N, D] fp64, queries [Q, D] fp32)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, sum(WIDTHS), generator=generator) * torch.linspace(0.1, 3, sum(WIDTHS))
    with GradientStore.create(path, LAYERS, dtype, rows_per_shard=8) as writer:
        writer.append(rows, [f"r{i}" for i in range(N)], {"source": [f"s{i % 4}" for i in range(N)]})
    store = GradientStore.open(path)
    return store, store.read(0, N).double(), torch.randn(Q, sum(WIDTHS), generator=generator)


def inverse(rows: Tensor, damping: float | None = None) -> Tensor:
    """[D, D], block-diagonal (H + lambda I)^-1 of the raw Fisher."""
    blocks = []
    for part in rows.split(WIDTHS, dim=1):
        h = part.T @ part / len(part)
        lam = 0.1 * h.trace() / len(h) if damping is None else damping
        blocks.append(torch.linalg.inv(h + lam * torch.eye(len(h), dtype=h.dtype)))
    return torch.block_diag(*blocks)


def exact_scores(rows: Tensor, queries: Tensor, mode: str, damping: float | None = None) -> Tensor:
    """[Q, N] by the definitions: Koh & Liang 2017, Barshan et al. 2020 (equations of theta- and l-RelatIF)."""
    h = inverse(rows, damping)
    dot = queries.double() @ h @ rows.T
    own = torch.einsum("nd,de,ne->n", rows, h, rows)
    if mode == "dot":
        return dot
    if mode == "relatif":
        return dot / own.sqrt()
    if mode == "theta-relatif":
        return dot / (rows @ h).norm(dim=1)
    return dot - own / 2
