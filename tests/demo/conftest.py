"""A small corpus and a short training, made once for all tests of the demo."""

import pytest

pytest.importorskip("transformers")

from logra_kernels.demo.corpus import stdlib_corpus
from logra_kernels.demo.model import Settings, learn_tokenizer


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(steps=6, vocabulary=400, hidden=32, layers=1, heads=2, feed_forward=48, batch=8, max_length=256)


@pytest.fixture(scope="session")
def corpus():
    return stdlib_corpus(80)


@pytest.fixture(scope="session")
def texts(corpus) -> list[str]:
    return [passage.text for passage in corpus.train]


@pytest.fixture(scope="session")
def tokenizer(texts, settings):
    return learn_tokenizer(texts, settings.vocabulary)
