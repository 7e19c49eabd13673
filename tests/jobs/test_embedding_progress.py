"""What a progress line says, which ids are refused early, and what Prometheus is told."""

import threading

import pytest

from cir_core import files
from cir_core.files import access
from cir_core.schema import CirError
from jobs import progress
from jobs.embedder import Unit
from jobs.embedding import check_shard_names
from jobs.progress import Board, describe_stages, stage_shares


def test_a_unit_that_is_done_again_counts_once():
    board = Board.__ray_metadata__.modified_class()
    board.tell("a", {"rows": 500.0, "rejects": 1.0})
    board.tell("b", {"rows": 7.0})
    board.tell("a", {"stage_read": 1.0})  # the second attempt has only read so far
    assert {name: value for name, value in board.totals().items() if value} == {"rows": 7.0, "stage_read": 1.0}
    board.tell("a", {"stage_read": 2.0, "rows": 500.0})
    assert board.totals()["rows"] == 507.0
    assert board.totals("a") == {"stage_read": 2.0, "rows": 500.0}
    assert board.totals("c") == {}


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


def test_a_gauge_asks_and_keeps_its_last_answer_while_none_comes(monkeypatch):
    monkeypatch.setattr(progress, "_GAUGE_EVERY_S", 0.01)
    told, enough, answers = [], threading.Event(), iter([3, OSError("away")])

    def tell(value, tags):
        told.append((tags["state"], value))
        if len(told) >= 8:
            enough.set()

    def ask():
        answer = next(answers, OSError("still away"))
        if isinstance(answer, OSError):
            raise answer
        return answer

    with progress.UnitGauge("test", "steps", ask) as steps:
        monkeypatch.setattr(steps._gauge, "set", tell)
        steps.show(2, 5)
        assert enough.wait(60)
    assert told[:2] == [("done", 2), ("left", 3)]
    assert set(told[2:]) == {("done", 3), ("left", 2)}
