"""When a run that rejects too much stops, what a progress line says, and which ids are refused early;
what Prometheus is told."""

import threading

import numpy as np
import pytest

from cir_core import files
from cir_core.embedding_store import EmbeddingWriter, PartInfo, StoreSpec
from cir_core.files import access
from cir_core.schema import CirError, Reject
from jobs import progress
from jobs.embedder import Unit
from jobs.embedding import check_shard_names
from jobs.embedding_progress import RejectLimit
from jobs.progress import Board, describe_stages, stage_shares

SPEC = StoreSpec("tiny", "own", "w", "", "c", "t", "p", 2, "float32", "input")


@pytest.fixture
def output(tmp_path):
    rejects = [Reject("s.tar", f"k{number}", "unreadable", "HTML") for number in range(3)]
    EmbeddingWriter(str(tmp_path), SPEC).write_part(0, ["a"], np.float32([[1, 0]]), rejects=rejects)
    return str(tmp_path)


def part(rows, rejects):
    return PartInfo(0, "part-00000", rows, rejects, "", "", 0, ())


def test_a_count_stops_at_once_and_says_what_was_seen(output):
    limit = RejectLimit(output, 2, 1.0)
    limit.count(part(1, 2), {"unreadable": 2})
    limit.check()
    limit.count(part(0, 1), {"truncated": 1})
    with pytest.raises(CirError) as caught:
        limit.check()
    text = str(caught.value)
    assert "3 of 4 images cannot be used, more than the 2 allowed" in text
    assert "unreadable: 2, truncated: 1" in text
    assert "s.tar k0 (unreadable HTML)" in text


def test_a_share_is_judged_from_a_thousand_rows_on_and_at_the_end(output):
    limit = RejectLimit(output, None, 0.25)
    limit.count(part(400, 599))
    limit.check()
    limit.count(part(1, 0))
    with pytest.raises(CirError, match=r"599 of 1000 .*share of 0\.25"):
        limit.check()
    limit.judge([part(2, 1), part(1, 0)])
    with pytest.raises(CirError, match="2 of 5 images"):
        limit.judge([part(3, 2)])


def test_no_limit(output):
    limit = RejectLimit(output, None, 1.0)
    limit.count(part(0, 5000))
    limit.check()
    limit.judge([part(0, 5000)])


def test_a_unit_that_is_done_again_counts_once():
    board = Board.__ray_metadata__.modified_class()
    board.tell("a", {"rows": 500.0, "rejects": 1.0})
    board.tell("b", {"rows": 7.0})
    board.tell("a", {"stage_read": 1.0})  # the second attempt has only read so far
    assert {name: value for name, value in board.totals().items() if value} == {"rows": 7.0, "stage_read": 1.0}
    board.tell("a", {"stage_read": 2.0, "rows": 500.0})
    assert board.totals()["rows"] == 507.0


def test_the_stage_that_takes_longest_is_named():
    totals = {"stage_read": 1.0, "stage_decode": 6.0, "stage_encode": 2.5, "stage_write": 0.5, "rows": 9.0}
    assert stage_shares(totals) == {"read": 0.1, "decode": 0.6, "encode": 0.25, "write": 0.05}
    assert describe_stages(stage_shares(totals)) == (
        "read 10 %, decode 60 %, encode 25 %, write 5 %: decode is the bottleneck"
    )
    assert describe_stages(stage_shares({})) == ""


def test_shards_of_one_name_cannot_name_ids():
    check_shard_names([Unit(0, "s3://b/train/00000.tar"), Unit(1, "s3://b/train/00001.tar")])
    with pytest.raises(CirError, match="2 shards are named '00000'"):
        check_shard_names([Unit(0, "s3://b/train/00000.tar"), Unit(1, "s3://b/val/00000.tar")])


def test_a_request_to_a_store_that_is_made_again_is_told_to_who_watches(monkeypatch):
    told, answers = [], iter([OSError("HTTP status 503"), OSError("reset"), "there"])

    def request():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(access, "_watchers", [])
    files.on_retry(lambda: told.append("again"))
    assert access.attempt("s3://bucket/key", request) == "there"
    assert told == ["again", "again"]


def test_a_gauge_is_set_again_and_again_while_its_block_runs(monkeypatch):
    monkeypatch.setattr(progress, "_GAUGE_EVERY_S", 0.01)
    told, enough = [], threading.Event()

    def tell(value, tags):
        told.append((tags["state"], value))
        if len(told) >= 6:
            enough.set()

    with progress.UnitGauge("test", "steps") as steps:
        monkeypatch.setattr(steps._gauge, "set", tell)
        steps.show(2, 5)
        assert enough.wait(60)
    num_told = len(told)
    assert set(told) == {("done", 2), ("left", 3)}
    assert not steps._thread.is_alive()
    assert len(told) == num_told
