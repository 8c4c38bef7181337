from pathlib import Path

import pytest
import torch
from store.samples import tree, write

from logra_kernels.cli.main import main
from logra_kernels.store import GradientStore, quantization_loss


def test_quantize_says_what_it_costs_and_info_shows_it(tmp_path, capsys):
    source, new = str(write(tmp_path / "s", 40)), str(tmp_path / "new")
    assert main(["quantize", source, "--to", "int4", "--out", new, "--block", "32"]) == 0
    printed = capsys.readouterr().out
    assert "quantised 40 rows" in printed
    assert "int4, fp32 scales of 32 numbers" in printed
    assert "loss      against fp32: relative L2 " in printed
    assert main(["info", new]) == 0
    shown = capsys.readouterr().out
    assert "quantised       against fp32: relative L2 " in shown
    loss = quantization_loss(GradientStore.open(new))
    assert (loss["top"], loss["top_agreement"] < 1) == (4, True)
    line = (
        f"top-4 agreement {loss['top_agreement']:.3f} (k is 4 of 40 rows, a tenth but at most 100; 40 rows as queries)"
    )
    assert line in shown
    assert line in printed
    assert "22 numbers, int4, fp32 scales of 32 numbers: 32 bytes" in shown
    assert GradientStore.open(new).dtype == "int4"


def test_rows_are_kept_as_factors(tmp_path, capsys):
    source, new = str(write(tmp_path / "s", 40)), str(tmp_path / "new")
    assert main(["quantize", source, "--to", "fp32", "--rank-c", "1", "--out", new]) == 0
    printed = capsys.readouterr().out
    assert "fp32, 1 factors a layer" in printed
    assert "least energy kept 0." in printed
    before, after = GradientStore.open(source), GradientStore.open(new)
    assert (after.rank_c, after.manifest.row_bytes) == (1, 4 * (2 + 3 + 4 + 4))
    for part, (k_out, k_in) in zip(before.slices.values(), before.layers.values(), strict=True):
        whole = before.read(0, 40)[:, part].unflatten(1, (k_out, k_in)).double()
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = u[..., :1] * s[..., None, :1] @ v[..., :1, :]
        torch.testing.assert_close(after.read(0, 40)[:, part].double(), best.flatten(1), rtol=1e-3, atol=1e-4)
    assert main(["quantize", source, "--to", "fp32", "--rank-c", "9", "--out", str(tmp_path / "other")]) == 1
    assert "--rank-c 9 must be 1 to 8" in capsys.readouterr().err


def test_a_store_is_not_overwritten(tmp_path, capsys):
    source = str(write(tmp_path / "s", 5))
    other = str(write(tmp_path / "other", 5))
    for out, expected in ((source, "must be a new path, not an input's"), (other, "the output must be a new path")):
        before = tree(Path(out))
        assert main(["quantize", source, "--to", "int8", "--out", out]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert "remove" not in error
        assert tree(Path(out)) == before


@pytest.mark.parametrize(
    ("kind", "expected"), [("zzz", "must be one of"), ("fisher", "only a Python program observes")]
)
def test_a_curvature_that_cannot_whiten(tmp_path, capsys, kind, expected):
    argv = ["quantize", str(write(tmp_path / "s", 5)), "--to", "int8", "--out", str(tmp_path / "new"), "--whiten"]
    assert main([*argv, "--curvature", kind]) == 1
    assert expected in capsys.readouterr().err
