import torch
from torch import Tensor


def assert_as_good_as_naive(got: Tensor, exact: Tensor, naive: Tensor, factor: float = 2.0) -> None:
    """Error against fp64 may be at most `factor` times that of the naive composition, plus a few ulps.

    fp64 results have nothing finer to be measured against and are held to 1e-13 of the largest entry.
    """
    assert got.shape == exact.shape == naive.shape
    assert not got.isnan().any()
    if not exact.numel():
        return
    largest = exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    if got.dtype == torch.float64:
        allowed = 1e-13 * largest
    else:
        floor = 4 * torch.finfo(got.dtype).eps * largest
        allowed = factor * (naive.double() - exact).abs().max().item() + floor
    assert error <= allowed, f"{error=:.3e} {allowed=:.3e}"
