"""The loaders and `evaluate` on the real annotation files (folder: CIR_BENCHMARKS), against other people's scores.

The oracle ranks seeded random embeddings of 64 dimensions: gallery rows are drawn first, in split-file order, then
a row of noise a query, all of unit norm; a query is the unit vector along w * target + noise. CIRR's and FashionIQ's
published evaluators average in float32, so there our mean must round to the very same float32.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cir_core.benchmarks import load_benchmark
from cir_core.evaluation import evaluate, load_ranking, mean_of_results, save_ranking
from cir_core.schema import Ranking

FASHION_SIZES = {"dress": (2017, 3817, 2628), "shirt": (2038, 6346, 3089), "toptee": (1961, 5373, 2902)}
ASPECT_COUNTS = {
    "cardinality": 37,
    "addition": 80,
    "negation": 21,
    "direct_addressing": 119,
    "compare_change": 86,
    "comparative_statement": 50,
    "statement_with_conjunction": 164,
    "spatial_relations_background": 100,
    "viewpoint": 54,
}


@pytest.fixture(scope="module")
def root():
    folder = os.environ.get("CIR_BENCHMARKS")
    if not folder:
        pytest.skip("CIR_BENCHMARKS does not name a folder of benchmark annotations")
    return Path(folder)


@pytest.fixture(scope="module")
def oracle(root):
    return json.loads((root / "oracle_metrics.json").read_text())


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def noise(rng, *shape):
    return unit(rng.standard_normal(shape).astype(np.float32))


def toward_first_target(benchmark, names, rng, weight):
    """Gallery and query embeddings; names: the gallery in the order in which its rows are drawn."""
    place = {name: row for row, name in enumerate(names)}
    gallery_GD = noise(rng, len(names), 64)
    target = [place[query.target_ids[0]] for query in benchmark.queries]
    query_QD = unit(np.float32(weight) * gallery_GD[target] + noise(rng, len(target), 64))
    return query_QD, gallery_GD, place


def rank(benchmark, scores_QG, names, k=None):
    """Rank by (-score, gallery index)."""
    order = np.argsort(-scores_QG, axis=1, kind="stable")[:, :k]
    ids = np.array(names)[order]
    query_ids = tuple(query.query_id for query in benchmark.queries)
    return Ranking(query_ids, ids, np.take_along_axis(scores_QG, order, axis=1).astype(np.float32))


def rank_subsets(benchmark, query_QD, gallery_GD, place):
    """Rank each query's subset alone, its reference included."""
    members = [sorted(query.subset_ids, key=place.__getitem__) for query in benchmark.queries]
    rows = np.array([[place[name] for name in names] for names in members])
    scores = np.einsum("qd,qmd->qm", query_QD, gallery_GD[rows])
    order = np.argsort(-scores, axis=1, kind="stable")
    query_ids = tuple(query.query_id for query in benchmark.queries)
    ids = np.take_along_axis(np.array(members), order, axis=1)
    return Ranking(query_ids, ids, np.take_along_axis(scores, order, axis=1))


def percent(result, name):
    return 100 * result.metrics[name]


def float32_percent(result, name):
    return 100 * float(np.float32(result.metrics[name]))


def test_cirr_hard_and_soft(root, oracle, tmp_path):
    hard, soft = load_benchmark("cirr", root), load_benchmark("cirr", root, targets="soft")
    assert (len(hard.queries), len(hard.gallery_ids)) == (4181, 2297)
    assert soft.protocol["queries_without_reachable_soft_target"] == 3
    embeddings = toward_first_target(hard, hard.gallery_ids, np.random.default_rng(0), 0.25)
    query_QD, gallery_GD, _ = embeddings
    ranking = rank(hard, query_QD @ gallery_GD.T, hard.gallery_ids, k=51)  # still lists the references
    subsets = rank_subsets(hard, *embeddings)
    result = evaluate(ranking, hard, subset_ranking=subsets, num_resamples=100)
    expected = oracle["cirr_val_seed0_q=norm(0.25*target+noise)"]
    for k in (1, 5, 10, 50):
        assert float32_percent(result, f"recall@{k}") == expected[f"recall@{k}"]
    for k in (1, 2, 3):
        assert float32_percent(result, f"recall_subset@{k}") == expected[f"group_recall@{k}"]
    halves = (result.metrics["recall@5"] + result.metrics["recall_subset@1"]) / 2
    assert result.metrics[result.headline] == pytest.approx(halves, rel=1e-14)
    for name, lists in (("gallery", ranking), ("subsets", subsets)):
        save_ranking(lists, str(tmp_path / f"{name}.parquet"))
    loaded = [load_ranking(str(tmp_path / f"{name}.parquet"))[None] for name in ("gallery", "subsets")]
    again = evaluate(loaded[0], hard, subset_ranking=loaded[1], num_resamples=100)
    assert (again.metrics, again.intervals) == (result.metrics, result.intervals)
    result = evaluate(ranking, soft, subset_ranking=subsets, num_resamples=100)
    expected = oracle["cirr_val_soft_CIRPLANT_semantics_same_embeddings"]
    for k in (1, 5, 10, 50):
        assert percent(result, f"recall@{k}") == pytest.approx(expected[f"soft_recall@{k}"], rel=1e-9)
    for k in (1, 2, 3):
        assert percent(result, f"recall_subset@{k}") == pytest.approx(expected[f"soft_subset@{k}"], rel=1e-9)


