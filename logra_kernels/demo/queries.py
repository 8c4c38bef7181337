"""What the demo asks about: four continuations of the model's own, and two passages it never saw."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.demo.corpus import Corpus, Passage
from logra_kernels.integrations import causal_lm

# Beginnings that the library's modules write each in their own way.
PROMPTS = (
    ">>> ExtendedContext.",
    "Example (for a Turtle instance named turtle):",
    "Construct a Ttk",
    "Args:\n    address:",
)
_NEW_TOKENS = 48
_HELD_OUT = 2


@dataclass(frozen=True)
class Question:
    """One query: the loss of `completion` after `prompt`; an empty prompt means the whole text."""

    id: str
    prompt: str
    completion: str
    origin: str


def questions(model: nn.Module, tokenizer: Any, corpus: Corpus) -> list[Question]:
    """The demo's six queries; the same model and corpus give the same ones."""
    asked: list[Question] = []
    for prompt in PROMPTS:
        completion = causal_lm.continue_greedy(model, tokenizer, prompt, _NEW_TOKENS)
        # A model that ends its text at once has said nothing that could be attributed.
        if completion:
            asked.append(Question(f"q{len(asked) + 1}", prompt, completion, "the model's own continuation"))
    for passage in held_out(corpus, _HELD_OUT):
        origin = f"held-out passage of {passage.source}"
        asked.append(Question(f"q{len(asked) + 1}", "", passage.text, origin))
    return asked


def held_out(corpus: Corpus, count: int) -> list[Passage]:
    """Held-out passages of the modules with most training passages, one a module.

    Nothing in the corpus could have taught a passage whose module wrote nothing else, so the largest modules are asked
    about. The passages are chosen before any training, by size of module and place alone.
    """
    written = Counter(passage.source for passage in corpus.train)
    first: dict[str, Passage] = {}
    for passage in corpus.held_out:
        first.setdefault(passage.source, passage)
    return sorted(first.values(), key=lambda passage: (-written[passage.source], passage.id))[:count]


def encode(tokenizer: Any, asked: Sequence[Question], max_length: int) -> causal_lm.Batch:
    """All questions as one batch."""
    return causal_lm.encode(
        tokenizer,
        [question.prompt for question in asked],
        completions=[question.completion for question in asked],
        max_length=max_length,
        ids=[question.id for question in asked],
    )


@torch.no_grad()
def losses(model: nn.Module, batch: causal_lm.Batch) -> tuple[Tensor, Tensor]:
    """Each question's summed loss in nats [Q] and its number of tokens [Q]."""
    return causal_lm.losses(model, batch)
