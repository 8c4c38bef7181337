"""The scoring kernels in CUDA C++ as tests call them: run on a CPU, their arguments as the binding takes them."""

import contextlib
import ctypes
from types import SimpleNamespace

import torch

LATE_COPIES, EARLY_COPIES = 4, 3  # as for project_grad: threads ascending, products at once; descending, products late


def numbers(words):
    return (ctypes.c_int64 * len(words))(*map(int, words)), len(words)


def int64s(*sizes):
    return map(ctypes.c_int64, sizes)


def bound_block(kernels, tile, timing=LATE_COPIES, archs=None):
    """_C_cuda.score_block by `kernels`; tile(queries, rows, Q) gives a block's queries."""

    def call(arch, queries, rows, out, partial, q, n, d, piece, pieces, stream):
        assert (pieces - 1) * piece < max(d, 1)
        assert d <= pieces * piece
        assert stream == 7
        if archs is not None:
            archs.append(arch)
        sizes = int64s(out, partial, q, n, d, piece, pieces)
        kernels(arch, tile(queries, rows, q), timing, *numbers(queries), *numbers(rows), *sizes)

    return call


def bound_topk(kernels, tile, timing=LATE_COPIES):
    """The same of _C_cuda.score_topk."""

    def call(arch, queries, rows, row_scale, values, indices, candidates, counts, best, partial, q, n, d, k, largest,
             first_block, capacity, piece, pieces, stream):  # fmt: skip
        assert 1 <= first_block <= capacity
        assert pieces == 1 or n <= first_block
        assert stream == 7
        addresses = int64s(*row_scale, values, indices, candidates, counts, best, partial, q, n, d, k)
        sizes = int64s(first_block, capacity, piece, pieces)
        operands = (*numbers(queries), *numbers(rows))
        kernels(arch, tile(queries, rows, q), timing, *operands, *addresses, int(largest), *sizes)

    return call


def on_a_device(monkeypatch, capability, **bound):
    """The launchers' module, on CPU tensors as if they were on a device, with `bound` in place of the binding's."""
    from logra_kernels.ops import _score_cuda

    built = _score_cuda._C_cuda
    here = SimpleNamespace(score_tile=built.score_tile, SCORE_TOPK_MOST_K=20, has_sm_90a=lambda: True, **bound)
    monkeypatch.setattr(_score_cuda, "_C_cuda", here)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(_score_cuda, "programs_of", lambda tensor: 8)
    return here