def test_cirr_test_split(root):
    benchmark = load_benchmark("cirr", root, split="test1")
    assert (len(benchmark.queries), len(benchmark.gallery_ids)) == (4148, 2315)
    assert not benchmark.has_targets
    assert [query.query_id for query in benchmark.queries if not query.relative_caption] == ["27098"]
    val = load_benchmark("cirr", root)
    assert max(len(query.relative_caption.split()) for query in val.queries + benchmark.queries) == 53
    references = {query.reference_id for query in val.queries}
    assert len({query.target_ids[0] for query in val.queries} - references) == 100


@pytest.mark.parametrize("category", FASHION_SIZES)
def test_fashioniq_galleries(root, oracle, category):
    num_queries, original, small = FASHION_SIZES[category]
    whole = load_benchmark("fashioniq", root, split="val", category=category, gallery="original")
    val = load_benchmark("fashioniq", root, category=category, gallery="val")
    assert (len(whole.queries), len(whole.gallery_ids), len(val.gallery_ids)) == (num_queries, original, small)
    query_QD, gallery_GD, place = toward_first_target(whole, whole.gallery_ids, np.random.default_rng(1), 0.25)
    for benchmark, name in ((whole, f"original_gallery({original})"), (val, f"VAL_gallery({small})")):
        rows = [place[image] for image in benchmark.gallery_ids]
        ranking = rank(benchmark, query_QD @ gallery_GD[rows].T, benchmark.gallery_ids, k=50)
        result = evaluate(ranking, benchmark, num_resamples=100)
        for k in (1, 5, 10, 50):
            assert float32_percent(result, f"recall@{k}") == oracle[f"fiq_{category}_val_seed1_{name}"][f"Recall@{k}"]


def test_fashioniq_captions_and_the_mean_of_its_categories(root):
    results, empty = [], 0
    for category, (num_queries, _, _) in FASHION_SIZES.items():
        separate = load_benchmark("fashioniq", root, category=category, caption_join="separate")
        assert len(separate.queries) == 2 * num_queries
        empty += sum(not query.relative_caption for query in separate.queries)
        benchmark = load_benchmark("fashioniq", root, category=category, gallery="val")
        scores = np.random.default_rng(0).random((num_queries, len(benchmark.gallery_ids)), dtype=np.float32)
        results.append(evaluate(rank(benchmark, scores, benchmark.gallery_ids, 50), benchmark, num_resamples=100))
    assert empty == 3
    mean = mean_of_results(results, "recall@50")
    assert mean.mean == pytest.approx(sum(result.metrics["recall@50"] for result in results) / 3, rel=1e-14)
    assert mean.low < mean.mean < mean.high
    test = load_benchmark("fashioniq", root, split="test", category="dress")
    assert (len(test.queries), len(test.gallery_ids), test.has_targets) == (2024, 3818, False)


def circo_gallery(root):
    """The references of val and test and the ground truths of val."""
    val, test = (json.loads((root / f"circo/annotations/{split}.json").read_text()) for split in ("val", "test"))
    names = {query["reference_img_id"] for query in val + test}
    return sorted(names | {name for query in val for name in query["gt_img_ids"]})


def float32_precisions(benchmark, ranking, k):
    """AP@K of each query in float32, the arithmetic of CIRCO's official evaluator."""
    values = []
    for query, row in zip(benchmark.queries, ranking.image_ids, strict=True):
        labels = np.isin(row, query.target_ids).astype(np.uint8)
        precisions = (np.cumsum(labels) * labels).astype(np.float32) / np.arange(1, 51, dtype=np.float32)
        values.append(float(precisions[:k].sum(dtype=np.float32) / np.float32(min(len(query.target_ids), k))))
    return values


