"""What a tapped weight needs beside the model: its factors, and a leaf for its gradient."""

import torch
from torch import Tensor

from logra_kernels.nn.layers import Layer
from logra_kernels.projection import Projection

Held = dict[tuple[int, torch.device, torch.dtype], Tensor | None]  # a learned factor's id, and p_in made of it


class Probe:
    """What one tapped weight needs: its factors, and the zero leaf that receives its gradient.

    Attributes:
        p_in, p_out: The factors; None stands for the identity.
        source: What p_in was learned as; probes with one such tensor have the same p_in,
        shares: which some other probe of the taps has.
        device, dtype: Of the leaf.
        factor_dtype: That of the numbers p_in and p_out are held for.
        k: (k_out, k_in), another object for other factors.
    """

    def __init__(self, layer: Layer, projection_dtype: torch.dtype | None) -> None:
        dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else torch.float32
        mixes = all(adapter.mixes_dtypes for _, adapter in layer.holders)
        self._asked = projection_dtype if mixes else None
        self._cast: dict[tuple[torch.dtype, torch.dtype], tuple[Tensor | None, Tensor | None]] = {}
        self.device, self.dtype = layer.weight.device, torch.float64 if dtype == torch.float64 else torch.float32
        self.factor_dtype = self._beside(dtype)
        self.leaf: Tensor | None = None
        self.shares = False

    def project(self, layer: Layer, projection: Projection, held: Held) -> None:
        """Have other factors; a learned one that is `held` already, for another probe, is not held twice."""
        sides = (("in", layer.d_in), ("out", layer.d_out))
        p_in, p_out = (projection.factor(layer.name, side, d, self.device) for side, d in sides)
        dtype = self.factor_dtype
        self.source = None if projection.learned is None else projection.learned.get((layer.name, "in"))
        self.p_in = None if p_in is None else p_in.to(self.device, dtype)
        if self.source is not None:
            self.p_in = held.setdefault((id(self.source), self.device, dtype), self.p_in)
        self.p_out = None if p_out is None else p_out.to(self.device, dtype)
        self._cast.clear()
        self.k = (
            layer.d_out if self.p_out is None else len(self.p_out),
            layer.d_in if self.p_in is None else len(self.p_in),
        )

    def _beside(self, dtype: torch.dtype) -> torch.dtype:
        """A factor's dtype where it meets numbers of `dtype`: what was asked for, where that changes their width."""
        if self._asked == torch.bfloat16 and dtype == torch.float32:
            return torch.bfloat16
        if self._asked == torch.float32 and dtype in (torch.bfloat16, torch.float16):
            return torch.float32
        return dtype

    def factors(self, x: torch.dtype, y: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(p_in, p_out) to meet numbers of these dtypes: under autocast x and y may differ from the weight."""
        cast = self._cast.get((x, y))
        if cast is None:
            p_in = None if self.p_in is None else self.p_in.to(self._beside(x))
            cast = p_in, None if self.p_out is None else self.p_out.to(self._beside(y))
            if not torch.compiler.is_compiling():
                self._cast[x, y] = cast
        return cast

    def move(self, p_in: Tensor) -> None:
        """Go on with this copy of p_in, so that nobody holds another."""
        if self.p_in is not None and self.p_in.dtype is p_in.dtype:
            self.p_in = p_in
        for dtypes, (cast, p_out) in self._cast.items():
            if cast is not None and cast.dtype is p_in.dtype:
                self._cast[dtypes] = p_in, p_out
        self.k = self.k[0], self.k[1]  # another object: what was prepared with the former copy is out of date

    def renew(self, samples: int) -> Tensor:
        # 4 bytes seen as [N, k_out, k_in]: only the gradient's shape counts
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self.leaf = zero.expand(samples, *self.k).requires_grad_()
        return self.leaf
