"""The trained 260 thousand parameter story model of llama2.c as transformers' Llama, with its tokenizer and stories.

`LOGRA_DATA` names a folder with `stories260K/{stories260K,tok512}.bin` and `tinystories/tinystories_sample.txt.gz`.
"""

import os
import re
import struct
from functools import cache
from pathlib import Path

import numpy as np
import torch

from logra_kernels.integrations.text_data import read_rows


def data_dir() -> Path | None:
    """The data folder, or None where `LOGRA_DATA` is unset."""
    value = os.environ.get("LOGRA_DATA")
    return Path(value) if value else None


class Tokenizer:
    """Byte-fallback BPE of 512 pieces: merge the adjacent pair whose joined piece has the highest score, until none."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, path: Path) -> None:
        data, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        # Ids 3..258 are spelled "<0xNN>" and mean one byte; text that spells them out is not that byte.
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i >= 259}
        self._word = cache(self._merge)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokens of one space and `text`, without BOS; none for an empty text."""
        assert not add_special_tokens
        if not text:
            return []
        # No piece holds a space but at its start, so that words merge by themselves.
        return [token for word in re.findall(" ?[^ ]+| ", " " + text) for token in self._word(word)]

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens, without the first space."""
        raw = b"".join(
            bytes([token - 3]) if 3 <= token <= 258 else self.pieces[token] for token in tokens if token >= 3
        )
        return raw.decode("utf-8", errors="replace").removeprefix(" ")

    def _merge(self, word: str) -> tuple[int, ...]:
        tokens: list[int] = []
        for character in word:
            raw = character.encode()
            tokens += [self.ids[raw]] if raw in self.ids else [byte + 3 for byte in raw]
        while True:
            best = None
            for i in range(len(tokens) - 1):
                joined = self.ids.get(self.pieces[tokens[i]] + self.pieces[tokens[i + 1]])
                if joined is not None and (best is None or self.scores[joined] > self.scores[best[1]]):
                    best = (i, joined)
            if best is None:
                return tuple(tokens)
            tokens[best[0] : best[0] + 2] = [best[1]]


def load_model(path: Path):
    """transformers' LlamaForCausalLM with the weights of `stories260K.bin`, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", path.read_bytes()[:28])
    numbers = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28))
    head = dim // heads
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    blocks = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * head, dim)),
        ("self_attn.v_proj", (kv_heads * head, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += (count := int(np.prod(shape)))
        return numbers[at - count : at].reshape(shape)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in blocks:
        stacked = take(layers, *shape)
        for layer in range(layers):
            weight = stacked[layer]
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                # The file rotates the pairs (2i, 2i+1) of a head, transformers the pairs (i, i + head/2).
                weight = weight.reshape(-1, head // 2, 2, dim).transpose(1, 2).reshape(shape)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    # The last two tables are the cosines and sines of the rotation, which transformers computes.
    assert at + 2 * length * head // 2 == numbers.numel()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load(folder: Path):
    """(model, tokenizer)."""
    return load_model(folder / "stories260K" / "stories260K.bin"), Tokenizer(folder / "stories260K" / "tok512.bin")


def stories(folder: Path) -> list[str]:
    """The 2,316 whole stories; the file's last one is cut short and left out."""
    return [row.text for row in read_rows(folder / "tinystories" / "tinystories_sample.txt.gz")][:-1]
