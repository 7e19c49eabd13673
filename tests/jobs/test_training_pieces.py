"""What a reader takes of the shards for a round of training, without a cluster: its rows and little more."""

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from cir_core.encoders import load_encoder
from cir_core.epoch_plan import Piece, plan_epoch
from cir_core.lora import attach_lora
from cir_core.scenes import write_pairs
from cir_core.schema import CirError
from cir_core.shards import index_shard, read_shard, read_slice, write_parquet_shard, write_tar_shard
from jobs import training_loop
from jobs.training_data import RunPlan, describe_large_groups, read_pairs

NUM, IMAGE_BYTES = 4000, 10_000


@pytest.fixture(scope="module")
def one_group(tmp_path_factory):
    """A file as pandas writes it: all rows in one group."""
    path = str(tmp_path_factory.mktemp("group") / "a.parquet")
    rows = ((f"k{n}", os.urandom(IMAGE_BYTES), "jpg", f"caption {n}") for n in range(NUM))
    write_parquet_shard(path, rows, row_group_rows=10**6)
    return path


def test_a_round_holds_its_own_rows_of_a_large_row_group(one_group):
    (part,) = index_shard(one_group).slices
    whole = list(read_slice(part))
    for first in (0, NUM // 2, NUM - 8):
        tracemalloc.start()
        samples, _ = read_pairs(Piece(part, first, first + 8), None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert samples == whole[first : first + 8]
        assert peak < 100 * IMAGE_BYTES  # beside the eight, a batch of 64 rows


def test_a_round_reads_a_large_row_group_no_further_than_its_rows(one_group):
    (part,) = index_shard(one_group).slices
    with Path("/proc/self/io").open() as counters:

        def bytes_read():
            counters.seek(0)
            return int(counters.readline().split()[1])

        before = bytes_read()
        read_pairs(Piece(part, 0, 8), None)
        assert bytes_read() - before < NUM * IMAGE_BYTES / 2


@pytest.mark.parametrize(
    ("write", "rows_now"), [(write_tar_shard, 19), (write_parquet_shard, 19), (write_parquet_shard, 21)]
)
def test_a_shard_that_was_changed_is_noticed_where_a_slice_ends(tmp_path, write, rows_now):
    path = str(tmp_path / ("a.tar" if write is write_tar_shard else "a.parquet"))
    write(path, [(f"k{n:02d}", b"image", "jpg", "c") for n in range(20)])
    (part,) = index_shard(path).slices
    assert [len(read_pairs(Piece(part, *ends), None)[0]) for ends in ((0, 20), (0, 8), (8, 20))] == [20, 8, 12]
    write(path, [(f"k{n:02d}", b"image", "jpg", "c") for n in range(rows_now)])
    with pytest.raises(CirError, match="the shard was changed since it was indexed"):
        read_pairs(Piece(part, 8, 20), None)


def test_row_groups_that_make_reading_slow_are_named(one_group, tmp_path):
    def described(path, batch):
        return describe_large_groups(plan_epoch([index_shard(path)], global_batch_size=batch, steps_per_round=2))

    assert f"{one_group} has a row group of {NUM} rows" in described(one_group, 200)
    assert "reads about 5.5 times the data" in described(one_group, 200)  # 10 rounds: 400 + 800 + ... + 4000 rows
    assert described(one_group, 2000) == ""
    usual = str(tmp_path / "usual.parquet")
    write_parquet_shard(usual, [(f"k{n}", b"image", "jpg", "c") for n in range(1000)])
    assert described(usual, 4) == ""


def test_the_gap_is_measured_on_no_more_than_it_needs(tmp_path, tiny_model_dir, monkeypatch):
    """The same pairs as ever, unreadable ones left out, without a large row group in memory."""
    (scenes,) = write_pairs(str(tmp_path), 40, shard_rows=40)
    rows = [(sample.key, sample.image, "jpg", sample.caption) for sample in read_shard(scenes)]
    rows[2] = (rows[2][0], b"<html>", "jpg", "broken")
    path = str(tmp_path / "a.parquet")
    write_parquet_shard(path, rows)
    encoder, read = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu"), []
    attach_lora(encoder.model, r=2)

    def counted(piece, anchors):
        samples, vectors = read_pairs(piece, anchors)
        read.append(len(samples))
        return samples, vectors

    monkeypatch.setattr(training_loop, "read_pairs", counted)
    settings = SimpleNamespace(plan=RunPlan((index_shard(path),), 4, seed=0, epochs=1), gap_samples=8)
    gaps = training_loop.measure_gaps(encoder, settings)
    assert read == [8, 8]
    write_parquet_shard(path, [*rows[:2], *rows[3:9]])
    settings.plan = RunPlan((index_shard(path),), 4, seed=0, epochs=1)
    assert training_loop.measure_gaps(encoder, settings) == gaps
