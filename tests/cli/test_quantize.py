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
    assert "22 numbers, int4, fp32 scales of 32 numbers: 15 bytes" in shown
    assert GradientStore.open(new).dtype == "int4"


def test_a_store_is_not_overwritten(tmp_path, capsys):
    source = str(write(tmp_path / "s", 5))
    assert main(["quantize", source, "--to", "int8", "--out", source]) == 1
    assert "holds a gradient store" in capsys.readouterr().err
