"""One changed byte, a cut file, a missing file: found before a number leaves the store."""

import json
import shutil

import pytest
from store.samples import LAYERS, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, durable

FILES = (
    "manifest.json",
    "rows-000000000000-000000000004.safetensors",
    "rows-000000000004-000000000006.safetensors",
    "rows-000000000000-000000000004.parquet",
    "rows-000000000004-000000000006.parquet",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "s", 6, rows_per_shard=4)


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "s")


def use_all(path):
    store = GradientStore.open(path)
    store.read(0, len(store))
    return store.ids


def assert_found(path, file, what="damaged"):
    """Reading says which file and what to do; so does appending, unless the file is one it has no need to read."""
    with pytest.raises(StoreError) as caught:
        use_all(path)
    text = str(caught.value)
    assert file in text
    assert "\n" not in text
    assert "; " in text
    assert what in text


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_found(copy, file):
    good = (copy / file).read_bytes()
    for place in range(0, len(good), 1 if file == "manifest.json" else 3):
        (copy / file).write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        assert_found(copy, file, "")
    (copy / file).write_bytes(good)
    assert len(use_all(copy)) == 6


@pytest.mark.parametrize("file", FILES)
def test_a_cut_or_lengthened_file_is_found(copy, file):
    good = (copy / file).read_bytes()
    for data in (b"", good[:1], good[:100], good[: len(good) // 2], good[:-1], good + b"\0"):
        (copy / file).write_bytes(data)
        assert_found(copy, file)
        with pytest.raises(StoreError, match=file):
            GradientStore.open(copy, mode="append")


@pytest.mark.parametrize("file", FILES[1:])
def test_a_missing_file_is_found(copy, file):
    (copy / file).unlink()
    assert_found(copy, file, "missing")
    with pytest.raises(StoreError, match=f"{file} is missing"):
        GradientStore.open(copy, mode="append")


@pytest.mark.parametrize("file", FILES[2:])
def test_a_writer_does_not_build_on_a_damaged_tail_or_id_table(copy, file):
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    before = tree(copy)
    with pytest.raises(StoreError, match=f"{file} is damaged"):
        GradientStore.open(copy, mode="append")
    assert tree(copy) == before


def test_no_block_of_a_damaged_shard_leaves(copy):
    data = bytearray((copy / FILES[1]).read_bytes())
    data[-1] ^= 1  # in the last row; the first block ends before it
    (copy / FILES[1]).write_bytes(data)
    store = GradientStore.open(copy)
    with pytest.raises(StoreError, match="damaged"):
        next(store.blocks(max_bytes=1))
    with pytest.raises(StoreError, match="damaged"):
        store.read(0, 1)
    assert store.read(4, 6).shape[0] == 2


def test_two_shards_exchanged(tmp_path):
    path = write(tmp_path / "s", 8, rows_per_shard=4)
    a, b = (path / f"rows-{start:012d}-{start + 4:012d}.safetensors" for start in (0, 4))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    assert_found(path, a.name)


def resealed(path, change):
    """Change the manifest and give it a checksum that fits."""
    table = json.loads((path / "manifest.json").read_text())
    change(table)
    table["checksum"] = durable.ZEROS.decode()
    text = json.dumps(table, indent=1).encode()
    (path / "manifest.json").write_bytes(durable.seal(text, text.index(durable.ZEROS))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 5}, "has format version 5 and this logra_kernels reads up to 4; upgrade"),
        ({"dtype": "int3"}, "dtype 'int3', known here are fp32, bf16, fp16"),
        ({"format": "other"}, "is not the manifest of a gradient store"),
        ({"layers": [{"name": "x"}]}, "inconsistent"),
        ({"layers": []}, "the layers do not fill a row"),
        ({"dim": 23}, "the layers do not fill a row"),
    ],
)
def test_a_manifest_that_cannot_be_used(copy, change, message):
    resealed(copy, lambda table: table.update(change))
    assert_found(copy, "manifest.json", message)


def test_a_manifest_cannot_point_out_of_its_directory(copy):
    resealed(copy, lambda table: table["shards"][0]["rows"].update(file="../../x"))
    assert_found(copy, "manifest.json", "names files that are not its own")


def test_resealing_an_unchanged_manifest_is_accepted(copy):
    resealed(copy, lambda table: None)
    assert len(use_all(copy)) == 6


def test_not_a_store(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "manifest.json").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        for mode in ("read", "append"):
            with pytest.raises(StoreError, match="is not a gradient store"):
                GradientStore.open(path, mode=mode)
    with pytest.raises(StoreError, match="cannot be read"):
        GradientStore.open(tmp_path)
    assert not (tmp_path / "lock").exists()
    with pytest.raises(StoreError, match="mode='write'"):
        GradientStore.open(tmp_path, mode="write")


def test_where_a_store_cannot_be_created(copy, tmp_path):
    with pytest.raises(StoreError, match="holds a gradient store; open it with mode='append', or choose another path"):
        GradientStore.create(copy, LAYERS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        GradientStore.create(tmp_path / "file", LAYERS)
    with pytest.raises(StoreError, match="cannot be created"):
        GradientStore.create(tmp_path / "file" / "below", LAYERS)
    with pytest.raises(StoreError, match="is not empty"):
        GradientStore.create(tmp_path, LAYERS)
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match="is not empty"):  # shards without a manifest are not ours to overwrite
        GradientStore.create(copy, LAYERS)


def test_the_content_hash_is_of_the_rows(tmp_path):
    hashes = {
        GradientStore.open(write(tmp_path / f"{count}-{dtype}", count, dtype)).content_hash
        for count in (5, 6)
        for dtype in ("fp32", "bf16")
    }
    assert len(hashes) == 4
    assert GradientStore.open(write(tmp_path / "again", 5)).content_hash in hashes
