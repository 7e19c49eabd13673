"""Parts written batch by batch, ids that occur twice, the commands, and other programs that open a store."""

import subprocess
import sys
from unittest import mock

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core import files
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec
from cir_core.embedding_store.__main__ import main
from cir_core.schema import CirError, Reject
from cir_core.shards import REJECT_REASONS

DIM = 4
SPEC = StoreSpec("tiny", "own", "w", "", "c", "t", "p", DIM, "float32", "input", "fp32")


def unit(num_rows, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((num_rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=6), group_rows=st.integers(1, 30))
def test_the_batches_do_not_show(cuts, group_rows, tmp_path_factory):
    ids, vectors, texts = [f"k{n}" for n in range(23)], unit(23), [str(n) for n in range(23)]
    folder = tmp_path_factory.mktemp("store")
    writers = [EmbeddingWriter(str(folder / name), SPEC, row_group_rows=group_rows) for name in "ab"]
    whole = writers[0].write_part(0, ids, vectors, columns={"caption": texts}, rejects=[Reject("s", "k", "empty")])
    with writers[1].part(0, columns=["caption"]) as part:
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 23], strict=True):
            part.add(ids[start:stop], vectors[start:stop], columns={"caption": texts[start:stop]})
        part.reject([Reject("s", "k", "empty")])
    assert part.info == whole
    assert writers[1].finished_part(0) == whole


