"""One layer's curvature as the literature writes it, in fp64."""

import torch
from torch import Tensor

from logra_kernels.curvature import Damping


def damped(h: Tensor, damping) -> Tensor:
    if damping is None:
        damping = Damping()
    value = damping if isinstance(damping, float) else damping.relative * float(h.trace()) / len(h)
    return h + value * torch.eye(len(h), dtype=h.dtype)


def block(kind: str, part: Tensor, shape: tuple[int, int]) -> Tensor:
    """H of one layer, [d, d], from its rows [N, d]."""
    g, n = part.unflatten(1, shape), len(part)
    if kind == "identity":
        return torch.eye(part.shape[1], dtype=part.dtype)
    fisher = part.T @ part / n
    if kind in (
        "raw",
        "raw-fp64",
        "lowrank",
        "fisher",
        "fisher-fp64",
    ):  # of full rank; where these very rows were observed
        return fisher
    if kind == "diagonal":
        return fisher.diagonal().diag()
    left = torch.einsum("noi,npi->op", g, g) / n
    right = torch.einsum("noi,noj->ij", g, g) / n
    product = torch.kron(left, right) / left.trace()
    if kind == "kronecker":
        return product
    if kind == "shrunk":
        return (fisher + product) / 2
    return corrected(part, torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])


def corrected(part: Tensor, u_out: Tensor, u_in: Tensor) -> Tensor:
    """Diagonal in the basis U_out (x) U_in, with the eigenvalues that the rows have there (George et al. 2018)."""
    basis = torch.kron(u_out, u_in)
    return (basis * (part @ basis).square().mean(0)) @ basis.T


def positions_block(kind: str, part: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """KFAC and EKFAC of a linear layer, [d, d], from its rows [N, d] and its positions x [R, d_in], dy [R, d_out]."""
    a, b = x.T @ x / len(x), dy.T @ dy / len(dy)
    if kind == "kfac":
        return torch.kron(b, a) * (len(x) / len(part))
    return corrected(part, torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
