"""Rows in every format: what is read back, scored and kept, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree, write

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.ops import FORMATS
from logra_kernels.store import GradientStore, durable, merge, quantize

SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
WIDE = {"first": (9, 11), "h.0.mlp": (8, 6)}  # 147 numbers: two blocks and an odd end


@pytest.fixture(params=FORMATS)
def name(request):
    return request.param


def wide_store(path, name, count=21, **options):
    rows = rows_of(count, dim=147)
    with GradientStore.create(path, WIDE, name, rows_per_shard=8, **options) as store:
        store.append(rows, ids_of(count))
    return GradientStore.open(path), rows


def decoded(rows, name, widths=(99, 48), **options):
    """What the format keeps of the rows, every layer by itself."""
    form = lk.RowFormat.of(name, **options)
    return torch.cat([lk.dequantize_rows(lk.quantize_rows(part, form)) for part in rows.split(widths, dim=1)], dim=1)


def equal(found, kept, name):
    """To the bit, save the mean that is a sign's scale."""
    return torch.allclose(found, kept, rtol=1e-6, atol=0) if name == "sign" else torch.equal(found, kept)


def test_rows_come_back_as_the_format_keeps_them(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    kept = decoded(rows, name)
    assert store.dtype == name
    assert equal(store.read(3, 19), kept[3:19], name)
    blocks = list(store.blocks(max_bytes=1500))
    assert len(blocks) > 3
    assert all(rows.dtype == store.manifest.torch_dtype for _, rows in blocks)
    assert equal(torch.cat([rows for _, rows in blocks]).float(), kept, name)
    stored = torch.cat([lk.dequantize_rows(rows) for _, rows in store.encoded_blocks()])
    assert stored.shape[1] == (147 if name not in SCALED else 128 + 48)
    assert equal(torch.cat([stored[:, :99], stored[:, -48:]], dim=1), kept, name)


def test_scores_and_topk_are_those_of_the_decoded_rows(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    queries, scale = rows_of(5, seed=1, dim=147), torch.rand(21) + 0.5
    exact = queries.double() @ decoded(rows, name).double().T * scale
    finest = {"query_format": "fp32"} if name in SCALED else {}
    torch.testing.assert_close(store.score(queries, scale, **finest).double(), exact, rtol=1e-5, atol=1e-5)
    values, index = store.topk(queries, 4, scale, max_bytes=500, **finest)
    best = exact.topk(4)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(values.double(), best.values, rtol=1e-5, atol=1e-5)
    for found in (store.score(queries, scale), store.topk(queries, 4, scale, max_bytes=500)[0]):
        torch.testing.assert_close(found.double(), exact if found.shape[1] > 4 else best.values, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("name", SCALED)
def test_queries_of_half_precision_are_taken_as_they_are(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    queries = rows_of(12, seed=1, dim=147).bfloat16()
    exact = queries.double() @ decoded(rows, name).double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(store.topk(queries, 1)[0].double(), exact.amax(1, keepdim=True), rtol=1e-3, atol=2e-3)


def test_equal_rows_make_equal_bytes_however_they_are_appended(tmp_path, name):
    whole = write(tmp_path / "whole", 20, name)
    with GradientStore.create(tmp_path / "parts", LAYERS, name, rows_per_shard=8) as store:
        store.append(*part_of(20, 0, 5))
        store.flush()
    for start, stop in ((5, 6), (6, 15), (15, 20)):  # each opens a short tail and writes it again
        with GradientStore.open(tmp_path / "parts", mode="append") as store:
            store.append(*part_of(20, start, stop))
    assert tree(tmp_path / "parts") == tree(whole)


@pytest.mark.parametrize("options", [{"block": 64}, {"scale": "fp16"}, {"block": 1024, "scale": "fp16"}])
def test_the_manifest_names_block_and_scale(tmp_path, options):
    store, rows = wide_store(tmp_path / "s", "int8", **options)
    assert store.format == lk.RowFormat.of("int8", **options)
    assert torch.equal(store.read(0, 21), decoded(rows, "int8", **options))
    with safe_open(tmp_path / "s" / store.manifest.shards[0].names[0], "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
            "rows": [8, store.manifest.width],
            "scales": [8, store.format.scale_width(store.manifest.width)],
        }


def test_bytes_on_disk_are_those_of_the_format(tmp_path, name):
    store, _ = wide_store(tmp_path / "s", name)
    form, width = store.format, 128 + 48 if name in SCALED else 147
    for shard in store.manifest.shards:
        assert 0 <= shard.rows.nbytes - (shard.stop - shard.start) * form.row_bytes(width) < 512


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_id(tmp_path, name, bad):
    rows = rows_of(6)
    rows[4, 9] = bad
    with GradientStore.create(tmp_path / "s", LAYERS, name) as store:
        with pytest.raises(StoreError, match=r"1 rows hold NaN or Inf: ids 'row-4', layers h\.0\.mlp"):
            store.append(rows, ids_of(6), columns_of(6))
        store.append(rows[:4], ids_of(4))
    assert len(store) == 4


def test_what_fp16_cannot_hold_is_refused(tmp_path):
    rows = rows_of(3)
    rows[1] *= 1e8
    half = GradientStore.create(tmp_path / "a", LAYERS, "fp16")
    with half, pytest.raises(StoreError, match="too large for fp16: ids 'row-1'"):
        half.append(rows, ids_of(3))
    with GradientStore.create(tmp_path / "b", LAYERS, "int8", scale="fp16") as store:
        with pytest.raises(StoreError, match="too large for int8, fp16 scales of 128 numbers: ids 'row-1'"):
            store.append(rows, ids_of(3))
        with pytest.raises(StoreError, match=r"too small for int8.*ids 'row-1'.*use fp32 scales"):
            store.append(rows * torch.tensor([[1.0], [1e-14], [0.0]]), ids_of(3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int5", {}, "format 'int5' is not one of fp32"),
        ("int4", {"block": 48}, "block is 48; it must be a power of two from 32"),
        ("int4", {"block": 16}, "block is 16"),
        ("bf16", {"block": 64}, "format bf16 has no scales"),
        ("int4", {"scale": "bf16"}, "scale is 'bf16'"),
    ],
)
def test_formats_that_cannot_be(tmp_path, name, options, message):
    with pytest.raises(StoreError, match=message):
        GradientStore.create(tmp_path / "s", LAYERS, name, **options)
    assert not GradientStore.exists(tmp_path / "s")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_store_of_version_1_is_read_and_continued(tmp_path, name):
    path = write(tmp_path / "s", 12, name)
    made_by_this_version = tree(path)
    text = (path / "manifest.json").read_text().replace('"version": 2', '"version": 1')
    text = text.replace(json.loads(text)["checksum"], durable.ZEROS.decode())
    (path / "manifest.json").write_bytes(durable.seal(text.encode(), text.index(durable.ZEROS.decode()))[0])
    old = GradientStore.open(path)
    assert torch.equal(old.read(0, 12), decoded(rows_of(12), name, [6, 16]))
    with GradientStore.open(path, mode="append") as store:
        store.append(*part_of(12, 0, 12), skip_committed=True)
        assert old.content_hash == store.content_hash
    assert made_by_this_version.keys() == tree(path).keys()


def test_a_damaged_scale_is_found(tmp_path):
    store, _ = wide_store(tmp_path / "s", "int4")
    path = tmp_path / "s" / store.manifest.shards[0].names[0]
    data = bytearray(path.read_bytes())
    data[-8 * 88 - 3] ^= 16  # before the 8 rows of 88 bytes lie the scales
    path.write_bytes(data)
    with pytest.raises(StoreError, match="checksum does not fit"):
        GradientStore.open(tmp_path / "s").read(0, 1)


def test_queries_that_are_rounded_too(tmp_path):
    store = lk.GradientStore.open(write(tmp_path / "s", 40, "int8"))
    queries, scale = rows_of(3, seed=1), torch.rand(40)
    apart = [torch.nn.functional.pad(x[:, :6], (0, 122)) for x in (queries, rows_of(40))]  # a block for each layer
    wide, rows = (torch.cat([first, x[:, 6:]], dim=1) for first, x in zip(apart, (queries, rows_of(40)), strict=True))
    expected = lk.score_block(wide, lk.quantize_rows(rows, "int8"), query_format="int8") * scale
    torch.testing.assert_close(store.score(queries, scale, query_format="int8"), expected)
    values, index = store.topk(queries, 5, scale, query_format="int8")
    torch.testing.assert_close(values, expected.topk(5).values)
    assert torch.equal(index, expected.topk(5).indices)
    with pytest.raises(lk.StoreError, match="'int8' does not go with rows kept as fp32"):
        lk.GradientStore.open(write(tmp_path / "plain", 5)).score(queries, query_format="int8")
    with pytest.raises(lk.StoreError, match="'int4' does not go with"):
        store.topk(queries, 5, query_format="int4")


LAYERS_OF_MANY_SIZES = {"loud": (5, 7), "faint": (3, 9), "whole": (16, 8), "tiny": (1, 2), "last": (6, 10)}
SIZES = [35, 27, 128, 2, 60]


def unlike(count=40):
    """Rows whose layers differ by orders of magnitude."""
    scales = torch.tensor([1e3, 1e-3, 1.0, 1e-6, 30.0]).repeat_interleave(torch.tensor(SIZES))
    return rows_of(count, dim=252) * scales


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("block", [32, 128, 256])
def test_no_layer_feels_its_neighbours(tmp_path, name, block, monkeypatch):
    rows = unlike()
    with GradientStore.create(tmp_path / "s", LAYERS_OF_MANY_SIZES, name, block=block, rows_per_shard=16) as writer:
        writer.append(rows[:9], ids_of(40)[:9])
        writer.append(rows[9:], ids_of(40)[9:])
    store = GradientStore.open(tmp_path / "s")
    kept = decoded(rows, name, SIZES, block=block)
    assert equal(store.read(0, 40), kept, name)
    assert torch.equal(store.as_stored(rows), store.read(0, 40))
    queries, scale = rows_of(3, seed=1, dim=252) / rows.abs().mean(0), torch.rand(40)
    exact = queries.double() @ kept.double().T * scale
    size = 1e-4 * exact.abs().max().item()
    torch.testing.assert_close(store.score(queries, scale).double(), exact, rtol=1e-4, atol=size)
    values, _ = store.topk(queries, 5, scale, query_format="fp32")
    torch.testing.assert_close(values.double(), exact.topk(5).values, rtol=1e-4, atol=size)
    monkeypatch.setattr("logra_kernels.store.writing.append.checks_itself", lambda *args: False)  # as on a device
    with GradientStore.create(tmp_path / "t", LAYERS_OF_MANY_SIZES, name, block=block, rows_per_shard=16) as writer:
        writer.append(rows, ids_of(40))
    assert tree(tmp_path / "t") == tree(tmp_path / "s")


@pytest.mark.parametrize("name", ["int8", "sign"])
def test_a_store_of_layers_side_by_side_is_read_and_continued(tmp_path, name, monkeypatch):
    """As versions 1 to 3 wrote them: blocks run on from a layer to the next."""
    rows = unlike()
    with monkeypatch.context() as patch:
        patch.setattr("logra_kernels.store.writing.create.stored_width", lambda widths, form: sum(widths))
        with GradientStore.create(tmp_path / "old", LAYERS_OF_MANY_SIZES, name, rows_per_shard=16) as writer:
            writer.append(rows[:20], ids_of(40)[:20])
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["version"] == 2
    with GradientStore.open(tmp_path / "old", mode="append") as writer:
        writer.append(rows[20:], ids_of(40)[20:])
    store = GradientStore.open(tmp_path / "old")
    kept = lk.dequantize_rows(lk.quantize_rows(rows, name))
    assert torch.equal(store.read(0, 40), kept)
    queries = rows_of(3, seed=1, dim=252)
    exact = queries.double() @ kept.double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    with GradientStore.create(tmp_path / "new", LAYERS_OF_MANY_SIZES, name) as writer:
        writer.append(rows[:3], ["a", "b", "c"])
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["version"] == 4
    with pytest.raises(StoreError, match="layers apart"):
        merge([tmp_path / "old", tmp_path / "new"], tmp_path / "both")
    assert torch.equal(quantize(tmp_path / "old", tmp_path / "again", "fp32").read(0, 40), kept)


def test_layers_that_fill_their_blocks_lie_side_by_side(tmp_path):
    with GradientStore.create(tmp_path / "s", {"a": (16, 8), "b": (16, 16), "c": (3, 3)}, "int8") as writer:
        writer.append(rows_of(3, dim=393), ids_of(3))
    assert not GradientStore.open(tmp_path / "s").manifest.apart
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["version"] == 2


def test_layers_so_narrow_that_bf16_takes_less(tmp_path):
    with pytest.warns(UserWarning, match=r"take 286 bytes, more than the 108 of bf16.*use bf16, or smaller blocks"):
        GradientStore.create(tmp_path / "s", {str(i): (3, 6) for i in range(3)}, "int8").close()