def test_a_part_that_fails_leaves_nothing(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    with pytest.raises(CirError, match="the id 'a' occurs twice"), writer.part(0) as part:  # noqa: PT012
        part.add(["a"], unit(1))
        part.add(["b", "a"], unit(2))
    assert writer.finished_part(0) is None
    assert [file.name for file in files.list_files(str(tmp_path))] == ["_progress/spec.json"]
    with pytest.raises(CirError, match="given embedding, caption, expected embedding"), writer.part(0) as part:
        part.add(["a"], unit(1), columns={"caption": ["x"]})


def test_a_late_writer_is_refused(tmp_path):
    late = EmbeddingWriter(str(tmp_path), SPEC)
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    writer.write_part(0, ["a"], unit(1))
    manifest = writer.commit(rows_in=1)
    with pytest.raises(CirError, match="is committed"):
        late.write_part(0, ["b"], unit(1))
    assert late.commit(rows_in=1) == manifest  # a second driver of the same run


def test_a_part_under_way_when_another_driver_commits_is_not_published(tmp_path):
    late, writer = (EmbeddingWriter(str(tmp_path), SPEC) for _ in range(2))
    writer.write_part(0, ["a", "b"], unit(2))
    with pytest.raises(CirError, match="is committed"), late.part(0) as part:  # noqa: PT012
        part.add(["b"], unit(1))
        writer.commit(rows_in=2)
    store = EmbeddingStore.open(str(tmp_path))
    assert store.read_ids() == ["a", "b"]
    assert store.verify() == []


def test_of_two_commits_one_wins(tmp_path):
    first, second = (EmbeddingWriter(str(tmp_path), SPEC) for _ in range(2))
    first.write_part(0, ["a"], unit(1))
    first.commit(rows_in=1)
    second.committed = False  # it asked before the first committed
    files.write_bytes(str(tmp_path / "_progress" / "part-00000.json"), b"{}")  # whatever it has seen since
    with pytest.raises((CirError, KeyError)):
        second.commit(rows_in=1)
    assert EmbeddingStore.open(str(tmp_path)).read_ids() == ["a"]


def fill(writer):
    """Write ids 0 to 9, four to a part, with each part's last id again in the next one."""
    for index, numbers in enumerate([(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 3, 9)]):
        rows = [str(number) for number in numbers]
        writer.write_part(
            index, rows, unit(10)[list(numbers)], columns={"caption": [f"c{row}" for row in rows]},
            caption_embeddings=unit(10, 1)[list(numbers)], rejects=[Reject("s", f"r{index}", "empty")],
        )  # fmt: skip


def test_later_rows_of_an_id_become_rejects(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    fill(writer)
    kept = writer.drop_duplicates(writer.finished_parts(), {0: "a.tar", 2: "c.tar"})
    writer.commit(rows_in=16, parts=kept.values())
    store = EmbeddingStore.open(str(tmp_path))
    assert store.read_ids() == [str(number) for number in range(10)]
    assert np.array_equal(np.concatenate([block.embeddings for block in store.iter_blocks()]), unit(10))
    captions = [text for block in store.iter_blocks(columns=["caption"]) for text in block.columns["caption"]]
    assert captions == [f"c{number}" for number in range(10)]
    assert store.manifest.num_rejects == 6
    assert "duplicate_id" in REJECT_REASONS
    assert [[(one.shard, one.key, one.reason) for one in part] for part in store.read_rejects()] == [
        [("s", "r0", "empty")],
        [("s", "r1", "empty"), ("part-00001", "3", "duplicate_id")],
        [("s", "r2", "empty"), ("c.tar", "6", "duplicate_id"), ("c.tar", "3", "duplicate_id")],
    ]
    assert store.verify() == []


def test_dropping_duplicates_goes_on_after_a_kill(tmp_path):
    whole, killed = (EmbeddingWriter(str(tmp_path / name), SPEC) for name in "ab")
    fill(whole)
    expected = whole.drop_duplicates(whole.finished_parts())
    fill(killed)
    parts = killed.finished_parts()
    killed.drop_duplicates({index: parts[index] for index in (0, 1)})  # the third was not reached
    assert killed.drop_duplicates(killed.finished_parts()) == expected == killed.finished_parts()


def test_a_part_is_written_without_rows_once(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    fill(writer)
    parts = writer.finished_parts()
    rows = writer.duplicates(parts.values())[2]
    written = writer.without(parts[2], rows)
    assert writer.without(parts[2], rows) == written  # by a task whose answer was lost
    assert writer.finished_parts()[2] == written
    with pytest.raises(CirError, match="part-00002 was changed meanwhile"):
        writer.without(parts[2], rows[:1])
    with pytest.raises(CirError, match="part-00001 does not hold the ids to drop"):
        writer.without(parts[1], [("stranger", 0)])
    assert writer.finished_parts()[1] == parts[1]


def test_a_kill_before_the_rejects_are_written_makes_the_part_unfinished(tmp_path, monkeypatch):
    writer = EmbeddingWriter(str(tmp_path), SPEC)
    fill(writer)
    parts = writer.finished_parts()
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "_write_rejects", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.drop_duplicates(parts)
    left = writer.finished_parts()
    assert sorted(left) == [0, 2]  # part 1 is embedded again
    assert all(left[index] == parts[index] for index in left)


@pytest.fixture
def store_uri(tmp_path):
    writer = EmbeddingWriter(str(tmp_path / "store"), SPEC)
    fill(writer)
    parts = writer.drop_duplicates(writer.finished_parts())
    writer.commit(rows_in=16, parts=parts.values())
    return str(tmp_path / "store")


def test_the_commands(store_uri, tmp_path, capsys):
    def command(*arguments):
        code = main(arguments)
        return code, *capsys.readouterr()

    code, shown, _ = command("info", store_uri)
    assert code == 0
    lines = dict((*line.split(None, 1), "")[:2] for line in shown.splitlines())
    assert (lines["rows"], lines["dim"], lines["model"], lines["precision"]) == ("10", "4", "tiny", "fp32")
    assert "rejects: duplicate_id 3" in " ".join(shown.split())
    assert command("verify", store_uri) == (0, "sound: 3 parts, 10 rows, 6 rejects\n", "")
    part = tmp_path / "store" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    code, shown, _ = command("verify", store_uri)
    assert code == 1
    assert "part-00001: checksum" in shown
    for arguments in (["info", str(tmp_path)], ["verify", "/nowhere"]):
        code, _, complaint = command(*arguments)
        assert code == 2
        assert complaint.startswith("error: ")
    refused = subprocess.run(
        [sys.executable, "-m", "cir_core.embedding_store", "check", store_uri], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "invalid choice: 'check'" in refused.stderr


def test_other_programs_open_a_store(store_uri):
    pattern = f"{store_uri}/part-*.parquet"
    found = duckdb.sql(f"SELECT id, embedding FROM read_parquet('{pattern}') WHERE caption = 'c7'").fetchall()  # noqa: S608
    assert [(one, list(vector)) for one, vector in found] == [("7", unit(10)[7].tolist())]
    frames = [pd.read_parquet(f"{store_uri}/part-{index:05d}.parquet") for index in range(3)]
    assert np.array_equal(np.stack(pd.concat(frames)["embedding"]), unit(10))
    names = [file.uri for file in files.list_files(store_uri, recursive=False) if file.name.startswith("part-")]
    assert ds.dataset(names).count_rows() == 10
