"""Local Hugging Face causal language models: loading, batches, the loss that attribution differentiates.

loss = sum over samples n, positions t of -log p(token[n, t] | token[n, :t])        labels[n, t] != -100 only
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.errors import LograError
from logra_kernels.integrations.next_token import summed_nll
from logra_kernels.integrations.surrogates import refuse_half_pairs

IGNORED = -100
"""Label of a position whose token is not predicted, as in Hugging Face models."""


@dataclass(frozen=True)
class Batch:
    """N right-padded token sequences of up to T positions.

    Attributes:
        input_ids: Tokens, [N, T] int64.
        attention_mask: 1 on tokens, 0 on padding, [N, T] int64.
        labels: The token at each predicted position, -100 elsewhere, [N, T] int64. Not shifted:
            `labels[n, t]` is predicted from the positions before t.
        ids: Name of every sample in error messages.
        cut: Whether each sample was longer and lost tokens, N truth values; none where that is not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    ids: tuple[str, ...] = ()
    cut: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def select(self, samples: Sequence[int]) -> Batch:
        """Some of the samples, padded as they are."""
        chosen = list(samples)
        ids = tuple(self.ids[i] for i in chosen) if self.ids else ()
        cut = tuple(self.cut[i] for i in chosen) if self.cut else ()
        return Batch(self.input_ids[chosen], self.attention_mask[chosen], self.labels[chosen], ids, cut)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def load(
    model_dir: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer from a local directory; nothing is downloaded.

    Args:
        model_dir: Directory written by `save_pretrained` of both the model and the tokenizer.
        device: Where the weights go.
        dtype: Of the weights; None keeps the checkpoint's.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        LograError: The directory, its configuration, weights or tokenizer are missing or do not fit each other, or
            transformers is not installed.
    """
    path = Path(model_dir)
    if not path.is_dir():
        raise LograError(f"model directory {path} does not exist; give a local directory written by save_pretrained()")
    if not (path / "config.json").is_file():
        raise LograError(f"{path} has no config.json; give a local directory written by save_pretrained()")
    transformers = _quiet_transformers()
    tokenizer = _load_tokenizer(transformers, path)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype="auto" if dtype is None else dtype, output_loading_info=True
        )
    except Exception as error:
        # Configurations, weight files and model classes each fail in their own way.
        raise LograError(f"cannot load a causal language model from {path}: {_first_line(error)}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        # transformers fills these with random numbers and only logs it: every score would be noise.
        raise LograError(
            f"the checkpoint in {path} lacks {len(absent)} of its weights ({absent[0]}, ...); save the model again"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise LograError(f"the tokenizer in {path} has {len(tokenizer)} tokens but the model embeds {rows}; pair them")
    return model.eval().to(device), tokenizer


def positions(model: nn.Module) -> int | None:
    """Longest sequence that the model takes, None where its configuration does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    completions: Sequence[str] | None = None,
    max_length: int = 512,
    ids: Sequence[str] | None = None,
) -> Batch:
    """Tokenise texts into one right-padded batch, the tokenizer's BOS (if it has one) first.

    Args:
        tokenizer: Has `encode(text, add_special_tokens=False)`, `bos_token_id` and `eos_token_id`.
        texts: N texts; all of their tokens are predicted, apart from a first one without BOS before it.
        completions: N continuations, one per text; then the texts are prompts and only the completions' tokens are
            predicted. A token that spans both counts as completion.
        max_length: Longest sequence, BOS included. Texts lose their end; prompts lose their beginning first.
        ids: Names for error messages; the default is "text 1", "text 2", ...

    Raises:
        LograError: A text encodes to no predicted token, or holds half of a surrogate pair.
        ValueError: Lengths of the arguments differ, or `max_length` < 2.
    """
    return _pad(_encode(tokenizer, texts, completions, max_length, ids), _pad_id(tokenizer))


