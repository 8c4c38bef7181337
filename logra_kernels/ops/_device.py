"""Which kernels a device takes, and how much work keeps it busy."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

CUDA_PATH = os.environ.get("LOGRA_KERNELS_CUDA_PATH")  # whose kernels in CUDA C++ are taken, where it is set
PROGRAMS_PER_PROCESSOR = 2  # what is aimed at where work is cut; fewer leave gaps, more cost partial sums

LEAST_STEPS = 8  # of a piece of a sum, beside which what it costs to add the pieces is little


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """The compute capability that Triton kernels are launched for; in the interpreter the least that they know."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


def programs_of(tensor: Tensor) -> int:
    """How many programs keep the tensor's device busy."""
    if not tensor.is_cuda:
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(tensor.device).multi_processor_count


def pieces_of(tiles: int, steps: int, programs: int) -> int:
    """Into how many pieces a sum of so many steps is cut: several only where so few tiles leave processors idle."""
    return max(1, min(programs // max(1, tiles), steps // LEAST_STEPS))


def cuda_arch(tensor: Tensor, has_sm_90a: bool) -> int:
    """80 or 90: whose kernels in CUDA C++ the tensor's device runs, where those of sm_90a are built or not.

    Raises:
        RuntimeError: LOGRA_KERNELS_CUDA_PATH is neither sm_80 nor sm_90a.
    """
    if CUDA_PATH not in (None, "sm_80", "sm_90a"):
        raise RuntimeError(f"LOGRA_KERNELS_CUDA_PATH is {CUDA_PATH!r}; it must be sm_80 or sm_90a, or unset")
    if CUDA_PATH == "sm_80" or not has_sm_90a:
        return 80
    return 90 if torch.cuda.get_device_capability(tensor.device) == (9, 0) else 80


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
