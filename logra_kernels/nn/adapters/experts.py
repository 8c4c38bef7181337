"""Experts of a mixture, as transformers ships them: one module, every expert's weight a slice of a 3-D parameter.

Tokens come to an expert by their index, so its rows are no samples; `nn.experts` says which sample each belongs to.
"""

import sys

from torch import Tensor, nn

from logra_kernels.nn.adapters.linear import LinearAdapter


class ExpertAdapter(LinearAdapter):
    """Slice `expert` of the parameter `stack`, [d_out, d_in] or, `transposed`, [d_in, d_out]: a linear layer."""

    kind = "expert"
    samples_first = False

    def __init__(self, module: nn.Module, stack: str, expert: int, bias: bool) -> None:
        weight: Tensor = getattr(module, stack)
        transposed: bool = module.is_transposed  # type: ignore[assignment]
        d_out, d_in = reversed(weight.shape[1:]) if transposed else weight.shape[1:]
        super().__init__(d_in, d_out, bias=bias and bool(module.has_bias), transposed=transposed)
        self.stack, self.expert = stack, expert
        self.part = f"{stack}.{expert}"

    def parameters(self, module: nn.Module) -> list[Tensor]:
        names = [self.stack, f"{self.stack}_bias"] if self.bias else [self.stack]
        return [getattr(module, name) for name in names]

    def matrix(self, grads: list[Tensor]) -> Tensor:
        return super().matrix([grad[self.expert] for grad in grads])


def adapt_experts(module: nn.Module, bias: bool) -> dict[str, ExpertAdapter]:
    """ "<stack>.<expert>" -> its adapter; nothing for a module that holds no such experts."""
    owner = sys.modules.get("transformers.integrations.moe")  # a model that has some has imported it
    if owner is None or not all(hasattr(module, name) for name in ("_apply_gate", "down_proj", "is_transposed")):
        return {}
    stacks = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not all(isinstance(getattr(module, stack, None), Tensor) for stack in stacks):
        return {}
    experts = [ExpertAdapter(module, stack, e, bias) for stack in stacks for e in range(len(getattr(module, stack)))]
    return {adapter.part: adapter for adapter in experts}
