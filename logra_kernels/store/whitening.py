"""The linear map by which a store's rows are kept whitened, layer by layer.

    w = g W,  W W^T = (H + lambda I)^-1,  so that  w_q w_t^T = g_q (H + lambda I)^-1 g_t^T      g, w [1, d], W [d, d]

All directions of w are about as large, so that numbers of few bits with one scale hold more of it (LoGra's curvature
used as QuIP and GPTQ use theirs). The map is kept in the store, because without it no query could be asked:

    sidecars/whitening.<digest>.safetensors            "<layer>", W fp32; metadata `Whitening.facts`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.tensorfile import as_bytes


@dataclass(frozen=True, eq=False)
class Whitening:
    """What a whitened store's rows were multiplied with.

    Attributes:
        maps: Layer name -> W [d, d] fp32, in row order.
        facts: Where it comes from, str -> str: "curvature" its kind, "damping" in words, "factor" the hash of both.
    """

    maps: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of the map: rows whitened by another one cannot be compared."""
        state = xxhash.xxh3_128()
        for name, tensor in self.maps.items():
            state.update(name.encode())
            state.update(as_bytes(tensor.contiguous()))
        return state.hexdigest()

    @cached_property
    def _inverses(self) -> dict[str, Tensor]:
        return {
            name: torch.linalg.inv(tensor.double()).float() if bool(tensor.any()) else tensor
            for name, tensor in self.maps.items()
        }

    @property
    def zero(self) -> list[str]:
        """Layers that had no gradient in any row when the map was made, and are whitened to zero."""
        return [name for name, tensor in self.maps.items() if not bool(tensor.any())]

    def apply_new(self, rows: Tensor) -> Tensor:
        """`apply` for rows that are to be stored.

        Raises:
            StoreError: They have a gradient in a layer that is whitened to zero.
        """
        parts = rows.split([len(tensor) for tensor in self.maps.values()], dim=1)
        for name, part in zip(self.maps, parts, strict=True):
            if name in self.zero and bool(part.any()):
                raise StoreError(
                    f"whitening: no row had a gradient in layer {name!r} when the store was whitened, and new rows"
                    " have; log them into a store of raw rows, and whiten that anew"
                )
        return self.apply(rows)

    def apply(self, rows: Tensor) -> Tensor:
        """w of raw rows, [N, D] -> [N, D] fp32 on their device."""
        return self._multiplied(rows, self.maps, lambda tensor: tensor)

    def solve(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 g of raw rows, [N, D] -> [N, D] fp32."""
        return self.solve_whitened(self.apply(rows))

    def solve_whitened(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 g of whitened rows, [N, D] -> [N, D] fp32."""
        return self._multiplied(rows, self.maps, lambda tensor: tensor.T)

    def undo(self, rows: Tensor) -> Tensor:
        """g of whitened rows, [N, D] -> [N, D] fp32."""
        return self._multiplied(rows, self._inverses, lambda tensor: tensor)

    def check(self, layers: Mapping[str, tuple[int, int]]) -> None:
        """
        Raises:
            StoreError: It is of other layers.
        """
        sizes = {name: tuple(tensor.shape) for name, tensor in self.maps.items()}
        wanted = {name: (k_out * k_in, k_out * k_in) for name, (k_out, k_in) in layers.items()}
        if list(sizes.items()) != list(wanted.items()):
            raise StoreError(f"whitening: maps of {len(sizes)} layers do not fit the store's {len(wanted)}")

    def _multiplied(self, rows: Tensor, maps: Mapping[str, Tensor], turned: Callable[[Tensor], Tensor]) -> Tensor:
        widths = [len(tensor) for tensor in maps.values()]
        parts = rows.float().split(widths, dim=1)
        return torch.cat(
            [part @ turned(tensor.to(rows.device)) for part, tensor in zip(parts, maps.values(), strict=True)], dim=1
        )
