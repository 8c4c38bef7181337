"""Projection factors as LogIX keeps them, lora/lora_state_dict.pt in a project's directory:

LAYER.logix_lora_A.weight    P_in [r, d_in], of a convolution [r, C_in, *kernel]
LAYER.logix_lora_B.weight    zeros [r, r]
LAYER.logix_lora_C.weight    P_out^T [d_out, r], of a convolution [d_out, r, 1, ...]
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.projection import Learned, Projection

_A, _B, _C = (f".logix_lora_{part}.weight" for part in "ABC")


def read_factors(directory: str | os.PathLike) -> Projection:
    """The projection that a project's directory keeps, written by LogIX or by `write_factors`.

    Raises:
        LograError: There is none, or it is damaged.
    """
    path = Path(directory) / "lora" / "lora_state_dict.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = [key.removesuffix(_A) for key in state if key.endswith(_A)]
        factors = {(name, "in"): state[name + _A].flatten(1) for name in names}
        factors |= {(name, "out"): state[name + _C].flatten(1).T for name in names}
    except FileNotFoundError:
        raise LograError(
            f"{path} is missing: {directory} keeps no LoRA factors; give the project's directory"
        ) from None
    except (OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise LograError(f"{path} is damaged or was written by another tool ({type(error).__name__})") from None
    if not factors:
        raise LograError(f"{path} holds no factors of LogIX's LoRA")
    return Projection(max(len(p) for p in factors.values()), "pca", learned=Learned(factors, {}))


def write_factors(directory: str | os.PathLike, factors: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
    """Keep `Taps.factors` as LogIX does, those of convolutions as matrices."""
    state = {}
    for name, (p_in, p_out) in factors.items():
        if p_in is None or p_out is None:
            raise LograError("save_lora: there are no factors, gradients are not projected; call add_lora() before")
        state[name + _A] = p_in.detach().float().cpu().contiguous()
        state[name + _B] = torch.zeros(len(p_out), len(p_in), dtype=torch.float32, device="cpu")
        state[name + _C] = p_out.detach().float().cpu().T.contiguous()
    place = Path(directory) / "lora"
    place.mkdir(parents=True, exist_ok=True)
    torch.save(state, place / "lora_state_dict.pt")
