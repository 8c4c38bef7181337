"""Training is a function of rows, settings and removed rows, and removal moves nothing but the removed rows."""

from dataclasses import replace

import numpy as np
import torch

from logra_kernels.demo import model as demo_model
from logra_kernels.demo.model import BEGIN, END, learn_tokenizer, new_model, schedule, train
from logra_kernels.integrations import causal_lm


def _trained(texts, tokenizer, settings, removed=frozenset()):
    model = new_model(settings, tokenizer)
    loss = train(model, tokenizer, texts, settings, removed=removed)
    return model.state_dict(), loss


def test_training_is_reproducible(texts, tokenizer, settings):
    one, first = _trained(texts, tokenizer, settings)
    two, second = _trained(texts, tokenizer, settings)
    assert first == second
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_seeds_differ(texts, tokenizer, settings):
    one, _ = _trained(texts, tokenizer, settings)
    two, _ = _trained(texts, tokenizer, replace(settings, seed=1))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_training_lowers_the_loss(texts, tokenizer, settings):
    _, short = _trained(texts, tokenizer, settings)
    _, long = _trained(texts, tokenizer, replace(settings, steps=60))
    assert long < short - 0.5


def test_a_new_model_leaves_the_random_state_alone(tokenizer, settings):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    new_model(settings, tokenizer)
    assert torch.equal(torch.rand(1), expected)


def test_an_epoch_meets_every_row_once(settings):
    lengths = np.random.default_rng(0).integers(5, 90, 100)
    steps = -(-100 // settings.batch)
    batches = list(schedule(lengths, replace(settings, steps=2 * steps)))
    assert len(batches) == 2 * steps
    for epoch in (batches[:steps], batches[steps:]):
        assert sorted(np.concatenate(epoch)) == list(range(100))


def test_removal_moves_no_other_row(texts, tokenizer, settings, monkeypatch):
    seen: list[list[tuple[int, ...]]] = []
    original = demo_model._batch_loss

    def spy(model, rows, pad):
        seen.append([tuple(row) for row in rows])
        return original(model, rows, pad)

    monkeypatch.setattr(demo_model, "_batch_loss", spy)
    _trained(texts, tokenizer, settings)
    everything, seen = seen, []
    removed = frozenset({0, 3, 5, 11, 20})
    _trained(texts, tokenizer, settings, removed)
    gone = {tuple(tokenizer(texts[row] + END).input_ids[: settings.max_length]) for row in removed}
    expected = [[row for row in batch if row not in gone] for batch in everything]
    assert seen == [batch for batch in expected if batch]
    assert expected != everything


def test_all_rows_removed_trains_nothing(texts, tokenizer, settings):
    fresh = new_model(settings, tokenizer).state_dict()
    state, loss = _trained(texts, tokenizer, settings, frozenset(range(len(texts))))
    assert all(torch.equal(fresh[name], state[name]) for name in fresh)
    assert np.isnan(loss)


def test_any_text_comes_back(tokenizer):
    text = "naïve → 数\tλ\n  two  spaces"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids(BEGIN)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(END).input_ids[1:] == [tokenizer.eos_token_id]


def test_the_vocabulary_is_deterministic(texts, settings, tokenizer):
    again = learn_tokenizer(texts, settings.vocabulary)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(again) == settings.vocabulary


def test_a_saved_model_loads_with_its_tokenizer(texts, tokenizer, settings, tmp_path):
    model = new_model(settings, tokenizer)
    train(model, tokenizer, texts, settings)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, vocabulary = causal_lm.load(tmp_path)
    batch, same = (causal_lm.encode(t, texts[:3], max_length=64) for t in (tokenizer, vocabulary))
    assert torch.equal(batch.input_ids, same.input_ids)
    torch.testing.assert_close(causal_lm.loss_sum(loaded, same), causal_lm.loss_sum(model, batch))
