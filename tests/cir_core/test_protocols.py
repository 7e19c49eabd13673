"""The protocols of the real benchmarks on made-up rankings: each equals a naive loop, whatever the order of queries."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.benchmarks import Benchmark, metric_members
from cir_core.evaluation import apply_protocol, compare, evaluate, mean_of_results
from cir_core.metrics import set_recall_at_k, soft_recall_at_k
from cir_core.schema import CirError, Query, Ranking

GALLERY = tuple(f"g{number}" for number in range(20))
SEEDS = st.integers(0, 10_000)


def make(num_queries=8, seed=0, **changes):
    """Queries with 1 to 4 targets (1 with own galleries), and a subset of 6 with the reference and the first."""
    rng = np.random.default_rng(seed)
    queries = []
    for number in range(num_queries):
        names = [GALLERY[index] for index in rng.permutation(len(GALLERY))]
        targets = tuple(names[1 : 2 + (0 if changes.get("own_galleries") else number % 4)])
        queries.append(Query(f"q{number}", names[0], "x", targets, (names[0], *names[5:9], names[1])))
    settings = {
        "name": "hand",
        "split": "val",
        "queries": tuple(queries),
        "gallery_ids": GALLERY,
        "protocol": {"reference": "removed"},
        "metrics": ("recall@1", "recall@5"),
        "headline": "recall@1",
    }
    return Benchmark(**{**settings, **changes})


def full_ranking(benchmark, seed, *, levels=0, ids=None):
    """Random scores of the whole gallery (or of other ids), ranked by (-score, index); levels > 0 makes ties."""
    names = np.array(benchmark.gallery_ids if ids is None else ids)
    scores = np.random.default_rng(seed).random((len(benchmark.queries), names.size)).astype(np.float32)
    if levels:
        scores = np.floor(scores * levels)
    order = np.argsort(-scores, axis=1, kind="stable")
    query_ids = tuple(query.query_id for query in benchmark.queries)
    return Ranking(query_ids, names[order], np.take_along_axis(scores, order, axis=1))


def rows_of(ranking):
    return [
        dict(zip(row.tolist(), s.tolist(), strict=True))
        for row, s in zip(ranking.image_ids, ranking.scores, strict=True)
    ]


def score(ranking, benchmark, **options):
    return evaluate(ranking, benchmark, num_resamples=100, **options)


def column(result, name):
    return result.per_query.column(name).to_pylist()


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([0, 3]), st.randoms())
def test_own_galleries_equal_a_naive_loop_that_loses_every_tie(seed, levels, random):
    benchmark = make(seed=seed, own_galleries=True, ties="against_target", metrics=("recall@1", "recall@2"))
    ranking = full_ranking(benchmark, seed, levels=levels)
    result = score(ranking, benchmark)
    for k in (1, 2):
        naive = []
        for query, scores in zip(benchmark.queries, rows_of(ranking), strict=True):
            own = {name: scores[name] for name in query.subset_ids if name != query.reference_id}
            best = max(own[name] for name in query.target_ids if name in own)
            rivals = [name for name in own if name not in query.target_ids and own[name] >= best]
            naive.append(float(len(rivals) < k))
        assert column(result, f"recall@{k}") == naive
    order = list(range(len(benchmark.queries)))
    random.shuffle(order)
    names = tuple(ranking.query_ids[row] for row in order)
    shuffled = score(Ranking(names, ranking.image_ids[order], ranking.scores[order]), benchmark)
    assert shuffled.metrics == result.metrics
    assert shuffled.per_query.equals(result.per_query)


def test_own_galleries_need_their_whole_list_and_nothing_else():
    benchmark = make(own_galleries=True, protocol={"reference": "kept"}, metrics=("recall@1", "recall@3"))
    ranking = full_ranking(benchmark, 1)
    kept = apply_protocol(ranking, benchmark)
    for query, row, before in zip(benchmark.queries, kept.image_ids, ranking.image_ids, strict=True):
        assert row.tolist() == [name for name in before.tolist() if name in query.subset_ids]
    assert benchmark.ranked_sizes() == (6,) * 8
    short = Ranking(ranking.query_ids, kept.image_ids[:, :2], kept.scores[:, :2])
    with pytest.raises(
        CirError, match="recall@3 needs 3 results, but query 'q0' has 2: 1 too few; rank the query's own"
    ):
        score(short, benchmark)
    twice = kept.image_ids.copy()
    twice[2, 4] = twice[2, 3]
    with pytest.raises(CirError, match=f"query 'q2': '{twice[2, 3]}' is listed twice"):
        score(Ranking(ranking.query_ids, twice, kept.scores), benchmark)


def test_a_ranking_of_a_small_gallery_that_omits_an_item_is_refused():
    benchmark = make(metrics=("recall@5", "recall@50"), headline="recall@5")
    ranking = full_ranking(benchmark, 0)
    score(ranking, benchmark)
    less = Ranking(ranking.query_ids, ranking.image_ids[:, :18], ranking.scores[:, :18])
    with pytest.raises(CirError, match=r"recall@50 needs 19 results without the reference, .*search with k = 20"):
        score(less, benchmark)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 12))
def test_soft_and_set_recall_equal_naive_loops(seed, k):
    benchmark = make(seed=seed)
    ids = full_ranking(benchmark, seed).image_ids
    rng = np.random.default_rng(seed)
    values = [{name: float(rng.choice([-1, 0.2, 0.5, 1])) for name in query.target_ids} for query in benchmark.queries]
    soft = [
        max([0.0, *(v[name] for name in row[:k] if name in v)]) for row, v in zip(ids.tolist(), values, strict=True)
    ]
    assert soft_recall_at_k(ids, values, k).tolist() == soft
    targets = [query.target_ids for query in benchmark.queries]
    share = [len(set(row[:k]) & set(t)) / len(t) for row, t in zip(ids.tolist(), targets, strict=True)]
    assert set_recall_at_k(ids, targets, k).tolist() == share
    assert soft_recall_at_k(ids, [{}] * len(ids), k).tolist() == [0.0] * len(ids)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["any", "first", "soft", "fraction"]))
def test_recall_rules_equal_naive_loops(seed, rule):
    soft = {f"q{number}": {GALLERY[number]: 0.5, GALLERY[19]: -1.0} for number in range(8)}
    benchmark = make(seed=seed, recall=rule, soft_targets=soft, protocol={"reference": "kept"})
    ranking = full_ranking(benchmark, seed)
    result = score(ranking, benchmark)
    for query, row, value in zip(
        benchmark.queries, ranking.image_ids.tolist(), column(result, "recall@5"), strict=True
    ):
        top, targets = set(row[:5]), set(query.target_ids)
        expected = {
            "any": float(bool(top & targets)),
            "first": float(query.target_ids[0] in top),
            "soft": max([0.0, *(soft[query.query_id].get(name, 0.0) for name in top)]),
            "fraction": len(top & targets) / len(targets),
        }
        assert value == expected[rule]
    counted = [query.target_ids[: 1 if rule == "first" else None] for query in benchmark.queries]
    places = [
        min(row.index(name) + 1 for name in t) for row, t in zip(ranking.image_ids.tolist(), counted, strict=True)
    ]
    assert column(result, "rank") == places


SUBSET_METRICS = ("recall@1", "recall@5", "recall_subset@1", "recall_subset@2", "mean_recall@5_recall_subset@1")


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["any", "soft"]))
def test_subset_recall_is_the_same_from_the_gallery_and_from_the_subsets_alone(seed, rule):
    soft = {f"q{number}": {GALLERY[number]: 0.5} for number in range(8)}
    benchmark = make(seed=seed, metrics=SUBSET_METRICS, recall=rule, soft_targets=soft, headline=SUBSET_METRICS[-1])
    ranking = full_ranking(benchmark, seed)
    whole = score(ranking, benchmark)
    kept = [
        [place for place, name in enumerate(row) if name in query.subset_ids]
        for query, row in zip(benchmark.queries, ranking.image_ids.tolist(), strict=True)
    ]
    members, scores = (np.take_along_axis(array, np.array(kept), 1) for array in (ranking.image_ids, ranking.scores))
    subsets = Ranking(ranking.query_ids[::-1], members[::-1], scores[::-1])
    top = Ranking(ranking.query_ids, ranking.image_ids[:, :6], ranking.scores[:, :6])
    assert score(top, benchmark, subset_ranking=subsets).metrics == whole.metrics
    for query, row, value in zip(benchmark.queries, members.tolist(), column(whole, "recall_subset@1"), strict=True):
        first = next(name for name in row if name != query.reference_id)
        assert value == (float(first in query.target_ids) if rule == "any" else soft[query.query_id].get(first, 0.0))
    halves = zip(column(whole, "recall@5"), column(whole, "recall_subset@1"), strict=True)
    assert column(whole, whole.headline) == [(one + two) / 2 for one, two in halves]


def test_a_ranking_that_does_not_hold_the_subsets_says_what_to_do():
    benchmark = make(metrics=SUBSET_METRICS)
    ranking = full_ranking(benchmark, 0)
    top = Ranking(ranking.query_ids, ranking.image_ids[:, :6], ranking.scores[:, :6])
    with pytest.raises(CirError, match=r"query 'q\d': its list holds \d of its subset of 5.*subset_ranking"):
        score(top, benchmark)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(6, 20))
def test_a_reference_outside_the_gallery_changes_nothing_listed_or_not(seed, k):
    queries = tuple(
        replace(query, reference_id=f"outside-{query.query_id}", subset_ids=()) for query in make(seed=seed).queries
    )
    removed = make(seed=seed, queries=queries, outside_references=True)
    assert removed.ranked_sizes() == (20,) * 8
    assert removed.image_ids == (*GALLERY, *(query.reference_id for query in queries))
    ranking = full_ranking(removed, seed)
    references = np.array([query.reference_id for query in queries])[:, None]
    first = np.full((8, 1), 2, dtype=np.float32)
    listed = Ranking(
        ranking.query_ids, np.hstack([references, ranking.image_ids])[:, :k], np.hstack([first, ranking.scores])[:, :k]
    )
    assert score(listed, removed).metrics == score(ranking, removed).metrics
    kept = replace(removed, protocol={"reference": "kept"})
    with pytest.raises(CirError, match="ranked ids are not among its 20 gallery ids, such as 'outside-q0'"):
        score(listed, kept)
    with pytest.raises(CirError, match="its reference 'outside-q0' is not in the gallery"):
        replace(removed, outside_references=False)


def test_queries_without_targets_count_as_misses_only_where_that_is_allowed():
    queries = list(make().queries)
    queries[3] = replace(queries[3], target_ids=())
    with pytest.raises(CirError, match="query 'q3': has no ground truth"):
        make(queries=tuple(queries))
    benchmark = make(queries=tuple(queries), empty_targets=True, recall="fraction", metrics=("recall@1", "map@5"))
    ranking = full_ranking(benchmark, 4)
    result = score(ranking, benchmark)
    assert (column(result, "recall@1")[3], column(result, "map@5")[3], column(result, "rank")[3]) == (0.0, 0.0, None)
    assert result.metrics["map@5"] == pytest.approx(sum(column(result, "map@5")) / 8)


def test_aspects_overlap_and_one_without_queries_is_not_applicable():
    aspects = {"negation": frozenset({"q1", "q2"}), "addition": frozenset({"q2", "q5", "q6"}), "viewpoint": frozenset()}
    benchmark = make(aspects=aspects, aspect_metric="recall@5")
    a, b = (score(full_ranking(benchmark, seed), benchmark) for seed in (1, 2))
    values = column(a, "recall@5")
    assert a.metrics["recall@5/addition"] == pytest.approx((values[2] + values[5] + values[6]) / 3)
    assert a.not_applicable == ("recall@5/viewpoint",)
    assert "recall@5/viewpoint" not in a.metrics
    assert column(a, "aspects")[2] == ["negation", "addition"]
    assert "recall@5/viewpoint" in a.describe()
    assert "n/a" in a.describe()
    paired = compare(a, b, "recall@5/addition")
    assert paired.num_queries == 3
    assert paired.difference == pytest.approx(b.metrics["recall@5/addition"] - a.metrics["recall@5/addition"])
    with pytest.raises(CirError, match="no metric 'recall@5/viewpoint'"):
        compare(a, b, "recall@5/viewpoint")


def test_the_mean_of_several_results_weighs_them_alike():
    parts = [make(number, seed=number) for number in (4, 8)]
    parts = [
        replace(
            part,
            queries=tuple(replace(query, query_id=f"{len(part.queries)}-{query.query_id}") for query in part.queries),
        )
        for part in parts
    ]
    results = [score(full_ranking(part, 3), part) for part in parts]
    mean = mean_of_results(results, "recall@5")
    assert mean.mean == pytest.approx(sum(result.metrics["recall@5"] for result in results) / 2)
    assert mean.low <= mean.mean <= mean.high
    for chosen, metric, message in [
        (results[:1], "recall@5", "1 results; a mean needs at least two"),
        (results, "recall@6", "no metric 'recall@6'; did you mean"),
        ([results[0], results[0]], "recall@5", "the same queries twice"),
        ([results[0], replace(results[1], split="test")], "recall@5", "hand test with hand val"),
    ]:
        with pytest.raises(CirError, match=message):
            mean_of_results(chosen, metric)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": "best"}, "recall must not be 'best'"),
        ({"ties": "against_target", "recall": "soft"}, "recall 'soft' cannot count ties"),
        ({"aspects": {"x": frozenset()}, "aspect_metric": "map@10"}, "the aspects' metric 'map@10' is not among"),
        ({"soft_targets": {"q0": {"z": 1.0}}}, "query 'q0': its soft target 'z' is not in the gallery"),
        ({"metrics": ("recall@1", "mean_recall@1")}, "unknown metric 'mean_recall@1'"),
        ({"metrics": ("recall@1", "mean_recall@1_ndcg@3")}, "unknown metric 'mean_recall@1_ndcg@3'"),
        ({"crops": {"z": None}}, "a crop for 'z'"),
    ],
)
def test_a_benchmark_checks_its_protocol(changes, message):
    with pytest.raises(CirError, match=message):
        make(**changes)


def test_own_galleries_hold_their_targets():
    benchmark = make(own_galleries=True)
    for query, message in [
        (replace(benchmark.queries[0], subset_ids=()), "has no gallery of its own"),
        (
            replace(benchmark.queries[0], subset_ids=benchmark.queries[0].subset_ids[:-1]),
            "not in the query's own gallery",
        ),
    ]:
        with pytest.raises(CirError, match=message):
            replace(benchmark, queries=(query,))


def test_a_named_mean_lists_its_members():
    assert metric_members("mean_recall@5_recall_subset@1") == ("recall@5", "recall_subset@1")
    assert metric_members("mean_map@5_pessimistic_recall@10_recall@1") == ("map@5", "pessimistic_recall@10", "recall@1")
    assert make(metrics=SUBSET_METRICS).max_k == 5
    assert make(metrics=SUBSET_METRICS).max_subset_k == 2
