import torch
from store.samples import write

from logra_kernels.cli.main import main
from logra_kernels.store import GradientStore


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
    assert "top-40 agreement 1.000" in shown
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
    assert "rank_c is 9; it must be 1 to 8" in capsys.readouterr().err


def test_a_store_is_not_overwritten(tmp_path, capsys):
    source = str(write(tmp_path / "s", 5))
    assert main(["quantize", source, "--to", "int8", "--out", source]) == 1
    assert "holds a gradient store" in capsys.readouterr().err
