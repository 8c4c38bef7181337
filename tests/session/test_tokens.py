"""Token shares in a session: they add up to the row's score from both sides."""

import pytest
import stories260k
import torch
from session.models import T, ask, log_all, loss_of, make_data, make_model
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import LograError
from logra_kernels.integrations.causal_lm import encode, losses


def close(got, exact, rtol=1e-4):
    torch.testing.assert_close(got, exact, rtol=rtol, atol=rtol * exact.abs().max().item())


@pytest.mark.parametrize("damping", [None, 0.5])
def test_train_and_query_positions_add_up_to_the_scores(tmp_path, damping):
    with lk.Run(tmp_path / "s", make_model(), projection=lk.Projection(rank=3), rows_per_shard=8) as run:
        log_all(run)
        query = ask(run)
        scores = run.scores(query, damping=damping)
        x, target = make_data()
        with run.tokens(query, damping) as tokens:
            loss_of(run.model, x[4:9], target[4:9]).backward()
        assert tokens.shares.shape == (3, 5, T)
        close(tokens.shares.sum(-1), scores[:, 4:9])
        close(sum(tokens.layers.values()), tokens.shares)

        rows = run.stored(["row7", "row2"])
        qx, qt = make_data(3, seed=2)
        with run.tokens(rows, damping) as tokens:
            loss_of(run.model, qx, qt).backward()
        close(tokens.shares.sum(-1), scores[:, [7, 2]].T)
        assert not run.taps.active
        assert all(p.grad is None for p in run.model.parameters())


def test_weights_of_positions_are_those_that_were_logged_with(tmp_path):
    weights = torch.rand(6, T)
    weights[2, 3:] = 0
    x, target = make_data()
    with lk.Run(tmp_path / "s", make_model(), projection=lk.Projection(rank=3)) as run:
        with run.log([str(i) for i in range(6)], weights=weights):
            loss_of(run.model, x[:6], target[:6]).backward()
        query = ask(run)
        with run.tokens(query, weights=weights) as tokens:
            loss_of(run.model, x[:6], target[:6]).backward()
        close(tokens.shares.sum(-1), run.scores(query))


def test_misuse(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Flatten(1), nn.Linear(8 * T, 3))
    x, target = make_data()
    with lk.Run(tmp_path / "s", model) as run:
        with run.log(["a", "b"]):
            loss_of(model, x[:2], target[:2, 0]).backward()
        query = run.stored(["b"])
        with run.tokens(query) as tokens:
            loss_of(model, x[:2], target[:2, 0]).backward()
        with pytest.raises(ValueError, match=r"different numbers of positions of a sample, 5 \('0'\), 1 \('2'\)"):
            _ = tokens.shares
        close(sum(part.sum(-1) for part in tokens.layers.values()), run.scores(query))
        with pytest.raises(LograError, match="tokens: 2 of 2 layers received no gradient"), run.tokens(query):
            pass
        with pytest.raises(LograError, match="has no row 'c'"):
            run.stored(["a", "c"])


@pytest.mark.skipif(stories260k.data_dir() is None, reason="LOGRA_DATA is unset")
def test_a_trained_transformer_with_padding_and_a_tied_head(tmp_path):
    model, tokenizer = stories260k.load(stories260k.data_dir())
    texts = stories260k.stories(stories260k.data_dir())[:6]
    batch, asked = encode(tokenizer, texts[:4], max_length=60), encode(tokenizer, texts[4:], max_length=40)
    batch.labels[1, 20:], batch.attention_mask[1, 20:] = -100, 0

    def backward(of):
        losses(model, of)[0].sum().backward()

    kinds = ["linear", "embedding", "norm"]
    with lk.Run(tmp_path / "s", model, kinds=kinds, projection=lk.Projection(rank=8)) as run:
        with run.log(["a", "b", "c", "d"]):
            backward(batch)
        with run.query(["x", "y"]) as query:
            backward(asked)
        scores = run.scores(query)
        with run.tokens(query) as tokens:
            backward(batch)
        close(tokens.shares.sum(-1), scores)
        with run.tokens(run.stored(["b", "d"])) as tokens:
            backward(asked)
        close(tokens.shares.sum(-1), scores[:, [1, 3]].T)