def batches_of_like_length(
    tokenizer: Any,
    texts: Sequence[str],
    size: int,
    *,
    completions: Sequence[str] | None = None,
    max_length: int = 512,
    ids: Sequence[str] | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """`encode` texts in batches that have little padding: those of most tokens first, equal ones in their order.

    Args:
        tokenizer, texts, completions, max_length, ids: As in `encode`.
        size: Texts in a batch.

    Yields:
        (which texts, the batch).

    Raises:
        LograError, ValueError: As `encode`, before the first batch.
    """
    sequences = _encode(tokenizer, texts, completions, max_length, ids)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part, _pad([sequences[i] for i in part], _pad_id(tokenizer))


def losses(model: nn.Module, batch: Batch, *, nonfinite: str = "raise") -> tuple[Tensor, Tensor]:
    """Per-sample sums of the next-token negative log-likelihood, in nats.

    Args:
        nonfinite: "keep" leaves losses that are NaN or infinite to who asks.

    Returns:
        (nll [N] fp32, fp64 of an fp64 model, number of predicted tokens [N] int64).

    Raises:
        LograError: A sample's loss is NaN or infinite, unless that is kept.
    """
    # No cache: it would only hold memory during the backward pass.
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    nll = summed_nll(output.logits, batch.labels, IGNORED)
    finite = torch.isfinite(nll.detach())
    if nonfinite == "raise" and not bool(finite.all()):
        bad = int((~finite).nonzero()[0, 0])
        name = batch.ids[bad] if batch.ids else f"number {bad + 1} of the batch"
        kind = "NaN" if bool(nll.detach()[bad].isnan()) else "infinite"
        raise LograError(f"the model's loss is {kind} on row {name}; check the weights, the dtype and that row")
    return nll, (batch.labels[:, 1:] != IGNORED).sum(dim=1)


def loss_sum(model: nn.Module, batch: Batch, *, nonfinite: str = "raise") -> Tensor:
    """Sum of the next-token negative log-likelihood over samples and positions, a scalar.

    A sum and not a mean: a mean would rescale every sample's gradient by its batch.

    Args:
        nonfinite: As in `losses`; the gradients of the other samples are not touched.

    Raises:
        LograError: A sample's loss is NaN or infinite, unless that is kept.
    """
    return losses(model, batch, nonfinite=nonfinite)[0].sum()


@torch.no_grad()
def continue_greedy(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """What the model writes after `prompt`, taking the likeliest token each time.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompt: May be empty where the tokenizer has a BOS token.
        max_new_tokens: Most tokens to write; fewer if the model ends its text.

    Returns:
        The continuation alone, which may be empty.

    Raises:
        LograError: The prompt has no tokens, holds half of a surrogate pair, or is too long for the model with the
            tokens to write.
    """
    refuse_half_pairs(prompt, "the prompt")
    head = _bos(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    limit = positions(model)
    if not head:
        raise LograError("the prompt has no tokens; write at least one word")
    if limit is not None and len(head) + max_new_tokens > limit:
        raise LograError(
            f"the prompt's {len(head)} tokens and {max_new_tokens} new ones exceed the model's {limit} positions; "
            "shorten one of them"
        )
    device = next(model.parameters()).device
    whole, cache, step = list(head), None, torch.tensor([head], device=device)
    for _ in range(max_new_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        token = int(output.logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        whole.append(token)
        cache, step = output.past_key_values, torch.tensor([[token]], device=device)
    before = tokenizer.decode(head, skip_special_tokens=True)
    # The last token may end in the middle of a character.
    after = tokenizer.decode(whole, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}")
    # Decoding the new tokens alone would lose a first space in SentencePiece vocabularies.
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(whole[len(head) :])


def _quiet_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise LograError("this needs transformers; pip install 'logra-kernels[hf]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load_tokenizer(transformers: Any, path: Path) -> Any:
    advice = f"{path} has no usable tokenizer; save it there with tokenizer.save_pretrained()"
    if not any(path.glob("*token*")) and not any(path.glob("vocab*")) and not any(path.glob("*.model")):
        raise LograError(advice)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        empty = len(tokenizer) == 0
    except Exception as error:
        # Each tokenizer class fails in its own way on missing or foreign files.
        raise LograError(f"{advice} ({_first_line(error)})") from error
    if empty:
        raise LograError(advice)
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a sample, the first `given` of which are not predicted."""

    name: str
    tokens: list[int]
    given: int
    cut: bool


def _encode(
    tokenizer: Any,
    texts: Sequence[str],
    completions: Sequence[str] | None,
    max_length: int,
    ids: Sequence[str] | None,
) -> list[_Sequence]:
    if max_length < 2:
        raise ValueError(f"encode: max_length {max_length} leaves no token to predict; use at least 2")
    if completions is not None and len(completions) != len(texts):
        raise ValueError(f"encode: {len(texts)} texts but {len(completions)} completions")
    names = tuple(ids) if ids is not None else tuple(f"text {i + 1}" for i in range(len(texts)))
    if len(names) != len(texts):
        raise ValueError(f"encode: {len(texts)} texts but {len(names)} ids")
    sequences = []
    for i, text in enumerate(texts):
        completion = completions[i] if completions is not None else None
        refuse_half_pairs(text + (completion or ""), f"{names[i]}: its text")
        sequence = _sequence(tokenizer, names[i], text, completion, max_length)
        if len(sequence.tokens) <= sequence.given:
            whole = text if completion is None else completion
            raise LograError(f"{names[i]} has no token to predict (its text: {whole[:40]!r}); drop or lengthen it")
        sequences.append(sequence)
    return sequences


def _sequence(tokenizer: Any, name: str, text: str, completion: str | None, max_length: int) -> _Sequence:
    bos = _bos(tokenizer)
    if completion is None:
        tokens = bos + tokenizer.encode(text, add_special_tokens=False)
        return _Sequence(name, tokens[:max_length], 1, len(tokens) > max_length)
    # Tokenised in one piece, as the model met such text in training; the prompt ends where the two readings part.
    prompt = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text + completion, add_special_tokens=False)
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    room = max_length - len(bos)
    # One token of the prompt stays where no BOS precedes: the first completion token needs something to follow.
    drop = max(0, min(len(whole) - room, shared - (0 if bos else 1)))
    kept = (bos + whole[drop:])[:max_length]
    return _Sequence(name, kept, max(1, len(bos) + shared - drop), len(whole) > room)


def _pad(sequences: Sequence[_Sequence], pad_id: int) -> Batch:
    longest = max((len(sequence.tokens) for sequence in sequences), default=0)
    input_ids = torch.full((len(sequences), longest), pad_id, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, sequence in enumerate(sequences):
        row = torch.tensor(sequence.tokens, device="cpu")
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
        labels[i, sequence.given : len(row)] = row[sequence.given :]
    names, cut = tuple(sequence.name for sequence in sequences), tuple(sequence.cut for sequence in sequences)
    return Batch(input_ids, attention_mask, labels, names, cut)
