"""What the Triton kernels share: one tile of a matrix product, and how a launcher sizes and places it."""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def in_dtype(tile, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """The tile in DTYPE, rounded to nearest even; the interpreter, which upcasts, would cut bf16 off instead."""
    if UPCAST and tl.bfloat16 == DTYPE:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        converted = bits.to(tl.float32, bitcast=True)
    else:
        converted = tile.to(DTYPE)
    return converted


@triton.jit
def dot_tile(
    a, b, a_ok, b_ok, stride_a, stride_b, D,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    IN_B: tl.constexpr = False,
):  # fmt: skip
    """C[m,n] = sum_d A[m,d] B[n,d], A rounded to B's dtype where IN_B

    a [M] and b [N] point at each row's first element; a row that is not ok is never read and counts as zeros.
    """
    acc = tl.zeros([a.shape[0], b.shape[0]], ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        ok = d < D
        step = d.to(tl.int64)
        left = tl.load(a[:, None] + (step * stride_a)[None, :], mask=a_ok[:, None] & ok[None, :], other=0.0)
        right = tl.load(b[None, :] + (step * stride_b)[:, None], mask=b_ok[None, :] & ok[:, None], other=0.0)
        if IN_B:
            left = in_dtype(left, right.dtype, UPCAST)
        if UPCAST:
            left, right = left.to(ACC), right.to(ACC)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def dot_tile_described(
    a, b, row_a, row_b, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, first, end,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    IN_B: tl.constexpr = False,
):  # fmt: skip
    """C[m,n] = sum_{first <= d < end} A[row_a + m, d] B[row_b + n, d], both through tensor descriptors

    What lies beyond their ends counts as zeros; end - first is a multiple of BLOCK_D where end is not the last one.
    """
    acc = tl.zeros([ROWS_A, ROWS_B], ACC)
    for start in range(first, end, BLOCK_D):
        left = a.load([row_a.to(tl.int32), start])
        right = b.load([row_b, start]).T
        if IN_B:
            left = in_dtype(left, right.dtype, UPCAST)
        if UPCAST:
            left, right = left.to(ACC), right.to(ACC)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


INTERPRETED = isinstance(dot_tile, InterpretedFunction)
OPTIONS = {"num_stages": 3, "enable_fp_fusion": True}  # fused multiply-add is Triton's default only before 3.10


def describable(m: torch.Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can describe the matrix: aligned rows of neighbours."""
    size = m.element_size()
    return (
        size < 8
        and m.stride(1) == 1
        and m.stride(0) >= m.shape[1]
        and m.stride(0) * size % 16 == 0
        and m.data_ptr() % 16 == 0
        and m.numel() > 0
        and m.shape[0] < 2**31
    )


def descriptor(m: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix, to be loaded in blocks [rows, columns]."""
    return TensorDescriptor(m, list(m.shape), list(m.stride()), [rows, columns])


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def must_upcast(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether a product of these needs fp32 operands: the interpreter multiplies bf16 bit patterns (triton #11584)."""
    return INTERPRETED or a != b


def fp32_precision() -> str:
    """How tl.dot multiplies fp32 operands: exactly, unless torch itself may use tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block(size: int, most: int) -> int:
    """A tile's extent along a dimension of `size`: a power of two from 16 (the least tl.dot takes) to `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))
