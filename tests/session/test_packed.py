"""A store logged from packed documents is the store of the documents logged one by one."""

import pytest
import torch
from torch import nn

import logra_kernels as lk

LENGTHS = [5, 3, 4, 7, 5]
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
IDS = ["a", "b", "c", "d", "e"]


class CausalMean(nn.Module):
    """Each position reads the mean of those before it: of its own document, when told where documents begin."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, document=None):
        h = torch.tanh(self.inner(x))
        see = torch.ones(x.shape[1], x.shape[1]).tril().expand(len(x), -1, -1)
        if document is not None:
            see = see * (document[:, :, None] == document[:, None])
        return self.outer(see @ h / see.sum(-1, keepdim=True))


def make():
    torch.manual_seed(0)
    return CausalMean(), [torch.randn(1, n, 6) for n in LENGTHS], [torch.randn(1, n, 3) for n in LENGTHS]


def packed_loss(model, xs, targets, isolated=True):
    document = torch.cat([torch.full((x.shape[1],), n) for n, x in enumerate(xs)])[None]
    y = model(torch.cat(xs, 1), document if isolated else None)
    return nn.functional.mse_loss(y, torch.cat(targets, 1), reduction="sum")


def test_log_query_and_observe(tmp_path):
    model, xs, targets = make()
    rows, scores = [], []
    for packed in (False, True):
        with lk.Run(tmp_path / str(packed), model, projection=lk.Projection(rank=3), curvature="kfac") as run:
            if packed:
                with run.log(IDS, columns={"source": IDS}, offsets=OFFSETS):
                    packed_loss(model, xs, targets).backward()
                with run.observe(offsets=OFFSETS):
                    packed_loss(model, xs, targets).backward()
                with run.query(["q", "r"], offsets=torch.tensor([0, 5, 8])) as query:
                    packed_loss(model, xs[:2], targets[:2]).backward()
            else:
                for i, x, target in zip(IDS, xs, targets, strict=True):
                    with run.log([i], columns={"source": [i]}):
                        packed_loss(model, [x], [target]).backward()
                    with run.observe():
                        packed_loss(model, [x], [target]).backward()
                queries = []
                for i in range(2):
                    with run.query(["qr"[i]]) as query:
                        packed_loss(model, [xs[i]], [targets[i]]).backward()
                    queries.append(query)
                query = lk.Query.cat(queries)
            run.finalize()
            assert run.store.ids == IDS
            rows.append(run.store.read(0, 5))
            scores.append(run.scores(query))
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


def test_verify_sees_whether_documents_see_each_other(tmp_path):
    model, xs, targets = make()
    with lk.Run(tmp_path / "s", model) as run:

        def check(isolated):
            return run.verify(
                lambda part: packed_loss(model, xs[part], targets[part], isolated), samples=5, offsets=OFFSETS
            )

        report = check(isolated=True)
        assert report.ok, report
        assert report.error < 1e-4
        assert "packed documents" in str(check(isolated=False))


def test_misuse_leaves_the_weights_as_they_were(tmp_path):
    model, xs, targets = make()
    with lk.Run(tmp_path / "s", model) as run:
        with (
            pytest.raises(ValueError, match="offsets cut 5 documents where 4 samples"),
            run.log(IDS[:4], offsets=OFFSETS),
        ):
            pass
        with pytest.raises(ValueError, match="one sample a token row"), run.observe(offsets=OFFSETS, sharing="reduce"):
            packed_loss(model, xs, targets).backward()
    assert all(p.requires_grad for p in model.parameters())
