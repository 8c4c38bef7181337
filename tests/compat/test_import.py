"""Rows from other tools' files: from samples that LogIX 0.1.1 and Bergson 2.5.1 wrote, and from made ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from logra_kernels.cli.main import main
from logra_kernels.compat import import_bergson, import_logix
from logra_kernels.errors import LograError, StoreError
from logra_kernels.store import GradientStore

HERE = Path(__file__).parent
LOGIX, BERGSON = HERE / "written_by_logix", HERE / "written_by_bergson"


def test_a_log_that_logix_wrote(tmp_path):
    """Against gradients that autograd gave for each sample of that run."""
    store = import_logix(LOGIX, tmp_path / "s")
    assert store.ids == [f"d{i}" for i in range(9)]
    assert store.layers == {"0": (4, 5), "2": (3, 4)}
    torch.testing.assert_close(store.read(0, 9), torch.from_numpy(np.load(LOGIX / "expected.npy")))


def test_an_index_that_bergson_wrote(tmp_path):
    store = import_bergson(BERGSON, tmp_path / "s")
    assert store.ids == [str(i) for i in range(7)]
    assert store.layers == {"a": (4, 4), "b": (1, 6)}
    assert np.array_equal(store.read(0, 7).numpy(), np.load(BERGSON / "expected.npy"))


def write_logix(place, rank, chunk, rows, ids, dtype="float32", path=None, shapes=((2, 3), (4, 4))):
    """A chunk as LogIX lays it out: rows [n, D] of any modules, one metadata entry a row."""
    path = path or [["first", "grad"], ["h.0.mlp", "grad"]]
    data = rows.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
    size = len(data) // len(ids)
    stem = place / f"log_rank_{rank}_chunk_{chunk}"
    Path(f"{stem}.mmap").write_bytes(data)
    entries = [
        {"data_id": name, "path": path, "offset": i * size, "shape": shapes, "block_size": size, "dtype": dtype}
        for i, name in enumerate(ids)
    ]
    Path(f"{stem}_metadata.json").write_text(json.dumps(entries))


def test_logix_ranks_and_chunks_in_order_of_their_numbers(tmp_path):
    rows = torch.randn(12, 22)
    for rank, chunk, start in ((0, 10, 3), (0, 2, 0), (1, 0, 6)):
        write_logix(tmp_path, rank, chunk, rows[start : start + 3], [f"i{start + j}" for j in range(3)])
    store = import_logix(tmp_path, tmp_path / "s")
    assert store.ids == [f"i{j}" for j in range(9)]
    assert torch.equal(store.read(0, 9), rows[:9])


@pytest.mark.parametrize(("logged", "stored"), [("float16", "fp16"), ("float64", "fp32"), ("float32", "fp32")])
def test_logix_number_types_and_other_logs(tmp_path, logged, stored):
    rows = torch.randn(5, 27)
    path = [["first", "grad"], ["first", "forward"], ["h.0.mlp", "grad"]]
    write_logix(tmp_path, 0, 0, rows, list("abcde"), logged, path, [[2, 3], [5], [4, 4]])
    store = import_logix(tmp_path, tmp_path / "s")
    assert store.dtype == stored
    wanted = torch.cat([rows[:, :6], rows[:, 11:]], dim=1).to(getattr(torch, logged)).float()
    assert torch.equal(store.read(0, 5), wanted)


def write_bergson(place, rows, dtype="float32", **more):
    place.mkdir()
    (place / "gradients.bin").write_bytes(rows.contiguous().view(torch.uint8).numpy().tobytes())
    info = {"num_grads": len(rows), "grad_sizes": {"q": 16, "v": 6}, "base_dtype": dtype, **more}
    (place / "info.json").write_text(json.dumps(info))
    return place


def test_bergson_number_types_and_older_tables(tmp_path):
    rows = torch.randn(6, 22)
    store = import_bergson(write_bergson(tmp_path / "a", rows.bfloat16(), "bfloat16"), tmp_path / "s")
    assert store.dtype == "bf16"
    assert torch.equal(store.read(0, 6), rows.bfloat16().float())
    older = write_bergson(tmp_path / "b", rows, "<f4")
    table = json.loads((older / "info.json").read_text())
    del table["base_dtype"]
    (older / "info.json").write_text(json.dumps(table | {"dtype": {"formats": ["(16,)<f4", "(6,)<f4"]}}))
    store = import_bergson(older, tmp_path / "t", dtype="int8", ids=list("uvwxyz"))
    assert (store.ids, store.dtype) == (list("uvwxyz"), "int8")


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    rows = torch.randn(6, 22)
    place = write_bergson(tmp_path / "a", rows)
    monkeypatch.setattr("logra_kernels.compat.from_bergson.BLOCK_BYTES", 2 * 22 * 4)
    rows[5, 3] = torch.nan
    write_bergson(tmp_path / "bad", rows)
    with pytest.raises(StoreError, match="'5'"):
        import_bergson(tmp_path / "bad", tmp_path / "s")
    rows[5, 3] = 0
    shutil.rmtree(place)
    store = import_bergson(write_bergson(place, rows), tmp_path / "s")
    assert torch.equal(store.read(0, 6), rows)
    with pytest.raises(LograError, match="holds another store"):
        import_logix(LOGIX, tmp_path / "s")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_another_log_does_not_go_on(tmp_path, dtype):
    """Its ids are the same numbers, and its rows must not be taken for those that are there."""
    rows = torch.randn(6, 22)
    one, other = (write_bergson(tmp_path / name, torch.randn(6, 22)) for name in ("one", "other"))
    write_bergson(tmp_path / "long", torch.cat([rows, rows]))
    write_bergson(tmp_path / "a", rows)
    store = import_bergson(tmp_path / "long", tmp_path / "s", dtype=dtype)
    before = store.read(0, 12)
    for place, message in ((one, "other numbers"), (other, "other numbers"), (tmp_path / "a", "other rows")):
        with pytest.raises(LograError, match=f"holds {message} than this import brings"):
            import_bergson(place, tmp_path / "s", dtype=dtype)
    with GradientStore.open(tmp_path / "s", mode="append") as appended:
        appended.delete(["3", "7"])
    again = import_bergson(tmp_path / "long", tmp_path / "s", dtype=dtype)
    assert torch.equal(again.read(0, 10), before[[i for i in range(12) if i not in (3, 7)]])


def break_json(place):
    (place / "info.json").write_text("{")


def cut(place):
    (place / "gradients.bin").write_bytes(b"1234")


def lose(place):
    (place / "gradients.bin").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_json, "info.json is not valid JSON"),
        (cut, r"gradients.bin is 4 bytes long where info.json asks for 6 rows of 22 x 4 bytes"),
        (lose, "gradients.bin is missing"),
        (lambda place: (place / "info.json").unlink(), "is not an index written by Bergson"),
        (lambda place: (place / "info.json").write_text("[]"), "holds no table"),
        (lambda place: (place / "info.json").write_text("{}"), "says nothing usable"),
    ],
)
def test_what_bergson_did_not_write(tmp_path, harm, message):
    place = write_bergson(tmp_path / "a", torch.randn(6, 22))
    harm(place)
    with pytest.raises(LograError, match=message):
        import_bergson(place, tmp_path / "s")


def test_bergson_rows_that_cannot_be_taken(tmp_path):
    for name, more, message in (
        ("a", {"attribute_tokens": True}, "a row for every token"),
        ("b", {"base_dtype": "int32"}, "number type 'int32'"),
    ):
        with pytest.raises(LograError, match=message):
            import_bergson(write_bergson(tmp_path / name, torch.randn(2, 22), **more), tmp_path / "s")
    with pytest.raises(LograError, match="is an unfinished build"):
        import_bergson(write_bergson(tmp_path / "run.part", torch.randn(2, 22)), tmp_path / "s")
    with pytest.raises(LograError, match="has 2 rows, and 1 ids"):
        import_bergson(write_bergson(tmp_path / "c", torch.randn(2, 22)), tmp_path / "s", ids=["x"])


def test_what_logix_did_not_write(tmp_path):
    with pytest.raises(LograError, match="is not a log written by LogIX"):
        import_logix(tmp_path, tmp_path / "s")
    rows = torch.randn(2, 22)
    write_logix(tmp_path, 0, 0, rows, ["a", "b"])
    (tmp_path / "log_rank_0_chunk_0.mmap").write_bytes(b"1234")
    with pytest.raises(LograError, match="is 4 bytes long and ends before row 'a'"):
        import_logix(tmp_path, tmp_path / "s1")
    meta = tmp_path / "log_rank_0_chunk_0_metadata.json"
    entries = json.loads(meta.read_text())
    entries[1]["offset"] += 32  # as if a module's numbers were longer than the last one's
    meta.write_text(json.dumps(entries))
    with pytest.raises(LograError, match="does not hold rows of 22 x float32 one after the other"):
        import_logix(tmp_path, tmp_path / "s1")
    (tmp_path / "log_rank_0_chunk_0_metadata.json").unlink()
    with pytest.raises(LograError, match="metadata.json is missing"):
        import_logix(tmp_path, tmp_path / "s2")
    write_logix(tmp_path, 0, 0, rows, ["a", "b"])
    write_logix(tmp_path, 0, 1, rows, ["c", "d"], path=[["x", "grad"], ["y", "grad"]])
    with pytest.raises(LograError, match="'c', of other modules"):
        import_logix(tmp_path, tmp_path / "s3")
    write_logix(tmp_path, 0, 1, rows, ["c", "a"])
    with pytest.raises(StoreError, match="'a'"):
        import_logix(tmp_path, tmp_path / "s4")
    write_logix(tmp_path, 0, 0, rows, ["a", "b"], path=[["x", "forward"], ["y", "forward"]])
    with pytest.raises(LograError, match="logs no gradients"):
        import_logix(tmp_path, tmp_path / "s5")


def test_the_commands(tmp_path, capsys):
    assert main(["import", "logix", str(LOGIX), "--out", str(tmp_path / "s")]) == 0
    assert "9 rows of 32 numbers from 2 layers, fp32" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "s"), "--out", str(tmp_path / "npy")]) == 0
    assert np.load(tmp_path / "npy" / "rows.npy").shape == (9, 32)
    assert main(["import", "bergson", str(LOGIX), "--out", str(tmp_path / "t")]) == 1
    assert "is not an index written by Bergson" in capsys.readouterr().err
