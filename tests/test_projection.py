import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import logra_kernels as lk

RANDOM = ["orthonormal", "gaussian", "rademacher"]


@pytest.mark.parametrize("kind", RANDOM)
def test_same_settings_same_factors_in_another_process(kind):
    code = (
        "import logra_kernels as lk, hashlib;"
        f"p = lk.Projection(rank=8, kind={kind!r}, seed=5).factor('h.0.mlp', 'in', 33);"
        "print(hashlib.sha256(p.numpy().tobytes()).hexdigest())"
    )
    here = lk.Projection(rank=8, kind=kind, seed=5).factor("h.0.mlp", "in", 33)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(here.numpy().tobytes()).hexdigest() == there


@pytest.mark.parametrize("kind", RANDOM)
def test_name_side_and_seed_each_change_the_factors(kind):
    base = lk.Projection(rank=4, kind=kind, seed=0).factor("a", "in", 32)
    for other in (
        lk.Projection(rank=4, kind=kind, seed=1).factor("a", "in", 32),
        lk.Projection(rank=4, kind=kind, seed=0).factor("b", "in", 32),
        lk.Projection(rank=4, kind=kind, seed=0).factor("a", "out", 32),
    ):
        assert not torch.equal(base, other)


def test_orthonormal_rows():
    p = lk.Projection(rank=16).factor("a", "in", 100).double()
    torch.testing.assert_close(p @ p.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_random_factors_keep_norms_on_average(kind):
    x = torch.randn(64, dtype=torch.float64)
    norms = [
        (lk.Projection(rank=32, kind=kind, seed=s).factor("a", "in", 64).double() @ x).square().sum()
        for s in range(200)
    ]
    assert torch.stack(norms).mean() / x.square().sum() == pytest.approx(1.0, abs=0.06)  # s.e. sqrt(2/32/200) = 0.018


def test_gaussian_is_normal():
    p = lk.Projection(rank=64, kind="gaussian", seed=2).factor("a", "in", 4096).double() * 8
    assert p.mean().abs() < 0.01
    assert p.std() == pytest.approx(1.0, abs=0.01)
    assert (p**4).mean() == pytest.approx(3.0, abs=0.1)
    assert p.abs().max() < 7


def test_a_narrow_side_keeps_its_width():
    assert lk.Projection(rank=64).factor("a", "out", 10).shape == (10, 10)
    assert lk.Projection(kind="identity").factor("a", "out", 10) is None
    assert lk.Projection(kind="identity").width(10, "out") == 10


def test_settings_survive_the_manifest():
    projection = lk.Projection(rank=3, kind="gaussian", seed=9)
    assert lk.Projection.from_dict(projection.to_dict()) == projection
    with pytest.raises(ValueError, match="generator 99"):
        lk.Projection.from_dict({**projection.to_dict(), "generator": 99})


def test_known_numbers():
    """The drawn numbers are part of the store's format: this may only change together with the generator's number."""
    known = [[0.4172852635, 0.1369137317, -0.2963460386], [-0.5518770218, -1.0385932922, -0.7111034393]]
    p = lk.Projection(rank=2, kind="gaussian", seed=0).factor("layer", "in", 3).numpy()
    r = lk.Projection(rank=1, kind="rademacher", seed=0).factor("layer", "in", 8).numpy()
    np.testing.assert_allclose(p, known, rtol=1e-6)
    np.testing.assert_array_equal(r, [[1, -1, -1, 1, -1, -1, 1, 1]])


def test_bad_settings():
    with pytest.raises(ValueError, match="kind is 'pca2'"):
        lk.Projection(kind="pca2")
    with pytest.raises(ValueError, match="rank is 0"):
        lk.Projection(rank=0)
