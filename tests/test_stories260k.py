"""A really trained language model on the text it was trained on: its known loss, its known words, its own stories."""

import pytest
import stories260k
import torch

from logra_kernels.integrations.causal_lm import continue_greedy, encode, losses

pytestmark = pytest.mark.skipif(stories260k.data_dir() is None, reason="LOGRA_DATA is unset")

KNOWN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def loaded():
    return stories260k.load(stories260k.data_dir())


@pytest.fixture(scope="module")
def texts():
    return stories260k.stories(stories260k.data_dir())


def test_vocabulary_merges_within_words_only(loaded):
    _, tokenizer = loaded
    assert len(tokenizer.pieces) == 512
    assert not any(b" " in piece[1:] for piece in tokenizer.pieces[259:])


def test_mean_loss_is_the_known_one(loaded, texts):
    model, tokenizer = loaded
    assert len(texts) == 2316
    with torch.no_grad():
        nll, tokens = losses(model, encode(tokenizer, texts[:30], max_length=256))
    assert int(tokens.sum()) == 7367
    assert float(nll.sum() / tokens.sum()) == pytest.approx(1.2465, abs=5e-4)


def test_greedy_text_is_the_known_one(loaded):
    model, tokenizer = loaded
    assert continue_greedy(model, tokenizer, "", 100).strip().startswith(KNOWN)
