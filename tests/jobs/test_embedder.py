"""What an embedding actor reads: whole shards, slices, rows that the listing refused, shards that are none; and its chunks."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cir_core.embedding_store import StoreSpec
from cir_core.schema import CirError, Reject
from cir_core.shards import REJECT_REASONS, Sample, index_image_folder, write_parquet_shard, write_tar_shard
from jobs.embedder import EmbedPlan, Unit, _Counted, _Session
from jobs.embedding import find_units
from jobs.reject_limit import RejectLimit

SPEC = StoreSpec("tiny", "own", "w", "", "c", "t", "p", 2, "float32", "input", "fp32")
PICTURES = [(f"k{number}", b"x" * 10, "jpg", f"c{number}") for number in range(5)]


def session(**settings):
    plan = EmbedPlan(
        units=(), output="out", spec=SPEC, model="tiny", pretrained=None, adapter=None,
        preprocessing_mode=None, captions="text", batch_size=4, use_gpu=False, **settings,
    )  # fmt: skip
    return _Session(plan, None, None, RejectLimit("out", None, 1.0))


@pytest.fixture
def shard(tmp_path):
    write_tar_shard(str(tmp_path / "00007.tar"), PICTURES)
    return str(tmp_path / "00007.tar")


def test_ids_are_keys_or_hold_the_shard(shard):
    rows = list(session().rows(Unit(0, shard)))
    assert [session().row_id(row) for row in rows] == [f"k{number}" for number in range(5)]
    assert session(ids="shard").row_id(rows[3]) == "00007/k3"


def test_rows_that_the_listing_refused_come_first(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "b.jpg").write_bytes(b"")
    index = index_image_folder(str(tmp_path))
    unit = Unit(0, str(tmp_path), index.slices[0], rejects=index.rejects)
    assert (unit.num_rows, Unit(0, "x.tar").num_rows) == (2, None)
    rows = list(session().rows(unit))
    assert [(type(row), row.key) for row in rows] == [(Reject, "b.jpg"), (Sample, "a.jpg")]
    assert [type(row) for row in session().rows(Unit(1, str(tmp_path), rejects=index.rejects))] == [Reject]


def test_every_row_of_a_list_is_kept_or_rejected(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("uri,key\na.jpg,k0\n,k1\na.jpg,k0\nb.jpg,k3\na.jpg,k4\n")
    ((unit,), _) = find_units(str(tmp_path / "list.csv"))
    rows = list(session().rows(unit))
    assert [(row.key, getattr(row, "reason", "")) for row in rows] == [
        ("k0", ""), ("k1", "missing_uri"), ("k0", "duplicate_key"), ("k3", "missing"), ("k4", ""),
    ]  # fmt: skip
    assert unit.num_rows == len(rows)


def test_a_shard_that_is_none_stops_or_is_one_reject(tmp_path):
    page = tmp_path / "00001.tar"
    page.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(CirError, match=r"00001\.tar"):
        list(session().rows(Unit(0, str(page))))
    (only,) = session(unreadable_shards="reject").rows(Unit(0, str(page)))
    assert (only.shard, only.key, only.reason) == (str(page), "", "unreadable_shard")
    assert only.reason in REJECT_REASONS
    assert "not a tar file" in only.detail


@pytest.mark.parametrize("lists", [False, True])
def test_a_parquet_file_that_is_none_is_one_reject_wherever_it_stands(tmp_path, lists):
    (tmp_path / "a.jpg").write_bytes(b"x" * 10)
    for number in (1, 2, 4):
        uri = str(tmp_path / f"{number}.parquet")
        if lists:
            pq.write_table(pa.table({"key": [f"k{number}"], "uri": ["a.jpg"]}), uri)
        else:
            write_parquet_shard(uri, [(f"k{number}", b"x" * 10, "jpg", "c")])
    for number in (0, 3, 5):
        (tmp_path / f"{number}.parquet").write_bytes(b"<html>not found</html>")
    units, _ = find_units(str(tmp_path / "{0..5}.parquet"))
    assert [unit.number for unit in units] == list(range(6))
    rows = [row for unit in units for row in session(unreadable_shards="reject").rows(unit)]
    expected = [(Reject, ""), (Sample, "k1"), (Sample, "k2"), (Reject, ""), (Sample, "k4"), (Reject, "")]
    assert [(type(row), row.key) for row in rows] == expected
    assert rows[0].reason == "unreadable_shard"
    with pytest.raises(CirError, match=r"0\.parquet"):
        list(session().rows(units[0]))
    only, _ = find_units(str(tmp_path / "0.parquet"))
    assert [type(row) for row in session(unreadable_shards="reject").rows(only[0])] == [Reject]


def test_chunks_are_bounded_in_rows_and_bytes(monkeypatch, shard):
    good = list(session().rows(Unit(0, shard)))
    bad = [Reject("s", f"r{number}", "empty_image") for number in range(9)]
    source = _Counted(iter([good[0], bad[0], *good[1:], *bad[1:]]))
    chunks = [source.next_chunk(4) for _ in range(5)]
    assert [(len(rows), len(rejects)) for rows, rejects in chunks] == [(4, 1), (1, 4), (0, 4), (0, 0), (0, 0)]
    assert source.rows_read == 14
    monkeypatch.setattr("jobs.embedder._CHUNK_BYTES", 25)
    source = _Counted(iter(good))
    assert [len(source.next_chunk(4)[0]) for _ in range(3)] == [3, 2, 0]
