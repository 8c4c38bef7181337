"""project_grad beside what torch offers, and beside a copy of the bytes that it must read."""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from gpu_clock import failed, peak_beyond, seconds_of
from tolerance import assert_as_good_as_naive
from torch import Tensor

import logra_kernels as lk
from logra_kernels.ops import _device, _dispatch

SIDES = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 8192))  # d_in, d_out
RANKS = (16, 64, 128)
BATCHES = {"16x512": [512] * 16, "4x2048": [2048] * 4, "1x8192": [8192], "ragged": [5000, 12, 700, 1800, 680]}
NAIVE, OURS = "matmuls and bmm", "logra_kernels"


def composed(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    return (dy @ p_out.T).mT @ (x @ p_in.T)


def one_einsum(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    return torch.einsum("nto,lo,nti,ki->nlk", dy, p_out, x, p_in)


def outer_einsum(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    """Forms [N, T, k, k]."""
    return torch.einsum("ntl,ntk->ntlk", dy @ p_out.T, x @ p_in.T).sum(1)


COMPILED = torch.compile(one_einsum, dynamic=True)


def by_path(path: str, cluster: int = 0) -> Callable[..., Tensor]:
    """The kernels in CUDA C++ of one architecture, in clusters of one size."""
    from logra_kernels.ops.project_grad import cuda

    def call(*args: Tensor) -> Tensor:
        before, _device.CUDA_PATH, cuda.CLUSTER = _device.CUDA_PATH, path, cluster
        try:
            return lk.project_grad(*args, backend="cuda")
        finally:
            _device.CUDA_PATH, cuda.CLUSTER = before, 0

    return call


def ours(device: str) -> dict[str, Callable[..., Tensor]]:
    """What the package takes by itself, then each of its kernels for the device."""
    calls: dict[str, Callable[..., Tensor]] = {OURS: lk.project_grad}
    if device == "cuda" and _dispatch.cuda_error() is None:
        calls[OURS + " cuda sm_80"] = by_path("sm_80")
        if torch.cuda.get_device_capability() == (9, 0):
            calls[OURS + " cuda sm_90a"] = by_path("sm_90a")
            calls |= {f"{OURS} cuda sm_90a, clusters of {n}": by_path("sm_90a", n) for n in (1, 2, 4)}
    return calls


def naive_calls(args: tuple[Tensor, ...], lengths: list[int], dense: bool) -> dict[str, Callable[[], Tensor]]:
    if dense:
        ways = {NAIVE: composed, "compiled einsum": COMPILED, "einsum [N,T,k,k]": outer_einsum}
        return {name: lambda way=way: way(*args) for name, way in ways.items()}  # type: ignore[misc]
    x, dy, p_in, p_out = args

    def each() -> Tensor:
        parts = zip(x.split(lengths), dy.split(lengths), strict=True)
        return torch.cat([composed(u[None], v[None], p_in, p_out) for u, v in parts])

    return {NAIVE: each}


def cell(device: str, sides: tuple[int, int], k: int, batch: str, lengths: list[int]) -> Iterator[dict]:
    """Every provider on one shape, checked against fp64 first."""
    d_in, d_out = sides
    dense = len(set(lengths)) == 1
    shape = (len(lengths), lengths[0]) if dense else (sum(lengths),)
    x, dy = (torch.randn(*shape, d, device=device).bfloat16() for d in sides)
    p_in, p_out = ((torch.randn(k, d, device=device) / d**0.5).bfloat16() for d in sides)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    args, more = (x, dy, p_in, p_out), () if dense else (offsets,)
    calls, spare = naive_calls(args, lengths, dense), {}
    exact = naive_calls(tuple(a.double() for a in args), lengths, dense)[NAIVE]()
    bar = calls[NAIVE]()
    part = {"part": "project_grad", "shape": f"{batch} {d_in}x{d_out} k{k}", "dtype": "bfloat16"}
    for name, way in ours(device).items():
        try:
            assert_as_good_as_naive(way(*args, *more), exact, bar.float())
            spare[name] = peak_beyond(lambda way=way: way(*args, *more))  # type: ignore[misc]
        except Exception as error:  # whatever a kernel raises is its result here
            yield failed(part, name, error)
        else:
            calls[name] = lambda way=way: way(*args, *more)  # type: ignore[misc]
    del exact, bar
    read, copies = x.nbytes + dy.nbytes, (torch.empty_like(x), torch.empty_like(dy))

    def copy() -> None:
        copies[0].copy_(x)
        copies[1].copy_(dy)

    took = seconds_of({"copy": copy, **calls})
    rate = 2 * read / took["copy"]  # a copy reads and writes
    best = min(seconds for name, seconds in took.items() if name in (NAIVE, "compiled einsum"))
    moved = read + p_in.nbytes + p_out.nbytes + len(lengths) * k * k * 4
    for name, seconds in took.items():
        row = part | {"provider": name, "median_us": round(seconds * 1e6, 1)}
        if name.startswith(OURS):
            row |= {"share_of_copy": round(moved / seconds / rate, 3), "over_best": round(best / seconds, 2)}
            if "einsum [N,T,k,k]" in took:
                row["over_einsum"] = round(took["einsum [N,T,k,k]"] / seconds, 2)
            if spare[name] is not None:
                row["memory_over_output"] = round(spare[name] / (len(lengths) * k * k * 4), 3)  # type: ignore[operator]
        yield row


def measure(
    device: str = "cuda", sides: tuple = SIDES, ranks: tuple = RANKS, batches: dict = BATCHES
) -> Iterator[dict]:
    for side, k, (batch, lengths) in product(sides, ranks, batches.items()):
        yield from cell(device, side, k, batch, lengths)
