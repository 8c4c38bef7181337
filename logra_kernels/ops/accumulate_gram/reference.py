"""The definition of accumulate_gram. Runs on any device and dtype; fp64 in, fp64 out."""

from torch import Tensor


def accumulate_gram(g: Tensor, out: Tensor) -> None:
    rows = g.to(out.dtype)
    out += rows.T @ rows
