"""A really trained language model on the text it was trained on: its known loss, its known words, its own stories."""

import random

import pytest
import stories260k
import torch

import logra_kernels as lk
from logra_kernels.integrations.causal_lm import continue_greedy, encode, loss_sum, losses

pytestmark = pytest.mark.skipif(stories260k.data_dir() is None, reason="LOGRA_DATA is unset")

LOGGED = range(0, 2316, 4)  # stories
LONGEST = 256  # tokens kept of a story, BOS included
KNOWN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers of width 64 gain little from a second thread, and lose much where other programs use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        nll, tokens = losses(model, encode(tokenizer, texts[:30], max_length=LONGEST))
    assert int(tokens.sum()) == 7367
    assert float(nll.sum() / tokens.sum()) == pytest.approx(1.2465, abs=5e-4)


def test_greedy_text_is_the_known_one(loaded):
    model, tokenizer = loaded
    assert continue_greedy(model, tokenizer, "", 100).strip().startswith(KNOWN)


@pytest.fixture(scope="module")
def run(loaded, texts, tmp_path_factory):
    """A quarter of the stories, k = 16, on every linear layer, the output head (tied to the embedding) among them."""
    model, tokenizer = loaded
    path = tmp_path_factory.mktemp("stories") / "store"
    # Batches of like length: padding is work. The order in the store does not matter here.
    order = sorted(LOGGED, key=lambda i: len(texts[i]))
    with lk.Run(path, model, projection=lk.Projection(rank=16)) as run:
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            batch = encode(tokenizer, [texts[i] for i in part], max_length=LONGEST)
            with run.log(ids=[str(i) for i in part]):
                loss_sum(model, batch).backward()
        run.finalize()
        yield run


def test_every_linear_layer_is_logged(run):
    assert len(run.store) == 579
    assert len(run.store.layers) == 5 * 7 + 1
    assert set(run.store.layers.values()) == {(16, 16)}
    assert "lm_head" in run.store.layers


def test_a_story_as_query_finds_itself_first(run, loaded, texts):
    model, tokenizer = loaded
    drawn = random.Random(0).sample(LOGGED, 100)
    first = []
    for start in range(0, len(drawn), 10):
        part = drawn[start : start + 10]
        batch = encode(tokenizer, [texts[i] for i in part], max_length=LONGEST)
        with run.query(ids=[f"q{i}" for i in part]) as query:
            loss_sum(model, batch).backward()
        first += [int(ids[0]) for ids in run.topk(query, k=1, mode="relatif").ids]
    assert sum(i == j for i, j in zip(drawn, first, strict=True)) >= 95
