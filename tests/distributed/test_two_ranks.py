"""Two processes under torchrun, gloo: the curvature, self-influence, scores and ranks that one process has."""

from pathlib import Path

import pytest
import torch
from distributed.two_ranks import KINDS, LEARNED, answers, options, watch_and_log
from session.models import N, ask, make_model
from torchrun import launch

import logra_kernels as lk
from logra_kernels.errors import LograError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    launch(HERE / "two_ranks.py", str(path))
    return path


@pytest.mark.parametrize("kind", [*KINDS, *LEARNED, "resumed"])
def test_every_answer_is_that_of_one_process(directory, tmp_path, kind):
    asked = "pca ekfac" if kind == "resumed" else kind
    with lk.Run(tmp_path / "one", make_model(), **options(asked)) as run:
        watch_and_log(run, asked, list(range(N)))
        run.finalize()
        exact = answers(run, ask(run))
    for rank in range(2):
        got = torch.load(directory / f"{kind}.{rank}.pt")
        assert list(got) == list(exact)
        for name, value in exact.items():
            if isinstance(value, list):
                assert got[name] == value, name
            else:
                largest = float(value.abs().max())
                torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: n + m)
    with lk.Run(directory / kind, make_model(), curvature=options(asked)["curvature"]) as merged:
        # what is left is a plain store
        assert merged.store.ids == [f"row{i}" for i in range(N)]
        again = merged.scores(ask(merged))
        torch.testing.assert_close(again, exact["dot scores"], rtol=0, atol=1e-5 * float(again.abs().max()))


def test_without_a_process_group(tmp_path):
    with pytest.raises(LograError, match="there is no process group"):
        lk.DistributedRun(tmp_path / "s", make_model())
