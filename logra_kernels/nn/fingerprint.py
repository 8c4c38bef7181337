"""One string for a model's weights, so that a query with other weights is refused."""

import torch
import xxhash
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """xxh3-128 over the names, dtypes, shapes and bytes of all parameters and persistent buffers."""
    model = getattr(model, "_orig_mod", model)
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
