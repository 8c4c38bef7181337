"""A small Llama and its byte-level BPE vocabulary, both learned on the spot.

Training is a function of (rows, settings, removed rows): the schedule is drawn for all rows, and a removed row only
leaves its batch. So two trainings that differ in what was removed share the initialisation, the number of steps and
every other row's place, and their difference is the removed rows' doing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
_IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights, next to the rows themselves."""

    steps: int = 1400
    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 96
    layers: int = 3
    initial: float = 0.08
    heads: int = 4
    feed_forward: int = 256
    batch: int = 4
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    max_length: int = 320


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens; encoding puts `<s>` in front, so a prompt starts as a row does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; the same settings give the same weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        initializer_range=settings.initial,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def schedule(lengths: np.ndarray, settings: Settings) -> Iterator[np.ndarray]:
    """`settings.steps` batches of row numbers, epoch after epoch in a seeded order.

    Within a pool of 16 batches rows of like length share a batch, which keeps the padding small.
    """
    generator = np.random.default_rng(settings.seed)
    pool = 16 * settings.batch
    step = 0
    while True:
        order = generator.permutation(len(lengths))
        batches = []
        for start in range(0, len(order), pool):
            rows = order[start : start + pool]
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            batches += [rows[i : i + settings.batch] for i in range(0, len(rows), settings.batch)]
        for index in generator.permutation(len(batches)):
            if step == settings.steps:
                return
            yield batches[index]
            step += 1


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    settings: Settings,
    *,
    removed: frozenset[int] = frozenset(),
    on_step: Callable[[float], None] | None = None,
) -> float:
    """Train `model` in place on `texts` without the row numbers in `removed`; returns the last steps' mean loss.

    AdamW with warm-up and cosine decay, mean cross entropy over a batch's tokens. A batch whose rows are all removed
    is skipped, its step is not made up for. `on_step` is called after every step with the mean loss of recent ones.
    """
    tokens = tokenizer([text + END for text in texts], verbose=False).input_ids
    rows = [np.array(row[: settings.max_length]) for row in tokens]
    lengths = np.array([len(row) for row in rows])
    optimizer = torch.optim.AdamW(_decayed(model, settings.weight_decay), betas=(0.9, 0.95), fused=True)
    model.train()
    recent: list[float] = []
    for step, batch in enumerate(schedule(lengths, settings)):
        kept = [rows[row] for row in batch if row not in removed]
        if kept:
            for group in optimizer.param_groups:
                group["lr"] = _pace(step, settings)
            loss = _batch_loss(model, kept, tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent = [*recent[-49:], loss.item()]
        if on_step is not None:
            on_step(_mean(recent))
    model.eval()
    return _mean(recent)


def _decayed(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only, as usual."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _pace(step: int, settings: Settings) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to 2%."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done)))


def _batch_loss(model: LlamaForCausalLM, rows: Sequence[np.ndarray], pad: int) -> torch.Tensor:
    """Mean cross entropy over all tokens; causal attention never looks at the padding, which is on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, device="cpu")
    labels = torch.full((len(rows), width), _IGNORED, device="cpu")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = labels[index, : len(row)] = torch.from_numpy(row)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
