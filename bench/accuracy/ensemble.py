"""Many small MLPs trained side by side: the model is one more dimension of every matrix product.

Member m with seed s has its own initialisation and its own order of rows, so it is the same model in any company.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .setting import Setting

Weights = list[Tensor]  # for each layer W [M, d_in, d_out] and b [M, 1, d_out]

_TOGETHER = 24  # members in one batch of products, so that weights and momenta stay near the processor


def initial(shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """nn.Linear's own initialisation, U(+-1/sqrt(d_in)), from a generator of the member's own; shapes (d_in, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for d_in, d_out in shapes:
        for shape in ((d_in, d_out), (1, d_out)):
            weights.append((torch.rand(shape, generator=generator) * 2 - 1) / d_in**0.5)
    return weights


def logits(weights: Weights, x: Tensor) -> Tensor:
    """[M, B, classes] of x [M, B, d_in] or [B, d_in]. A layer narrower than what it is given is shared by positions."""
    x = x if x.dim() == 3 else x.expand(len(weights[0]), *x.shape)
    samples = x.shape[1]
    for layer in range(0, len(weights), 2):
        x = x.reshape(len(x), -1, weights[layer].shape[1])
        x = torch.baddbmm(weights[layer + 1], x, weights[layer]).reshape(len(x), samples, -1)
        if layer + 2 < len(weights):
            x = x.relu()
    return x


def train(setting: Setting, x: Tensor, y: Tensor, members: Tensor, seeds: list[int], progress=None) -> Weights:
    """Train one model for each row of `members`.

    Args:
        x, y: All training rows, [N, d_in] and [N].
        members: Row numbers that each model may see, [M, n].
        seeds: M of them.
        progress: Called with the number of models done.
    """
    done: list[Weights] = []
    for start in range(0, len(seeds), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        done.append(_train_together(setting, x, y, members[part], seeds[part]))
        if progress is not None:
            progress(min(start + _TOGETHER, len(seeds)))
    return [torch.cat(same) for same in zip(*done, strict=True)]


def _train_together(setting: Setting, x: Tensor, y: Tensor, members: Tensor, seeds: list[int]) -> Weights:
    weights = [torch.stack(same) for same in zip(*(initial(setting.shapes, seed) for seed in seeds), strict=True)]
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.SGD(
        weights, lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay, foreach=True
    )
    orders = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
    n = members.shape[1]
    step, steps = 0, setting.epochs * -(-n // setting.batch)
    for _ in range(setting.epochs):
        shuffled = members.gather(1, torch.from_numpy(np.stack([order.permutation(n) for order in orders])))
        for rows in shuffled.split(setting.batch, dim=1):
            out = logits(weights, x[rows])
            loss = F.cross_entropy(out.flatten(0, 1), y[rows].flatten(), reduction="sum") / rows.shape[1]
            optimizer.param_groups[0]["lr"] = setting.lr * (1 - step / steps)
            step += 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [weight.detach() for weight in weights]


def outcome(weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and margin (log-odds of the true class, Park et al. 2023) of every row under every model, [M, Q] fp64."""
    with torch.no_grad():
        log_p = torch.cat([logits([w[m : m + 1] for w in weights], x) for m in range(len(weights[0]))])
        log_p = log_p.double().log_softmax(-1)
    at = y.expand(len(log_p), -1).unsqueeze(-1)
    true = log_p.gather(-1, at).squeeze(-1)
    others = log_p.scatter(-1, at, -torch.inf).logsumexp(-1)
    return -true, true - others


def module(weights: Weights, member: int) -> nn.Sequential:
    """One member as an ordinary model, its linear layers named "0", "2", "4"; with positions "1", "3", "6"."""
    positions = weights[-2].shape[1] // weights[-4].shape[2]
    layers: list[nn.Module] = [nn.Unflatten(1, (positions, -1))] if positions > 1 else []
    for i in range(0, len(weights), 2):
        if positions > 1 and i == len(weights) - 2:
            layers.append(nn.Flatten())
        w, b = weights[i][member], weights[i + 1][member, 0]
        linear = nn.Linear(*w.shape)
        with torch.no_grad():
            linear.weight.copy_(w.T)
            linear.bias.copy_(b)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()
