"""Argument checks shared by the ops. Shapes and dtypes only, so that traced code can run them."""

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES, torch.float64)


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor is real floating point and on the first one's device."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be fp32, bf16, fp16 or fp64")
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and the first argument on {first.device}; move one")


def check_factor(op: str, a_name: str, a: Tensor, p_name: str, p: Tensor) -> None:
    """Operands are multiplied in p's dtype: a's own, bf16 beside fp32 (rounded), or fp32 beside 16 bits."""
    if p.dtype == a.dtype:
        return
    if (a.dtype, p.dtype) == (torch.float32, torch.bfloat16) or (p.dtype == torch.float32 and a.dtype in HALVES):
        return
    raise ValueError(
        f"{op}: {a_name} is {a.dtype} and {p_name} is {p.dtype}; {p_name} must have {a_name}'s dtype, or be bf16 beside"
        f" fp32 or fp32 beside 16 bits"
    )


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
