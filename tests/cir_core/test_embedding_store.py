"""Write, commit, read; half-written, mixed and damaged stores; counts that do not add up."""

import itertools
import json
import pickle
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core import files
from cir_core.embedding_store import (
    EmbeddingStore,
    EmbeddingWriter,
    Manifest,
    PartInfo,
    StoreSpec,
    listing_digest,
    unique,
)
from cir_core.schema import CirError, Reject

DIM = 8
SPEC = StoreSpec("ViT-Tiny", "ours", "w" * 8, "", "c", "t", "center_crop-64-bicubic", DIM, "float32", "input", "fp32")


def unit(num_rows, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((num_rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def ids_of(index, num_rows):
    return [f"p{index}-{row}" for row in range(num_rows)]


def rejects_of(count):
    return [Reject("s.tar", f"k{number}", "truncated", "é") for number in range(count)]


def write(uri, rows=(5, 0, 7), rejects=(1, 2, 0), spec=SPEC, row_group_rows=1000, **commit):
    writer = EmbeddingWriter(uri, spec, row_group_rows=row_group_rows)
    for index, (num_rows, num_rejects) in enumerate(zip(rows, rejects, strict=True)):
        writer.write_part(
            index, ids_of(index, num_rows), unit(num_rows, index),
            columns={"caption": [f"c{row}" if row else None for row in range(num_rows)]},
            caption_embeddings=unit(num_rows, 100 + index), rejects=rejects_of(num_rejects),
        )  # fmt: skip
    writer.commit(rows_in=sum(rows) + sum(rejects), **commit)
    return EmbeddingStore.open(uri)


@pytest.fixture(params=["local", "file", "memory"])
def uri(request, tmp_path):
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/store"
    return str(tmp_path / "store") if request.param == "local" else (tmp_path / "a store").as_uri()


def test_round_trip(uri):
    store = write(uri)
    everything = np.concatenate([unit(5, 0), unit(7, 2)])
    captions = np.concatenate([unit(5, 100), unit(7, 102)])
    ids = [*ids_of(0, 5), *ids_of(2, 7)]
    assert (store.num_rows, store.manifest.num_rejects, store.identity) == (12, 3, SPEC.identity)
    assert store.read_ids() == ids
    for block_rows in (1, 3, 100):
        blocks = list(store.iter_blocks(block_rows, columns=("caption", "caption_embedding")))
        assert [block.offset for block in blocks] == list(np.cumsum([0] + [len(b.ids) for b in blocks])[:-1])
        assert max(len(block.ids) for block in blocks) <= block_rows
        assert [one for block in blocks for one in block.ids] == ids
        assert np.array_equal(np.concatenate([block.embeddings for block in blocks]), everything)
        assert np.array_equal(np.concatenate([block.columns["caption_embedding"] for block in blocks]), captions)
        texts = [text for block in blocks for text in block.columns["caption"]]
        assert texts == [None, *(f"c{n}" for n in range(1, 5)), None, *(f"c{n}" for n in range(1, 7))]
    assert [(block.offset, len(block.ids)) for block in store.iter_blocks(parts=[2])] == [(5, 7)]
    assert list(store.iter_blocks(parts=[1])) == []
    chosen = [11, 0, 5, 0]
    assert np.array_equal(store.take([ids[row] for row in chosen]), everything[chosen])
    assert store.take([]).shape == (0, DIM)
    assert np.array_equal(store.take([ids[11], ids[3], ids[0], ids[3]]), everything[[11, 3, 0, 3]])
    with pytest.raises(CirError, match="1 ids are not in the store, such as 'stranger'"):
        store.take([ids[11], "stranger"])
    assert [(offset, found.to_pylist()) for offset, found in store.iter_ids([2])] == [(5, ids[5:])]
    rows = np.array([[11, 0], [5, 0]])
    assert store.ids_at(rows).tolist() == [[ids[row] for row in pair] for pair in rows]
    assert store.verify() == []


def test_blocks_are_not_copied(tmp_path):
    block = next(write(str(tmp_path)).iter_blocks())
    assert block.embeddings.dtype == np.float32
    assert not block.embeddings.flags.writeable
    assert not block.embeddings.flags.owndata


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=5),
    group_rows=st.integers(1, 5),
    block_rows=st.integers(1, 6),
)
def test_any_partition_holds_the_same_rows(sizes, group_rows, block_rows, tmp_path_factory):
    rows, rejects = zip(*sizes, strict=True)
    store = write(str(tmp_path_factory.mktemp("store")), rows, rejects, row_group_rows=group_rows)
    everything = np.concatenate([unit(count, index) for index, count in enumerate(rows)])
    ids = [one for index, count in enumerate(rows) for one in ids_of(index, count)]
    read = np.empty_like(everything)
    for block in store.iter_blocks(block_rows):
        read[block.offset : block.offset + len(block.ids)] = block.embeddings
        assert block.ids == ids[block.offset : block.offset + len(block.ids)]
    assert np.array_equal(read, everything)
    assert np.array_equal(store.take(ids[::-2]), everything[::-2])
    assert store.ids_at(np.arange(len(ids))[::-1]).tolist() == ids[::-1]
    assert store.verify() == []
    start = 0
    for index, count in enumerate(rows):
        for first, stop in itertools.combinations(range(count + 1), 2):
            block = store.read_rows(index, first, stop, columns=["caption"])
            assert block.offset == start + first
            assert block.ids == ids_of(index, count)[first:stop]
            assert np.array_equal(block.embeddings, unit(count, index)[first:stop])
            assert block.columns["caption"] == [f"c{row}" if row else None for row in range(count)][first:stop]
        start += count


def test_float16_on_disk(tmp_path):
    store = write(str(tmp_path), spec=replace(SPEC, dtype="float16"))
    block = next(store.iter_blocks())
    assert block.embeddings.dtype == np.float16
    assert np.array_equal(block.embeddings, unit(5).astype(np.float16))
    assert store.take(["p0-1"]).dtype == np.float16


def test_files_are_plain_parquet_and_deterministic(tmp_path):
    write(str(tmp_path / "a"))
    write(str(tmp_path / "b"))
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    parts = ds.dataset(sorted(map(str, (tmp_path / "a").glob("part-*.parquet"))))
    assert parts.count_rows() == 12
    assert parts.schema.names == ["id", "embedding", "caption_embedding", "caption"]
    assert parts.to_table(filter=ds.field("id") == "p2-3")["embedding"].to_pylist()[0] == unit(7, 2)[3].tolist()
    rejects = ds.dataset(str(tmp_path / "a" / "rejects")).to_table().to_pylist()
    assert rejects == [asdict(reject) for reject in [*rejects_of(1), *rejects_of(2)]]


def test_a_half_written_store_does_not_open(uri):
    with pytest.raises(CirError, match="does not exist"):
        EmbeddingStore.open(uri)
    writer = EmbeddingWriter(uri, SPEC)
    writer.write_part(0, ids_of(0, 3), unit(3))
    with pytest.raises(CirError, match="not committed"):
        EmbeddingStore.open(uri)
    writer.commit(rows_in=3)
    assert EmbeddingStore.open(uri).num_rows == 3


def test_a_second_run_finds_finished_parts(uri):
    first = EmbeddingWriter(uri, SPEC)
    assert first.finished_parts() == {}
    info = first.write_part(1, ids_of(1, 3), unit(3), rejects=rejects_of(2))
    assert pickle.loads(pickle.dumps(info)) == info  # noqa: S301 - it travels between Ray workers
    second = EmbeddingWriter(uri, SPEC)
    assert second.finished_parts() == {1: info}
    with pytest.raises(CirError, match=r"parts \[0\] are missing"):
        second.commit(rows_in=5)
    second.write_part(0, ids_of(0, 4), unit(4))
    manifest = second.commit(rows_in=9)
    assert [part.index for part in manifest.parts] == [0, 1]
    third = EmbeddingWriter(uri, SPEC)
    assert third.committed
    assert third.commit(rows_in=9) == manifest
    with pytest.raises(CirError, match="is committed"):
        third.write_part(2, ["x"], unit(1))


def test_a_marker_without_its_part_does_not_count(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    info = writer.write_part(0, ids_of(0, 3), unit(3))
    (tmp_path / "part-00000.parquet").unlink()
    assert writer.finished_parts() == {}
    with pytest.raises(CirError, match=r"parts \[0\] are missing"):
        writer.commit(rows_in=3, parts=[info])
    assert writer.write_part(0, ids_of(0, 3), unit(3)) == info
    assert writer.commit(rows_in=3, parts=[info]).parts == (info,)


def test_another_identity_is_refused(uri):
    other = replace(SPEC, model="ViT-B-32", dim=16)
    EmbeddingWriter(uri, SPEC).write_part(0, ids_of(0, 3), unit(3))
    with pytest.raises(CirError, match="model: 'ViT-Tiny' there, 'ViT-B-32' here; dim: 8 there, 16 here"):
        EmbeddingWriter(uri, other)
    EmbeddingWriter(uri, SPEC).commit(rows_in=3)
    with pytest.raises(CirError, match="another identity"):
        EmbeddingWriter(uri, other)


def test_a_store_begun_in_one_precision_does_not_go_on_in_another(uri):
    EmbeddingWriter(uri, SPEC).write_part(0, ids_of(0, 3), unit(3))
    with pytest.raises(CirError, match=r"\(precision: 'fp32' there, 'bf16' here\); choose another output folder, or"):
        EmbeddingWriter(uri, replace(SPEC, precision="bf16"))
    begun = {name: value for name, value in asdict(SPEC).items() if name != "precision"}
    files.write_json(files.join(uri, "_progress", "spec.json"), begun)  # as before there was the field
    with pytest.raises(CirError, match=r"spec\.json: begun by older code, which does not say its precision"):
        EmbeddingWriter(uri, SPEC)


def test_parts_of_two_identities_never_mix(tmp_path):
    first = EmbeddingWriter(str(tmp_path), SPEC)
    first.write_part(0, ids_of(0, 3), unit(3))
    (tmp_path / "_progress" / "spec.json").unlink()  # two drivers that started in the same moment
    second = EmbeddingWriter(str(tmp_path), replace(SPEC, weights="other"))
    second.write_part(1, ids_of(1, 3), unit(3))
    for writer in (first, second):
        with pytest.raises(CirError, match="a part of another identity"):
            writer.commit(rows_in=6)


def test_identity_covers_every_field():
    changed = [replace(SPEC, **{name: "x"}) for name in asdict(SPEC) if name not in ("dim", "dtype")]
    changed += [replace(SPEC, dim=9), replace(SPEC, dtype="float16")]
    assert len({SPEC.identity, *(spec.identity for spec in changed)}) == 12
    assert StoreSpec(**json.loads(json.dumps(asdict(SPEC)))).identity == SPEC.identity
    with pytest.raises(CirError, match="dtype"):
        replace(SPEC, dtype="bfloat16")
    with pytest.raises(CirError, match="dim"):
        replace(SPEC, dim=0)


def test_listing_digest():
    listing = [("s3://b/0.tar", 10, 1), ("s3://b/1.tar", 11, 1)]
    assert listing_digest(listing) == listing_digest([("s3://k:secret@b/0.tar", 10, 1), listing[1]])
    changed = [("s3://b/1.tar", 12, 1), ("s3://b/1.tar", 11, 2), ("s3://c/1.tar", 11, 1)]
    others = [listing[::-1], listing[:1], *([listing[0], other] for other in changed), []]
    assert len({listing_digest(one) for one in [listing, *others]}) == 7


def bad_row(value):
    vectors = unit(3)
    vectors[1, 2] = value
    return vectors


@pytest.mark.parametrize(
    ("ids", "vectors", "options", "message"),
    [
        (["a", "b", "a"], unit(3), {}, "'a' occurs twice"),
        (["a", "b", ""], unit(3), {}, "not empty"),
        (["a", "b", 3], unit(3), {}, "must be a string"),
        (["a", "b"], unit(3), {}, r"float32\[2, 8\], found float32\[3, 8\]"),
        (["a", "b", "c"], unit(3, dim=9), {}, r"found float32\[3, 9\]"),
        (["a", "b", "c"], unit(3).astype(np.float64), {}, "found float64"),
        (["a", "b", "c"], unit(3) * 2, {}, "3 of 3 rows are not finite unit vectors"),
        (["a", "b", "c"], bad_row(np.nan), {}, "1 of 3 rows .* row 1 has norm nan"),
        (["a", "b", "c"], bad_row(np.inf), {}, "row 1 has norm inf"),
        (["a", "b", "c"], unit(3), {"caption_embeddings": unit(3) * 1.01}, "caption_embedding: 3 of 3"),
        (["a", "b", "c"], unit(3), {"columns": {"caption": ["x"]}}, "'caption' has 1 values for 3 ids"),
        (["a", "b", "c"], unit(3), {"columns": {"id": ["x"] * 3}}, "is taken"),
    ],
)
def test_bad_parts_are_refused(tmp_path, ids, vectors, options, message):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    with pytest.raises(CirError, match=message):
        writer.write_part(0, ids, vectors, **options)
    assert list(tmp_path.glob("part-*")) == []
    assert writer.finished_parts() == {}


def test_commit_counts_rows_columns_and_ids(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    parts = [
        writer.write_part(0, ["a", "b"], unit(2), rejects=rejects_of(1)),
        writer.write_part(1, ["c", "a"], unit(2)),
    ]
    with pytest.raises(CirError, match=r"6 rows in, but 4 rows out \+ 1 rejects = 5"):
        writer.commit(rows_in=6)
    with pytest.raises(CirError, match="'a' occurs in part-00000 and in part-00001"):
        writer.commit(rows_in=5)
    with pytest.raises(CirError, match="given twice"):
        writer.commit(rows_in=8, parts=[*parts, parts[0]])
    with pytest.raises(CirError, match="not as reported"):
        writer.commit(rows_in=5, parts=[replace(parts[0], sha256="0"), parts[1]])
    assert not (tmp_path / "manifest.json").exists()
    assert writer.commit(rows_in=5, check_unique_ids=False).num_rows == 4

    other = EmbeddingWriter(str(tmp_path / "other"), SPEC)
    other.write_part(0, ["a"], unit(1), columns={"caption": ["x"]})
    other.write_part(1, ["b"], unit(1))
    with pytest.raises(CirError, match="part-00001 has the columns"):
        other.commit(rows_in=2)


def test_equal_hashes_of_different_ids_are_not_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(unique, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    assert write(str(tmp_path)).num_rows == 12


def test_verify_finds_damage(tmp_path):
    store = write(str(tmp_path))
    part = tmp_path / "part-00002.parquet"
    sound = part.read_bytes()
    part.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
    assert [problem.split(":")[0] for problem in store.verify()] == ["part-00002"]
    part.write_bytes(sound[:-1])
    assert "checksum" in store.verify()[0]
    with pytest.raises(CirError, match=r"unreadable part .*part-00002"):
        list(store.iter_blocks())
    part.unlink()
    assert "no such file" in store.verify()[0]
    part.write_bytes(sound)
    (tmp_path / "part-00009.parquet").write_bytes(sound)
    pq.write_table(
        pq.read_table(tmp_path / "rejects" / "part-00000.parquet").slice(1),
        tmp_path / "rejects" / "part-00000.parquet",
    )
    assert sorted(store.verify()) == [
        "part-00000: 0 rejects, manifest: 1",
        "part-00009.parquet: not in the manifest",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not the manifest"),
        ({"version": 3}, "version 3; this code reads version 4: make the store again"),
        ({"identity": "0"}, "identity does not match"),
        ({"num_rows": 11}, "not the sum"),
        ({"parts": [{}]}, "incomplete manifest"),
        ({"spec": {}}, "incomplete manifest"),
    ],
)
def test_edited_manifests_do_not_open(tmp_path, change, message):
    write(str(tmp_path))
    path = Path(tmp_path / "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CirError, match=message):
        EmbeddingStore.open(str(tmp_path))
    path.write_text("{")
    with pytest.raises(CirError, match="not a JSON file"):
        EmbeddingStore.open(str(tmp_path))


def test_wrong_requests_are_named(tmp_path):
    store = write(str(tmp_path))
    with pytest.raises(CirError, match="2 ids are not in the store, such as 'x', 'y'"):
        store.take(["p0-1", "y", "x"])
    with pytest.raises(CirError, match="no column 'uri'"):
        next(store.iter_blocks(columns=["uri"]))
    with pytest.raises(CirError, match=r"parts 0 to 2; asked for \[3\]"):
        next(store.iter_blocks(parts=[3]))
    for part, first, stop, columns in ((0, 3, 6, ()), (0, 2, 2, ()), (1, 0, 1, ()), (0, 0, 1, ("uri",))):
        with pytest.raises(CirError, match=rf"rows \[{first}, {stop}\) of part {part}"):
            store.read_rows(part, first, stop, columns)
    with pytest.raises(CirError, match="block_rows"):
        next(store.iter_blocks(0))
    with pytest.raises(CirError, match="row numbers"):
        store.ids_at(np.array([12]))


def test_manifest_json_round_trip(tmp_path):
    manifest = write(str(tmp_path)).manifest
    assert Manifest.from_json(files.read_json(str(tmp_path / "manifest.json")), "m") == manifest
    assert all(isinstance(part, PartInfo) for part in manifest.parts)


def test_an_empty_store(tmp_path):
    EmbeddingWriter(str(tmp_path), SPEC).commit(rows_in=0)
    store = EmbeddingStore.open(str(tmp_path))
    assert (store.num_rows, list(store.iter_blocks()), store.read_ids(), store.verify()) == (0, [], [], [])