def test_circo(root, oracle):
    names = circo_gallery(root)
    assert len(names) == 1903
    benchmark = load_benchmark("circo", root, gallery_ids=names)
    assert len(benchmark.queries) == 220
    place = {str(name): row for row, name in enumerate(names)}
    rng = np.random.default_rng(2)
    gallery_GD = noise(rng, len(names), 64)
    toward = [gallery_GD[[place[name] for name in query.target_ids]].mean(axis=0) for query in benchmark.queries]
    query_QD = unit(np.float32(0.35) * np.stack(toward) + noise(rng, 220, 64))
    ranking = rank(benchmark, query_QD @ gallery_GD.T, benchmark.gallery_ids, 50)
    result = evaluate(ranking, benchmark)
    expected = oracle["circo_val_seed2_synthetic_gallery(1903)"]
    for k in (5, 10, 25, 50):
        assert percent(result, f"recall@{k}") == pytest.approx(expected[f"recall@{k}"], rel=1e-9)
        assert percent(result, f"map@{k}") == pytest.approx(expected[f"mAP@{k}"], rel=2e-8)  # float32 in the oracle:
        assert 100 * np.mean(float32_precisions(benchmark, ranking, k)) == pytest.approx(expected[f"mAP@{k}"], rel=1e-9)
    assert {name: len(ids) for name, ids in benchmark.aspects.items()} == ASPECT_COUNTS
    assert {f"map@10/{name}" for name in ASPECT_COUNTS} <= set(result.metrics)
    column = np.array(result.per_query.column("map@10").to_pylist())
    rows = [row for row, query in enumerate(benchmark.queries) if query.query_id in benchmark.aspects["negation"]]
    assert result.metrics["map@10/negation"] == pytest.approx(column[rows].mean(), rel=1e-14)


def test_circo_official_example_submission_and_splits(root):
    submission = json.loads((root / "circo/submission_examples/submission_val.json").read_text())
    names = sorted({name for ranked in submission.values() for name in ranked} | set(circo_gallery(root)))
    benchmark = load_benchmark("circo", root, gallery_ids=names)
    ids = np.array([submission[query.query_id] for query in benchmark.queries]).astype(np.str_)
    scores = np.tile(np.arange(50, 0, -1, dtype=np.float32), (220, 1))
    result = evaluate(Ranking(tuple(query.query_id for query in benchmark.queries), ids, scores), benchmark)
    assert [round(percent(result, f"map@{k}"), 2) for k in (5, 10, 25, 50)] == [0.49, 0.52, 0.54, 0.60]
    assert [round(percent(result, f"recall@{k}"), 2) for k in (5, 10, 25, 50)] == [0.91, 0.91, 1.36, 3.64]
    test = load_benchmark("circo", root, split="test", gallery_ids=names)
    assert (len(test.queries), test.has_targets, dict(test.aspects)) == (800, False, {})
    targets = {name for query in benchmark.queries for name in query.target_ids}
    assert len({query.reference_id for query in benchmark.queries} & targets) == 8  # never remove references globally


@pytest.mark.parametrize(("task", "repeated"), [("change_object", 1), ("focus_object", 0)])
def test_genecis(root, oracle, task, repeated):
    benchmark = load_benchmark("genecis", root, task=task)
    assert len(benchmark.queries) == 1960
    assert benchmark.protocol["repeated_images_left_out"] == repeated
    rng = np.random.default_rng(3)  # an embedding for each query's 15 places, whichever pictures they show
    gallery_QMD = noise(rng, 1960 * 15, 64).reshape(1960, 15, 64)
    query_QD = unit(np.float32(0.25) * gallery_QMD[:, 0] + noise(rng, 1960, 64))
    scores = np.einsum("qd,qmd->qm", query_QD, gallery_QMD)
    rows = json.loads((root / f"genecis/genecis/{task}.json").read_text())
    ids = np.array([[str(item["val_image_id"]) for item in (row["target"], *row["gallery"])] for row in rows])
    again = np.array([[name in row[:place] for place, name in enumerate(row)] for row in ids.tolist()])
    assert int(again.sum()) == repeated
    scores[again], ids[again] = -np.inf, ""  # the target's own picture cannot be its distractor
    order = np.argsort(-scores, axis=1, kind="stable")
    query_ids = tuple(query.query_id for query in benchmark.queries)
    ranking = Ranking(query_ids, np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))
    result = evaluate(ranking, benchmark, num_resamples=100)
    for k in (1, 2, 3):
        expected = oracle[f"genecis_{task}_seed3_target_at_index0"][f"R@{k}"]
        assert percent(result, f"recall@{k}") == pytest.approx(expected, rel=1e-9)
    same = np.where(ranking.image_ids == "", -np.inf, np.float32(0))  # a constant model that keeps the stored order
    constant = evaluate(
        Ranking(query_ids, np.take_along_axis(ids, np.argsort(again, 1, kind="stable"), 1), same), benchmark
    )
    assert constant.metrics["recall@1"] == 0
