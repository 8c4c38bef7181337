"""A classifier of token sequences as transformers' Trainer takes one, and rows for it."""

import torch
from torch import nn


class Classifier(nn.Module):
    """Mean of embeddings, two linear layers and the mean cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 6)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None]
        pooled = (self.tokens(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(torch.tanh(self.hidden(pooled)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows_of(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Of 3 to 7 tokens, padded to 8."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(3, 8, (count,), generator=generator).tolist():
        mask = (torch.arange(8) < length).long()
        tokens = torch.randint(1, 30, (8,), generator=generator) * mask
        label = torch.randint(4, (1,), generator=generator)[0]
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": label})
    return rows
