"""A random Llama of 20 thousand parameters with a BPE tokenizer, saved as a Hugging Face model directory."""

from pathlib import Path

import torch

TEXT = "the cat dog bird sat ran flew on under over a mat log tree and then slept near old red blue house river"
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 6 to 17 random words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 18, (count,), generator=generator)
    return [
        " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (int(length),), generator=generator))
        for length in lengths
    ]


def tokenizer(bos: bool = True):
    """A byte-level BPE of up to 300 tokens, trained here."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(200), vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", **names)


def model(seed: int = 0, layers: int = 2):
    """Layers of width 32, 4 heads, 128 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def save(path: Path, seed: int = 0, bos: bool = True, layers: int = 2) -> Path:
    """Write the model and the tokenizer to `path`."""
    model(seed, layers).save_pretrained(path)
    tokenizer(bos).save_pretrained(path)
    return path
