"""C++ launcher of accumulate_gram."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._native import matrix


def launch(g: Tensor, out: Tensor) -> None:
    _C.accumulate_gram(matrix(g), out.data_ptr(), g.shape[0], g.shape[1], torch.get_num_threads())
