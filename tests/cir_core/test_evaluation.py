"""Evaluation: the protocol is applied here, faults are named, and rankings on disk score the same."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.benchmarks import Benchmark
from cir_core.evaluation import (
    apply_protocol,
    compare,
    evaluate,
    load_ranking,
    save_ranking,
    validate_submission,
    write_submission,
)
from cir_core.metrics import average_precision_at_k, recall_at_k
from cir_core.schema import RANKING_SCHEMA, CirError, Query, Ranking

GALLERY = tuple(f"g{number}" for number in range(30))
METRICS = ("recall@1", "recall@10", "map@10", "pessimistic_recall@10")


def make_benchmark(num_queries=12, *, reference="removed", seed=0, **changes):
    rng = np.random.default_rng(seed)
    queries = []
    for number in range(num_queries):
        names = [GALLERY[index] for index in rng.permutation(len(GALLERY))[: 2 + number % 3]]
        queries.append(Query(f"q{number}", names[0], f"caption {number}", tuple(names[1:])))
    settings = {
        "name": "hand",
        "split": "val",
        "queries": tuple(queries),
        "gallery_ids": GALLERY,
        "protocol": {"reference": reference, "gallery_size": len(GALLERY)},
        "metrics": METRICS,
        "headline": "recall@10",
        "query_kinds": {f"q{number}": ("change", "add")[number % 2] for number in range(num_queries)},
    }
    return Benchmark(**{**settings, **changes})


def make_ranking(benchmark, *, k=20, seed=1, exclude_reference=False, levels=0):
    """Random scores over the whole gallery, ranked by (-score, gallery index); levels > 0 makes ties."""
    rng = np.random.default_rng(seed)
    scores = rng.random((len(benchmark.queries), len(GALLERY))).astype(np.float32)
    if levels:
        scores = np.floor(scores * levels)
    if exclude_reference:
        for row, query in enumerate(benchmark.queries):
            scores[row, GALLERY.index(query.reference_id)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    ids, top = np.array(GALLERY)[order], np.take_along_axis(scores, order, axis=1)
    ids[np.isneginf(top)] = ""
    return Ranking(tuple(query.query_id for query in benchmark.queries), ids, top, {"alpha": 0.8})


def test_metrics_intervals_and_per_query_values_are_those_of_the_metrics_module():
    benchmark = make_benchmark(reference="kept")
    ranking = make_ranking(benchmark)
    result = evaluate(ranking, benchmark)
    targets = [query.target_ids for query in benchmark.queries]
    recall = recall_at_k(ranking.image_ids, targets, 10)
    assert result.metrics["recall@10"] == recall.mean()
    assert result.metrics["map@10"] == average_precision_at_k(ranking.image_ids, targets, 10).mean()
    assert result.metrics["recall@10/add"] == recall[1::2].mean()
    assert result.metrics["recall@10/change"] == recall[::2].mean()
    assert set(result.intervals) == set(result.metrics) == {*METRICS, "recall@10/add", "recall@10/change"}
    assert all(low <= result.metrics[name] <= high for name, (low, high) in result.intervals.items())
    table = result.per_query
    assert table.column("query_id").to_pylist() == [query.query_id for query in benchmark.queries]
    assert table.column("recall@10").to_pylist() == recall.tolist()
    for row, rank in enumerate(table.column("rank").to_pylist()):
        found = [name in targets[row] for name in ranking.image_ids[row]]
        assert rank == (found.index(True) + 1 if True in found else None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 3]), st.integers(11, 30))
def test_a_removed_reference_scores_the_same_whether_or_not_the_search_removed_it(seed, levels, k):
    benchmark = make_benchmark(seed=seed)
    listed = evaluate(make_ranking(benchmark, k=k, seed=seed, levels=levels), benchmark, num_resamples=100)
    absent = make_ranking(benchmark, k=k, seed=seed, levels=levels, exclude_reference=True)
    absent = evaluate(absent, benchmark, num_resamples=100)
    plain = [name for name in listed.metrics if not name.startswith("pessimistic")]
    assert {name: listed.metrics[name] for name in plain} == {name: absent.metrics[name] for name in plain}


def test_removing_the_reference_moves_later_results_up():
    benchmark = make_benchmark(1, queries=(Query("q0", "g0", "x", ("g5",)),), query_kinds={})
    ids = np.array([["g0", "g5", *GALLERY[6:16]]])
    ranking = Ranking(("q0",), ids, np.arange(12, 0, -1, dtype=np.float32)[None])
    assert evaluate(ranking, benchmark).metrics["recall@1"] == 1.0
    kept = replace(benchmark, protocol={"reference": "kept"})
    assert evaluate(ranking, kept).metrics["recall@1"] == 0.0
    scored = apply_protocol(ranking, benchmark)
    assert scored.image_ids[0].tolist() == [*ids[0, 1:].tolist(), ""]
    assert scored.scores[0].tolist() == [*range(11, 0, -1), -np.inf]


def test_a_constant_model_gets_no_pessimistic_recall_even_after_the_reference_left_an_empty_place():
    benchmark = make_benchmark()
    result = evaluate(make_ranking(benchmark, k=12, levels=1), benchmark)  # floor(random) = 0 for every image
    assert result.metrics["recall@10"] > 0
    assert result.metrics["pessimistic_recall@10"] == 0
    whole = evaluate(make_ranking(benchmark, k=30, levels=1), benchmark).per_query
    ranks = [len(GALLERY) - 1 - len(query.target_ids) + 1 for query in benchmark.queries]
    assert whole.column("pessimistic_rank").to_pylist() == ranks  # the whole gallery is listed: the rank is known


def test_the_order_of_the_rankings_queries_does_not_matter():
    benchmark = make_benchmark()
    ranking = make_ranking(benchmark)
    order = np.random.default_rng(5).permutation(len(ranking.query_ids))
    names = tuple(ranking.query_ids[row] for row in order)
    shuffled = Ranking(names, ranking.image_ids[order], ranking.scores[order])
    a, b = evaluate(ranking, benchmark), evaluate(shuffled, benchmark)
    assert a.metrics == b.metrics
    assert a.per_query.equals(b.per_query)


def test_a_gallery_smaller_than_k_is_scored_whole():
    names = GALLERY[:6]
    queries = (Query("q0", "g0", "x", ("g5",)),)
    benchmark = make_benchmark(1, queries=queries, gallery_ids=names, metrics=("recall@10", "map@10"), query_kinds={})
    ids = np.array([[*names[:5], names[5]]])
    ranking = Ranking(("q0",), ids, np.arange(6, 0, -1, dtype=np.float32)[None])
    result = evaluate(ranking, benchmark)
    assert result.metrics == {"recall@10": 1.0, "map@10": 1 / 5}
    with pytest.raises(CirError, match="needs 5 results without the reference, but query 'q0' has 4: 1 too few"):
        evaluate(Ranking(("q0",), ids[:, :5], ranking.scores[:, :5]), benchmark)


def change(ranking, *, ids=None, scores=None, names=None, protocol=None):
    image_ids, values = ranking.image_ids.copy(), ranking.scores.copy()
    for (row, place), value in (ids or {}).items():
        image_ids[row, place] = value
    for (row, place), value in (scores or {}).items():
        values[row, place] = value
    return Ranking(names or ranking.query_ids, image_ids, values, protocol or {})


NAMES = tuple(f"q{number}" for number in range(12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("other", *NAMES[1:])}, r"1 missing \('q0'\), 1 unknown \('other'\)"),
        ({"names": ("q1", *NAMES[1:])}, "lists a query twice: 'q1'"),
        (
            {"ids": {(4, 2): "zz"}},
            "1 ranked ids are not among its 30 gallery ids, such as 'zz' of query 'q4'",
        ),
        ({"ids": {(4, 2): ""}}, "query 'q4': its list has an empty place before a result"),
        ({"scores": {(3, 5): 9.0}}, "query 'q3': its list is not ordered by falling score"),
        ({"scores": {(3, 5): np.nan}}, "query 'q3': its list holds a score that is not a number"),
    ],
)
def test_a_faulty_ranking_is_refused_by_name(changes, message):
    benchmark = make_benchmark()
    with pytest.raises(CirError, match=message):
        evaluate(change(make_ranking(benchmark), **changes), benchmark)


def test_an_image_listed_twice_is_refused():
    benchmark = make_benchmark(reference="kept")
    ranking = make_ranking(benchmark)
    twice = change(ranking, ids={(2, 1): str(ranking.image_ids[2, 0])})
    with pytest.raises(CirError, match=r"query 'q2': .* is listed twice"):
        evaluate(twice, benchmark)


def test_a_short_ranking_says_by_how_much():
    benchmark = make_benchmark()
    with pytest.raises(
        CirError, match=r"@10 needs 10 results without the reference, .*: \d too few; search with k = 11"
    ):
        evaluate(make_ranking(benchmark, k=8), benchmark)
    evaluate(make_ranking(benchmark, k=11), benchmark)
    evaluate(make_ranking(benchmark, k=10, exclude_reference=True), benchmark)


def test_missing_queries_are_counted_and_named():
    benchmark = make_benchmark()
    ranking = make_ranking(benchmark)
    part = Ranking(ranking.query_ids[5:], ranking.image_ids[5:], ranking.scores[5:])
    with pytest.raises(CirError, match=r"5 missing \('q0', 'q1', 'q2' and 2 more\)"):
        evaluate(part, benchmark)


def test_protocols_that_contradict_each_other_and_hidden_answers_are_refused():
    benchmark = make_benchmark(reference="kept")
    ranking = replace(make_ranking(benchmark, exclude_reference=True), protocol={"reference": "removed"})
    with pytest.raises(CirError, match="keeps references"):
        evaluate(ranking, benchmark)
    hidden = replace(benchmark, has_targets=False)
    with pytest.raises(CirError, match="ground truth is not public"):
        evaluate(make_ranking(hidden), hidden)


def test_the_protocol_is_stored_and_printed_with_the_score():
    benchmark = make_benchmark()
    result = evaluate(make_ranking(benchmark), benchmark)
    assert result.protocol["reference"] == "removed"
    assert result.protocol["gallery_size"] == 30
    assert result.protocol["ranking"] == {"alpha": 0.8}
    text = result.describe()
    assert f"{100 * result.metrics['recall@10']:.2f} %" in text
    for part in ("gallery_size: 30", "reference: removed", "ties: ", "'alpha': 0.8", "12 queries"):
        assert part in text


def test_compare_pairs_the_queries_also_by_kind():
    benchmark = make_benchmark(200)
    a = evaluate(make_ranking(benchmark, seed=1), benchmark)
    better = make_ranking(benchmark, seed=1)
    first = [query.target_ids[0] for query in benchmark.queries]
    for row in range(0, 100, 2):  # put the target first for 50 queries of kind "change"
        rest = [name for name in better.image_ids[row].tolist() if name != first[row]]
        better.image_ids[row] = [first[row], *rest][: better.image_ids.shape[1]]
    b = evaluate(better, benchmark)
    whole, kind = compare(a, b, "recall@1"), compare(a, b, "recall@1", seed=1)
    assert whole.num_queries == 200
    assert whole.difference == pytest.approx(b.metrics["recall@1"] - a.metrics["recall@1"])
    assert (whole.low > 0, whole.probability_b_better, kind.difference) == (True, 1.0, whole.difference)
    change_only = compare(a, b, "recall@10/change")
    assert change_only.num_queries == 100
    assert change_only.difference == pytest.approx(b.metrics["recall@10/change"] - a.metrics["recall@10/change"])
    assert compare(a, b, "recall@10/add").difference == 0


def test_compare_refuses_what_cannot_be_compared():
    benchmark = make_benchmark()
    a = evaluate(make_ranking(benchmark), benchmark)
    with pytest.raises(CirError, match=r"no metric 'recall@11'; did you mean 'recall@1"):
        compare(a, a, "recall@11")
    kept = replace(benchmark, protocol={**benchmark.protocol, "reference": "kept"})
    with pytest.raises(CirError, match="reference is 'removed' in A and 'kept' in B"):
        compare(a, evaluate(make_ranking(kept), kept), "recall@10")
    fewer = make_benchmark(8)
    with pytest.raises(CirError, match="different queries"):
        compare(a, evaluate(make_ranking(fewer), fewer), "recall@10")


def test_submissions_need_a_test_server(tmp_path):
    benchmark = make_benchmark()
    path = tmp_path / "submission.json"
    with pytest.raises(CirError, match="has no test server"):
        write_submission(make_ranking(benchmark), benchmark, str(path))
    assert not path.exists()
    with pytest.raises(CirError, match="has no test server"):
        validate_submission(str(path), benchmark)


def test_a_saved_sweep_scores_the_same_after_loading(tmp_path):
    benchmark = make_benchmark()
    sweep = {alpha: make_ranking(benchmark, seed=number) for number, alpha in enumerate((0.1, 0.8, 1.0))}
    sweep[None] = make_ranking(benchmark, seed=9, exclude_reference=True, k=30)  # ends in an empty place
    path = str(tmp_path / "rankings.parquet")
    save_ranking(sweep, path)
    assert pq.read_schema(path).remove_metadata().equals(RANKING_SCHEMA)
    loaded = load_ranking(path)
    assert list(loaded) == list(sweep)
    for alpha, ranking in sweep.items():
        width = loaded[alpha].image_ids.shape[1]
        assert loaded[alpha].query_ids == ranking.query_ids
        assert np.array_equal(loaded[alpha].image_ids, ranking.image_ids[:, :width])
        assert np.array_equal(loaded[alpha].scores, ranking.scores[:, :width])
        assert loaded[alpha].protocol == ranking.protocol
        assert (ranking.image_ids[:, width:] == "").all()
        assert evaluate(loaded[alpha], benchmark).metrics == evaluate(ranking, benchmark).metrics


@settings(deadline=None)  # it writes files: a busy disk is no fault
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms())
def test_ragged_lists_survive_the_disk_in_any_row_order(tmp_path_factory, lengths, random):
    path = str(tmp_path_factory.mktemp("rankings") / "r.parquet")
    ids = np.array([[f"é{row}-{place}" * (place < length) for place in range(4)] for row, length in enumerate(lengths)])
    scores = np.where(ids == "", -np.inf, np.float32(1) / np.arange(3, 7)).astype(np.float32)
    ranking = Ranking(tuple(f"q{row}" for row in range(len(lengths))), ids, scores)
    save_ranking(ranking, path)
    table = pq.read_table(path)
    rows = list(range(table.num_rows))
    random.shuffle(rows)
    pq.write_table(table.take(rows), path)
    loaded = load_ranking(path)[None]
    order = [loaded.query_ids.index(name) for name in ranking.query_ids]
    width = max(lengths)
    assert np.array_equal(loaded.image_ids[order], ids[:, :width])
    assert np.array_equal(loaded.scores[order], scores[:, :width])


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (
            Ranking(("a", "b"), np.array([["x"], [""]]), np.zeros((2, 1), np.float32)),
            "query 'b' has no results",
        ),
        (Ranking(("a", "a"), np.array([["x"], ["y"]]), np.zeros((2, 1), np.float32)), "listed twice"),
        (Ranking(("a",), np.array([["", "x"]]), np.zeros((1, 2), np.float32)), "empty place before"),
        (Ranking(("a",), np.array([["x"]]), np.zeros((1, 1), np.float32), {"f": print}), "stored as JSON"),
        ({float("nan"): Ranking(("a",), np.array([["x"]]), np.zeros((1, 1), np.float32))}, "finite number"),
        ({}, "no rankings"),
    ],
)
def test_a_ranking_that_would_lose_something_is_not_saved(tmp_path, ranking, message):
    path = tmp_path / "r.parquet"
    with pytest.raises(CirError, match=message):
        save_ranking(ranking, str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rank": [1, 1]}, "ranks of query 'q' are not 1, 2, 3"),
        ({"rank": [0, 1]}, "ranks of query 'q' are not 1, 2, 3"),
        ({"rank": [1, 3]}, "ranks of query 'q' are not 1, 2, 3"),
        ({"image_id": ["x", None]}, "a null where a value is needed"),
    ],
)
def test_a_faulty_ranking_file_is_refused(tmp_path, columns, message):
    rows = {
        "query_id": ["q", "q"],
        "alpha": [0.5, 0.5],
        "rank": [1, 2],
        "image_id": ["x", "y"],
        "score": [1.0, 0.5],
    }
    path = str(tmp_path / "r.parquet")
    pq.write_table(pa.table({**rows, **columns}, schema=RANKING_SCHEMA), path)
    with pytest.raises(CirError, match=message):
        load_ranking(path)


def test_files_that_are_no_rankings_are_refused(tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    with pytest.raises(CirError, match="not a ranking file"):
        load_ranking(str(other))
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(CirError, match="not a Parquet file"):
        load_ranking(str(tmp_path / "text.parquet"))
    with pytest.raises(CirError, match="no such file"):
        load_ranking(str(tmp_path / "none.parquet"))
