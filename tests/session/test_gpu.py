"""A run of a model on a GPU gives what one of the same model on the CPU gives."""

import pytest
import torch
from session.every_answer import ROWS, SETTINGS, answers, lm_loss, make_case

import logra_kernels as lk
from logra_kernels.influence import MODES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Learned factors are known up to signs and turns, of which scores do not hang; ranks of near ties may change places.
NOT_COMPARED = {
    "read",
    "stored",
    "index",
    "l1",
    "shortlisted",
    "high",
    "low",
    "top",
    "part mlp",
    "part head",
    "part wte",
}


def worst_difference(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Of the largest number of each answer, and whose it is."""
    found = []
    for name in exact.keys() - NOT_COMPARED:
        size = exact[name].double().abs().max().item()
        found.append(((got[name].double().cpu() - exact[name].double()).abs().max().item() / size, name))
    return max(found)


@pytest.mark.parametrize("settings", SETTINGS)
def test_as_on_the_cpu(tmp_path, settings):
    model, ids = make_case(settings)
    exact = answers(tmp_path / "cpu", model, ids, SETTINGS[settings])
    got = answers(tmp_path / "gpu", model.cuda(), ids.cuda(), SETTINGS[settings])
    # what is rounded to a format, or projected in bf16, may be rounded the other way
    rounded = SETTINGS[settings].get("dtype", "fp32") != "fp32" or "bf16" in settings
    difference, name = worst_difference(got, exact)
    assert difference <= (0.1 if rounded else 2e-3), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_queries_that_were_moved_there(tmp_path, dtype, mode):
    model, ids = make_case("pca")
    with lk.Run(tmp_path / "store", model, dtype=dtype, rows_per_shard=10) as run:
        with run.log([f"r{i}" for i in range(ROWS)]):
            lm_loss(model, ids).backward()
        with run.query(["q0", "q1"]) as query:
            lm_loss(model, ids[:2].flip(1)).backward()
        there, some = query.to("cuda"), torch.arange(ROWS) % 3 != 0
        exact = run.scores(query, mode)
        near = {"rtol": 2e-2 if dtype == "int8" else 1e-3, "atol": 1e-2 * exact.abs().max().item()}
        torch.testing.assert_close(run.scores(there, mode).cpu(), exact, **near)
        for rows in (None, some):
            got, best = run.topk(there, 4, mode, rows=rows, layers=True), run.topk(query, 4, mode, rows=rows)
            assert got.values.is_cuda
            torch.testing.assert_close(got.values.cpu(), best.values, **near)
            torch.testing.assert_close(sum(got.layers.values()), got.values, **near)
        for one, other in zip(run.extremes(there, 3, mode), run.extremes(query, 3, mode), strict=True):
            torch.testing.assert_close(one.values.cpu(), other.values, **near)
        for name, part in run.group_scores(there, None, mode).items():
            torch.testing.assert_close(part.cpu(), run.group_scores(query, None, mode)[name], **near)
