"""When a run that rejects too much stops: between parts, inside one, and before it begins again."""

import copy
import io
import tarfile

import numpy as np
import pytest

from cir_core.embedding_store import EmbeddingWriter, PartInfo, StoreSpec
from cir_core.preprocessing import Preprocessing
from cir_core.schema import CirError, Reject
from jobs import embedding
from jobs.embedder import EmbedPlan, ShardEmbedder, Unit, _Session
from jobs.reject_limit import RejectLimit

SPEC = StoreSpec("tiny", "own", "w", "", "c", "t", "p", 2, "float32", "input", "fp32")


@pytest.fixture
def output(tmp_path):
    rejects = [Reject("s.tar", f"k{number}", "unreadable", "HTML") for number in range(3)]
    EmbeddingWriter(str(tmp_path), SPEC).write_part(0, ["a"], np.float32([[1, 0]]), rejects=rejects)
    return str(tmp_path)


def part(rows, rejects):
    return PartInfo(0, "part-00000", rows, rejects, "", "", 0, ())


def rejects_of(count):
    return [Reject("t.tar", f"r{number}", "truncated") for number in range(count)]


def test_a_count_stops_at_once_and_says_what_was_seen(output):
    limit = RejectLimit(output, 2, 1.0)
    limit.count(part(1, 2))
    limit.check()
    limit.count(part(0, 1))
    with pytest.raises(CirError) as caught:
        limit.check()
    text = str(caught.value)
    assert "3 of 4 images cannot be used, more than the 2 allowed" in text
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
    limit.check_part(0, rejects_of(5000), lambda: {"rejects": 5000.0})


def test_a_part_that_is_being_written_counts_with_the_finished_ones(output):
    limit = RejectLimit(output, 5, 1.0)
    limit.count(part(1, 3))
    limit.check_part(9, rejects_of(2), lambda: None)
    with pytest.raises(CirError) as caught:
        limit.check_part(9, rejects_of(3), lambda: None)
    text = str(caught.value)
    assert "6 of 16 images cannot be used, more than the 5 allowed" in text
    assert "Reasons: truncated: 3, unreadable: 3. Such as t.tar r0 (truncated )" in text


def test_a_bad_part_of_a_good_store_is_within_the_share(tmp_path):
    limit, asked = RejectLimit(str(tmp_path), None, 0.5), []

    def totals(found):
        asked.append(found)
        return found

    limit.check_part(0, rejects_of(999), lambda: totals({"rejects": 999.0}))
    limit.check_part(500, rejects_of(500), lambda: totals({"rows": 500.0, "rejects": 500.0}))
    assert asked == []
    limit.check_part(0, rejects_of(1000), lambda: totals({"rows": 1000.0, "rejects": 1000.0}))
    limit.check_part(0, rejects_of(1000), lambda: totals(None))
    with pytest.raises(CirError, match=r"1000 of 1999 .* share of 0\.5"):
        limit.check_part(0, rejects_of(1000), lambda: totals({"rows": 999.0, "rejects": 1000.0}))
    assert len(asked) == 3


def plan_for(output, units=()):
    return EmbedPlan(
        units=units, output=output, spec=SPEC, model="tiny", pretrained=None, adapter=None, preprocessing_mode=None,
        captions="no", batch_size=10, use_gpu=False,
    )  # fmt: skip


class Encoder:
    preprocessing = Preprocessing(size=8, mode="center_crop", interpolation="bicubic")


def test_an_actor_stops_inside_a_shard(tmp_path):
    with tarfile.open(tmp_path / "big.tar", "w") as tar:
        for number in range(500):  # captions without pictures
            member = tarfile.TarInfo(f"k{number}.txt")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    plan = plan_for(str(tmp_path / "store"))
    limit = RejectLimit(plan.output, 20, 1.0)
    session = _Session(plan, Encoder(), EmbeddingWriter(plan.output, plan.spec), copy.deepcopy(limit))
    with pytest.raises(CirError, match=r"30 of 30 images cannot be used, .*missing_image: 30"):
        ShardEmbedder([plan], None, [limit]).embed(session, Unit(0, str(tmp_path / "big.tar")))
    assert session.writer.finished_parts() == {}


def test_a_run_above_its_limit_does_not_begin_again(output, monkeypatch):
    monkeypatch.setattr(embedding, "_run", lambda *_: pytest.fail("it embeds"))
    plan = plan_for(output, units=(Unit(0, "s.tar"), Unit(1, "t.tar")))
    with pytest.raises(
        CirError, match=r"3 of 4 .* more than the 2 allowed.*Reasons: unreadable: 3\. Such as s\.tar k0"
    ):
        embedding.embed_stores([plan], num_encoders=1, max_rejects=2)
    EmbeddingWriter(output, SPEC).commit(rows_in=4)
    other = plan_for(output + "/other", units=(Unit(0, "s.tar"),))  # would be embedded before the first is judged
    with pytest.raises(CirError, match="3 of 4"):
        embedding.embed_stores([plan, other], num_encoders=1, max_rejects=2)
