"""How much work keeps a device busy."""

import torch
from torch import Tensor

PROGRAMS_PER_PROCESSOR = 2  # what is aimed at where work is cut; fewer leave gaps, more cost partial sums


def programs_of(tensor: Tensor) -> int:
    """How many programs keep the tensor's device busy."""
    if not tensor.is_cuda:
        return 1
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(tensor.device).multi_processor_count
