"""One string for a model's weights, so that a query with other weights is refused."""

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor, nn


def model_fingerprint(model: nn.Module) -> str:
    """xxh3-128 over the names, dtypes, shapes and bytes of all parameters and persistent buffers.

    A sharded weight (DTensor) is gathered, which every process of its mesh must take part in: the fingerprint is that
    of the whole model.
    """
    model = getattr(model, "_orig_mod", model)
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        for part, tensor in _plain(name, value):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold the bytes: of a quantised one, codes and scales."""
    if not isinstance(value, Tensor):
        return
    gather = getattr(value, "full_tensor", None)
    if gather is not None:
        yield name, gather()
        return
    if type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for attribute in value.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{attribute}", getattr(value, attribute))
