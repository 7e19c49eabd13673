"""Submission files: what is written is valid, the authors' own files are valid, each broken one says why.

The library of broken files runs over made-up benchmarks, and over the authors' example files where the
environment variable CIR_BENCHMARKS names a folder of annotations.
"""

import copy
import json
import os
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core import files
from cir_core.benchmarks import Benchmark, load_benchmark
from cir_core.benchmarks.circo import COCO_IMAGES
from cir_core.evaluation import validate_submission, write_submission
from cir_core.evaluation.submission import MAX_BYTES
from cir_core.schema import CirError, Query, Ranking

EXAMPLES = {
    "recall": "cirr/demo_files/test1_pred_ranks_recall.json",
    "recall_subset": "cirr/demo_files/test1_pred_ranks_recall_subset.json",
    "test": "circo/submission_examples/submission_test.json",
    "val": "circo/submission_examples/submission_val.json",
}
CIRR_FILES, CIRCO_FILES = ("recall", "recall_subset"), ("test", "val")


def make_benchmark(name, split, queries, gallery_ids, **changes):
    cirr = name == "cirr"
    parts = {
        "name": name,
        "split": split,
        "queries": tuple(queries),
        "gallery_ids": tuple(gallery_ids),
        "protocol": {"reference": "removed" if cirr else "kept"},
        "metrics": ("recall@50",) if cirr else ("map@50",),
        "headline": "recall@50" if cirr else "map@50",
        "has_targets": False,
    }
    return Benchmark(**{**parts, **changes})


@cache
def small_cirr():
    groups = [[f"test1-{group}-{image}-img{image % 2}" for image in range(6)] for group in range(12)]
    queries = [Query(str(100 + n), group[n % 6], "x", (), tuple(group)) for n, group in enumerate(groups)]
    return make_benchmark("cirr", "test1", queries, [name for group in groups for name in group])


@cache
def small_circo(split):
    gallery = [str(number) for number in range(1000, 1160, 2)]
    return make_benchmark("circo", split, [Query(str(n), gallery[3 * n], "x") for n in range(12)], gallery)


def make_ranking(benchmark, seed=0):
    """The whole gallery in random order, scores with ties."""
    rng = np.random.default_rng(seed)
    gallery = np.array(benchmark.gallery_ids)
    scores = np.floor(rng.random((len(benchmark.queries), len(gallery))) * 40).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    top = np.take_along_axis(scores, order, axis=1)
    return Ranking(tuple(query.query_id for query in benchmark.queries), gallery[order], top)


def expected_content(benchmark, ranking, kind):
    """The file of a ranking over the whole gallery, said as plainly as the servers' pages say it."""
    rows = dict(zip(ranking.query_ids, ranking.image_ids.tolist(), strict=True))
    if kind in CIRCO_FILES:
        return {query.query_id: list(map(int, rows[query.query_id][:50])) for query in benchmark.queries}
    content = {"version": "rc2", "metric": kind}
    for query in benchmark.queries:
        others = [name for name in rows[query.query_id] if name != query.reference_id]
        group = [name for name in others if name in query.subset_ids]
        content[query.query_id] = others[:50] if kind == "recall" else group[:3]
    return content


def made_up(kind):
    benchmark = small_cirr() if kind in CIRR_FILES else small_circo(kind)
    return benchmark, expected_content(benchmark, make_ranking(benchmark), kind)


def annotations(path=""):
    root = os.environ.get("CIR_BENCHMARKS")
    if not root:
        pytest.skip("CIR_BENCHMARKS does not name a folder of benchmark annotations")
    return Path(root) / path


@cache
def official(kind):
    """An example file of the authors, with its benchmark. COCO's list is not at hand: its images stand in."""
    content = json.loads(annotations(EXAMPLES[kind]).read_text())
    if kind in CIRR_FILES:
        return load_benchmark("cirr", str(annotations("cirr")), split="test1"), content
    listed = {str(name) for names in content.values() for name in names}
    return circo_with(kind, listed), content


def circo_with(split, names):
    """CIRCO with a gallery of its references, its targets and these images."""
    rows = json.loads(annotations(f"circo/annotations/{split}.json").read_text())
    own = {str(name) for row in rows for name in (row["reference_img_id"], *row.get("gt_img_ids", ()))}
    return load_benchmark("circo", str(annotations("circo")), split=split, gallery_ids=sorted({*own, *names}, key=int))


@pytest.fixture(params=["made up", "official"])
def case(request):
    """kind -> (benchmark, a valid file's content, to be changed at will)."""
    make = made_up if request.param == "made up" else official

    def copied(kind):
        benchmark, content = make(kind)
        return benchmark, {key: list(value) if isinstance(value, list) else value for key, value in content.items()}

    return copied


@pytest.fixture
def check(tmp_path):
    """violations(benchmark, content or text or bytes), through a file."""

    def violations(benchmark, content):
        path = tmp_path / "submission.json"
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return validate_submission(str(path), benchmark)

    return violations


@pytest.mark.parametrize("kind", EXAMPLES)
def test_good_files_are_valid(case, check, kind):
    benchmark, content = case(kind)
    assert check(benchmark, content) == []
    shuffled = dict(sorted(content.items(), reverse=True))
    assert check(benchmark, json.dumps(shuffled, indent=1 if kind in CIRCO_FILES else None)) == []


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_authors_example_files_are_valid_byte_for_byte(kind):
    benchmark, _ = official(kind)
    assert validate_submission(annotations(EXAMPLES[kind]), benchmark) == []


# --- the library of broken files: each has one fault, and that one is named, with query and value ---


def first(content):
    return next(key for key in content if key not in ("version", "metric"))


def stranger(benchmark, query_id, listed):
    """A gallery image that is no member of the query's group and not listed yet."""
    query = next(query for query in benchmark.queries if query.query_id == query_id)
    taken = {query.reference_id, *query.subset_ids, *map(str, listed)}
    name = next(name for name in benchmark.gallery_ids if name not in taken)
    return int(name) if benchmark.name == "circo" else name


def reference(benchmark, query_id):
    return next(query.reference_id for query in benchmark.queries if query.query_id == query_id)


def put(value):
    """Replace the first image that the query lists."""
    return lambda benchmark, content, query: content[query].__setitem__(0, value)


def set_key(key, value):
    return lambda benchmark, content, query: content.__setitem__(key or query, value)


def repeat_first(benchmark, content, query):
    content[query][1] = content[query][0]
    return content[query][0]


def one_more(benchmark, content, query):
    if content.get("metric") == "recall_subset":
        group = next(item.subset_ids for item in benchmark.queries if item.query_id == query)
        extra = next(name for name in group if name not in (*content[query], reference(benchmark, query)))
    else:
        extra = stranger(benchmark, query, content[query])
    content[query].append(extra)


def put_reference(benchmark, content, query):
    content[query][0] = reference(benchmark, query)
    return content[query][0]


def put_stranger(benchmark, content, query):
    content[query][0] = stranger(benchmark, query, content[query])
    return content[query][0]


ANY = {
    "a query is missing": (lambda b, c, q: c.pop(q) and None, "query '{q}': is missing"),
    "an unknown query": (lambda b, c, q: c.update({"x": c[q]}), "query 'x': is not a query of this split"),
    "a query with a zero in front": (
        lambda b, c, q: c.update({f"0{q}": c[q]}),
        "query '0{q}': is not a query of this split",
    ),
    "one image too few": (lambda b, c, q: c[q].pop() and None, "query '{q}': needs {n} images, lists: {n-1}"),
    "one image too many": (one_more, "query '{q}': needs {n} images, lists: {n+1}"),
    "no images": (set_key(None, []), "query '{q}': needs {n} images, lists: 0"),
    "an image twice": (repeat_first, "query '{q}': lists an image more than once: {value!r}"),
    "null for a list": (set_key(None, None), "query '{q}': needs a list of images, has: None"),
    "a string for a list": (set_key(None, "abc"), "query '{q}': needs a list of images, has: 'abc'"),
    "an object for a list": (set_key(None, {"0": 1}), "query '{q}': needs a list of images, has: {'0': 1}"),
}
CIRR = {
    **ANY,
    "no version": (lambda b, c, q: c.pop("version") and None, '"version": is missing, must be "rc2"'),
    "another version": (set_key("version", "rc1"), '"version": must be "rc2", is: \'rc1\''),
    "a version that is a list": (set_key("version", ["rc2"]), '"version": must be "rc2", is: [\'rc2\']'),
    "no metric": (
        lambda b, c, q: c.pop("metric") and None,
        '"metric": is missing, must be "recall" or "recall_subset"',
    ),
    "another metric": (
        set_key("metric", "Recall"),
        '"metric": must be "recall" or "recall_subset", is: \'Recall\'',
    ),
    "a metric that is an object": (
        set_key("metric", {}),
        '"metric": must be "recall" or "recall_subset", is: {}',
    ),
    "the reference is listed": (put_reference, "query '{q}': lists its own reference: {value!r}"),
    "a file name": (
        put("test1-0-0-img0.png"),
        "query '{q}': lists an image that is not in the gallery: 'test1-0-0-img0.png'",
    ),
    "an empty name": (put(""), "query '{q}': lists an image that is not in the gallery: ''"),
    "a number for a name": (put(7), "query '{q}': lists an entry that is not a string: 7"),
    "null for a name": (put(None), "query '{q}': lists an entry that is not a string: None"),
    "a list for a name": (put(["a"]), "query '{q}': lists an entry that is not a string: ['a']"),
}
SUBSET = {**CIRR, "outside the group": (put_stranger, "query '{q}': lists an image outside its group: {value!r}")}
CIRCO = {
    **ANY,
    "an unknown id": (put(581_930), "query '{q}': lists an image that is not in the gallery: 581930"),
    "an id past COCO's": (put(999_999_999), "query '{q}': lists an image that is not in the gallery: 999999999"),
    "a negative id": (put(-1), "query '{q}': lists an image that is not in the gallery: -1"),
    "an id that is no machine integer": (
        put(10**30),
        f"query '{{q}}': lists an image that is not in the gallery: {10**30}",
    ),
    "a string for an id": (put("1000"), "query '{q}': lists an entry that is not an integer: '1000'"),
    "a float for an id": (put(1000.0), "query '{q}': lists an entry that is not an integer: 1000.0"),
    "true for an id": (put(True), "query '{q}': lists an entry that is not an integer: True"),
    "CIRR's header": (set_key("version", "rc2"), "query 'version': is not a query of this split"),
}
LIBRARY = [
    pytest.param(kind, *fault, id=f"{kind}: {name}")
    for kind, faults in {"recall": CIRR, "recall_subset": SUBSET, "test": CIRCO, "val": CIRCO}.items()
    for name, fault in faults.items()
]


@pytest.mark.parametrize(("kind", "break_it", "message"), LIBRARY)
def test_each_broken_file_fails_for_its_own_reason_only(case, check, kind, break_it, message):
    benchmark, content = case(kind)
    query, length = first(content), 3 if kind == "recall_subset" else 50
    value = break_it(benchmark, content, query)
    for name, text in {"{q}": query, "{n}": length, "{n-1}": length - 1, "{n+1}": length + 1}.items():
        message = message.replace(name, str(text))
    assert check(benchmark, content) == [message.replace("{value!r}", repr(value))]


TEXTS = {
    "nothing": (lambda good: "", "the file is not JSON: Expecting value"),
    "cut short": (lambda good: good[:-1], "the file is not JSON: Expecting ',' delimiter"),
    "a comma too many": (lambda good: good[:-1] + ",}", "the file is not JSON: "),
    "two files": (lambda good: good + good, "the file is not JSON: Extra data"),
    "a byte order mark": (lambda good: "\ufeff" + good, "the file is not JSON: Unexpected UTF-8 BOM"),
    "UTF-16": (lambda good: good.encode("utf-16"), "the file is not JSON: 'utf-8' codec can't decode"),
    "a list": (lambda good: f"[{good}]", "the file must hold a JSON object, holds list"),
    "null": (lambda good: "null", "the file must hold a JSON object, holds NoneType"),
    "NaN": (lambda good: good.replace("[", "[NaN,", 1), "the file is not JSON: NaN"),
    "an endless number": (lambda good: good.replace("[", "[" + "1" * 5000, 1), "the file is not JSON: Exceeds"),
    "nested lists": (lambda good: "[" * 100_000, "the file is not a submission: its JSON is nested too deeply"),
    "nested objects": (lambda good: '{"0":' * 100_000, "the file is not a submission: its JSON is nested too deeply"),
    "zeros": (lambda good: bytes(1000), "the file is not JSON"),
    "too large": (lambda good: good + " " * MAX_BYTES, "the file has 5,"),
}


@pytest.mark.parametrize(("make_text", "message"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", ["recall", "val"])
def test_text_that_is_no_submission_is_one_violation(check, kind, make_text, message):
    benchmark, content = made_up(kind)
    (violation,) = check(benchmark, make_text(json.dumps(content)))
    assert violation.startswith(message)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_repeated_key_is_seen_even_where_both_lists_are_valid(case, check, kind):
    benchmark, content = case(kind)
    query = first(content)
    text = f'{json.dumps(content)[:-1]}, "{query}": {json.dumps(content[query])}}}'
    assert check(benchmark, text) == [f"key '{query}': is in the file more than once"]
    nested = json.dumps(content)[:-1] + ', "x": {"a": 1, "a": 2}}'
    assert check(benchmark, nested) == ["query 'x': is not a query of this split"]


def test_the_size_limit_is_five_million_bytes(check):
    benchmark, content = made_up("recall")
    text = json.dumps(content)
    assert check(benchmark, text.ljust(MAX_BYTES)) == []
    (violation,) = check(benchmark, text.ljust(MAX_BYTES + 1))
    assert violation == "the file has 5,000,001 bytes, the limit is 5,000,000 (5 MB)"


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    tracemalloc.start()
    assert len(validate_submission(str(path), small_cirr())) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_integers_that_share_one_hash_do_not_stall_the_check(check):
    numbers = ",".join(str((2**61 - 1) * n) for n in range(1, 200_000))
    start = time.perf_counter()
    violations = check(small_circo("test"), f'{{"0": [{numbers}]}}')
    assert time.perf_counter() - start < 30  # under a second; hours if they all went into one set
    assert "query '0': needs 50 images, lists: 199999" in violations


@pytest.mark.parametrize("kind", EXAMPLES)
def test_many_violations_of_a_rule_are_named_and_then_counted(case, check, kind):
    benchmark, content = case(kind)
    for query in benchmark.queries:
        content[query.query_id].pop()
    violations = check(benchmark, content)
    assert len(violations) == 11
    assert violations[0].startswith(f"query {benchmark.queries[0].query_id!r}: needs ")
    length = 3 if kind == "recall_subset" else 50
    assert violations[10] == f"and {len(benchmark.queries) - 10} more: needs {length} images, lists"


def test_faults_of_different_rules_are_all_named(check):
    benchmark, content = made_up("recall")
    content["100"][0], content["101"][3] = reference(benchmark, "100"), "nobody"
    content["version"] = "rc1"
    del content["102"]
    content["103"] = [*content["103"][:10], "nobody"]
    assert Counter(violation.partition(":")[0] for violation in check(benchmark, content)) == {
        '"version"': 1,
        "query '100'": 1,
        "query '101'": 1,
        "query '102'": 1,
        "query '103'": 2,
    }


def test_the_files_of_one_metric_under_the_name_of_the_other(case, check):
    for kind, other in (CIRR_FILES, CIRR_FILES[::-1]):
        benchmark, content = case(kind)
        violations = check(benchmark, {**content, "metric": other})
        needed, found = (50, 3) if other == "recall" else (3, 50)
        assert violations[0] == f"query {first(content)!r}: needs {needed} images, lists: {found}"


@pytest.mark.parametrize("split", ["val", "test"])
def test_circo_without_its_gallery_list_checks_the_range_of_coco(split, check):
    benchmark, content = made_up(split)
    elsewhere = {query: [500_000 + 7 * place for place in range(50)] for query in content}
    assert check(benchmark, elsewhere) == []  # the gallery is a stand-in that says nothing of these
    elsewhere["0"][0], elsewhere["1"][5], elsewhere["2"][5] = 7, 581_932, 581_931
    assert check(benchmark, elsewhere) == [
        "query '0': lists an image that is not in the gallery: 7",
        "query '1': lists an image that is not in the gallery: 581932",
    ]
    everything = replace(benchmark, gallery_ids=tuple(map(str, range(1000, 1000 + COCO_IMAGES))))
    violations = check(everything, elsewhere)
    assert len(violations) == 11
    assert violations[-1] == "and 590 more: lists an image that is not in the gallery"


@pytest.mark.parametrize("kind", CIRCO_FILES)
def test_circo_examples_are_valid_with_a_stand_in_gallery(kind, check):
    """Without COCO's list: the references and targets alone, few of which the examples list."""
    _, content = official(kind)
    stand_in = circo_with(kind, ())
    assert check(stand_in, content) == []
    changed = {**content, "3": [999_999, *content["3"][1:]]}
    assert check(stand_in, changed) == ["query '3': lists an image that is not in the gallery: 999999"]


# --- writing ---


def test_cirr_files_hold_the_top_of_the_ranking_without_references(tmp_path):
    benchmark, ranking = small_cirr(), make_ranking(small_cirr())
    uris = write_submission(ranking, benchmark, str(tmp_path / "new" / "folder"))
    assert [Path(uri).name for uri in uris] == ["cirr_test1_recall.json", "cirr_test1_recall_subset.json"]
    for uri, kind in zip(uris, CIRR_FILES, strict=True):
        assert json.loads(Path(uri).read_text()) == expected_content(benchmark, ranking, kind)
        assert validate_submission(uri, benchmark) == []
    assert validate_submission(str(tmp_path / "new" / "folder"), benchmark) == []
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [Path(uri).name for uri in uris]


@pytest.mark.parametrize("split", CIRCO_FILES)
def test_circo_file_holds_integers(tmp_path, split):
    benchmark = small_circo(split)
    ranking = make_ranking(benchmark)
    (uri,) = write_submission(ranking, benchmark, str(tmp_path))
    assert uri == str(tmp_path / f"circo_{split}.json")
    assert json.loads(Path(uri).read_text()) == expected_content(benchmark, ranking, split)
    assert validate_submission(uri, benchmark) == validate_submission(str(tmp_path), benchmark) == []


def test_circo_ids_with_leading_zeros_become_integers_and_references_may_be_removed(tmp_path):
    plain = small_circo("test")
    queries = tuple(replace(query, reference_id=query.reference_id.zfill(12)) for query in plain.queries)
    gallery = tuple(name.zfill(12) for name in plain.gallery_ids)
    padded = replace(plain, queries=queries, gallery_ids=gallery, protocol={"reference": "removed"})
    (uri,) = write_submission(make_ranking(padded), padded, str(tmp_path))
    content = json.loads(Path(uri).read_text())
    assert all(int(query.reference_id) not in content[query.query_id] for query in queries)
    assert validate_submission(uri, plain) == []


def test_a_json_path_names_the_files(tmp_path):
    (circo,) = write_submission(make_ranking(small_circo("val")), small_circo("val"), str(tmp_path / "mine.JSON"))
    assert circo == str(tmp_path / "mine.JSON")
    assert Path(circo).exists()
    cirr = write_submission(make_ranking(small_cirr()), small_cirr(), str(tmp_path / "run.json"))
    assert [Path(uri).name for uri in cirr] == ["run_recall.json", "run_recall_subset.json"]
    assert validate_submission(str(tmp_path / "run.json"), small_cirr()) == []
    Path(cirr[1]).write_text("[]")
    (violation,) = validate_submission(str(tmp_path / "run.json"), small_cirr())
    assert violation.startswith("run_recall_subset.json: the file must hold a JSON object")
    assert write_submission(make_ranking(small_cirr()), small_cirr(), tmp_path / "run.json") == cirr  # over the old


def test_files_in_an_object_store():
    uris = write_submission(make_ranking(small_cirr()), small_cirr(), "memory://submissions/run")
    assert uris == [f"memory://submissions/run/cirr_test1_{kind}.json" for kind in CIRR_FILES]
    assert [validate_submission(uri, small_cirr()) for uri in uris] == [[], []]
    assert validate_submission("memory://submissions/run", small_cirr()) == []
    files.write_bytes("memory://submissions/big.json", b" " * (MAX_BYTES + 1))
    assert len(validate_submission("memory://submissions/big.json", small_cirr())) == 1
    with pytest.raises(CirError, match=r"no submission file here; expected memory://.*circo_val\.json"):
        validate_submission("memory://submissions/run", small_circo("val"))


def test_equal_rankings_give_equal_bytes(tmp_path):
    benchmark, ranking = small_cirr(), make_ranking(small_cirr())
    turned = Ranking(ranking.query_ids[::-1], ranking.image_ids[::-1].copy(), ranking.scores[::-1].copy())
    removed = ranking.image_ids == np.array([[query.reference_id] for query in benchmark.queries])
    order = np.argsort(removed, axis=1, kind="stable")[:, :-1]
    without = Ranking(
        ranking.query_ids,
        np.take_along_axis(ranking.image_ids, order, axis=1),
        np.take_along_axis(ranking.scores, order, axis=1),
    )
    written = [
        [Path(uri).read_bytes() for uri in write_submission(item, benchmark, str(tmp_path / str(number)))]
        for number, item in enumerate((ranking, turned, without))
    ]
    assert written[0] == written[1] == written[2]
    assert written[0][0].startswith(b'{"version":"rc2","metric":"recall","100":["test1-')


def test_a_short_ranking_with_the_group_appended_is_enough(tmp_path):
    """50 images beside the reference and then the rest of the group, as a top-k search with subsets gives."""
    benchmark, whole = small_cirr(), make_ranking(small_cirr())
    ids, scores = [], []
    for query, row, values in zip(benchmark.queries, whole.image_ids.tolist(), whole.scores, strict=True):
        keep = [place for place, name in enumerate(row) if place < 51 or name in query.subset_ids]
        ids.append([row[place] for place in keep] + [""] * (57 - len(keep)))
        scores.append([*values[keep], *[-np.inf] * (57 - len(keep))])
    short = Ranking(whole.query_ids, np.array(ids), np.array(scores, dtype=np.float32))
    for kind in ("whole", "short"):
        write_submission({"whole": whole, "short": short}[kind], benchmark, str(tmp_path / kind))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "short" / path.name).read_bytes()


def cut(ranking, k):
    return replace(ranking, image_ids=ranking.image_ids[:, :k], scores=ranking.scores[:, :k])


def without_group(ranking, benchmark, query):
    """Only 2 of the other members of a query's group stay in its list."""
    row = ranking.query_ids.index(query)
    item = benchmark.queries[row]
    others = [name for name in item.subset_ids if name != item.reference_id]
    names = [name for name in ranking.image_ids[row] if name not in others[2:]]
    ids = np.full(ranking.image_ids.shape, "", dtype=ranking.image_ids.dtype)
    ids[:] = ranking.image_ids
    ids[row] = names + [""] * 3
    scores = ranking.scores.copy()
    scores[row, len(names) :] = -np.inf
    return replace(ranking, image_ids=ids, scores=scores)


def no_groups(benchmark):
    return replace(benchmark, queries=tuple(replace(query, subset_ids=()) for query in benchmark.queries))


def refusals():
    cirr, circo = small_cirr(), small_circo("test")
    ranked, circo_ranked = make_ranking(cirr), make_ranking(circo)
    lax = replace(cirr, metrics=("recall@1",), headline="recall@1")
    names = replace(circo, gallery_ids=(*circo.gallery_ids, "COCO_7"))
    doubled = replace(circo, gallery_ids=(*circo.gallery_ids, "01002"))
    small = replace(circo, gallery_ids=circo.gallery_ids[:40])
    return {
        "too short": (cut(ranked, 50), cirr, "recall@50 needs 50 results"),
        "too short for the file only": (cut(ranked, 30), lax, "needs 50 images, the ranking holds"),
        "a group cut off": (without_group(ranked, cirr, "103"), cirr, "'103': needs 3 members of its group .* holds 2"),
        "no groups": (ranked, no_groups(cirr), "'100' has no subset_ids; recall_subset needs its image group"),
        "references kept": (
            ranked,
            replace(cirr, protocol={"reference": "kept"}),
            r"cirr_test1_recall\.json: not written, the server would refuse it: query '10\d': lists its own ref",
        ),
        "a query missing": (
            Ranking(ranked.query_ids[1:], ranked.image_ids[1:], ranked.scores[1:]),
            cirr,
            "1 missing",
        ),
        "a gallery of 40": (make_ranking(small), small, "needs 50 images, the ranking holds 40"),
        "ids that are no integers": (make_ranking(names), names, "gallery id 'COCO_7' is not a COCO image id"),
        "two names of one image": (make_ranking(doubled), doubled, "lists an image more than once: 1002"),
        "a foreign image": (circo_ranked, replace(circo, gallery_ids=circo.gallery_ids[:-1]), "gallery"),
        "another split": (ranked, replace(cirr, split="val"), "'cirr' split 'val': has no test server"),
        "another benchmark": (ranked, replace(cirr, name="fashioniq"), "has no test server .known: cirr test1, circo"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_the_server_would_refuse_is_not_written(tmp_path, name):
    ranking, benchmark, message = refusals()[name]
    with pytest.raises(CirError, match=message):
        write_submission(ranking, benchmark, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_used(tmp_path):
    benchmark, ranking = small_cirr(), make_ranking(small_cirr())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CirError, match="file: is a file; name a folder"):
        write_submission(ranking, benchmark, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(CirError, match="is not a path"):
        write_submission(ranking, benchmark, "")
    (tmp_path / "dir.json").mkdir()
    circo = small_circo("val")
    with pytest.raises(CirError, match="is a folder"):
        write_submission(make_ranking(circo), circo, str(tmp_path / "dir.json"))
    for path in (tmp_path, tmp_path / "dir.json", tmp_path / "none.json", tmp_path / "none" / "x"):
        with pytest.raises(CirError, match="no submission file here; expected"):
            validate_submission(str(path), circo)


def test_validating_needs_a_test_server_and_sound_benchmarks(check):
    _, content = made_up("recall_subset")
    with pytest.raises(CirError, match="has no test server"):
        check(replace(small_cirr(), split="val"), content)
    with pytest.raises(CirError, match="has no subset_ids"):
        check(no_groups(small_cirr()), content)
    with pytest.raises(CirError, match="not a COCO image id"):
        check(replace(small_circo("val"), gallery_ids=(*small_circo("val").gallery_ids, "²")), {})


def test_the_authors_cirr_files_come_back_from_a_ranking(tmp_path):
    """Their two files, put together to one ranking, are written again with the same content."""
    benchmark, recall = official("recall")
    _, subset = official("recall_subset")
    rows = []
    for query in benchmark.queries:
        names = recall[query.query_id]
        rows.append([*names, *(name for name in subset[query.query_id] if name not in names)])
    width = max(map(len, rows))
    ids = np.array([row + [""] * (width - len(row)) for row in rows])
    scores = np.where(ids == "", -np.inf, -np.arange(width)).astype(np.float32)
    ranking = Ranking(tuple(query.query_id for query in benchmark.queries), ids, scores)
    uris = write_submission(ranking, benchmark, str(tmp_path))
    assert json.loads(Path(uris[0]).read_text()) == recall
    assert json.loads(Path(uris[1]).read_text()) == subset
    assert validate_submission(str(tmp_path), benchmark) == []


@pytest.mark.parametrize("kind", CIRCO_FILES)
def test_the_authors_circo_files_come_back_from_a_ranking(tmp_path, kind):
    benchmark, content = official(kind)
    ids = np.array([content[query.query_id] for query in benchmark.queries]).astype(np.str_)
    scores = np.broadcast_to(-np.arange(50, dtype=np.float32), ids.shape)
    ranking = Ranking(tuple(query.query_id for query in benchmark.queries), ids, scores)
    (uri,) = write_submission(ranking, benchmark, str(tmp_path / "again.json"))
    assert json.loads(Path(uri).read_text()) == content


# --- anything at all ---

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["100", "rc2"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
KEYS = st.sampled_from(["version", "metric", "100", "101", "0", "1"]) | st.text(max_size=4)


def readable(violations):
    return all(text.isprintable() and len(text) < 200 and text.encode() for text in violations)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6) | VALUES, st.sampled_from(["recall", "val"]))
def test_any_json_gets_a_readable_verdict(tmp_path_factory, value, kind):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    benchmark, _ = made_up(kind)
    violations = validate_submission(str(path), benchmark)
    assert violations
    assert readable(violations)


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["recall_subset", "test"]), st.integers(0, 400))
def test_any_damage_gets_a_readable_verdict(tmp_path_factory, noise, kind, place):
    benchmark, content = made_up(kind)
    good = json.dumps(content).encode()
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(good[:place] + noise + good[place + len(noise) :])
    violations = validate_submission(str(path), benchmark)
    assert readable(violations)
    if not violations:
        kept = json.loads(path.read_bytes())
        assert naively_valid(benchmark, kept, kind)


def naively_valid(benchmark, content, kind):
    """The servers' rules once more, without any care for what is said of a fault."""
    queries = {query.query_id: query for query in benchmark.queries}
    if kind in CIRR_FILES and (content.pop("version", None) != "rc2" or content.pop("metric", None) != kind):
        return False
    if content.keys() != queries.keys():
        return False
    length = 3 if kind == "recall_subset" else 50
    for query_id, names in content.items():
        wanted = int if kind in CIRCO_FILES else str
        if not isinstance(names, list) or any(type(name) is not wanted for name in names):
            return False
        allowed = set(map(wanted, benchmark.gallery_ids))
        if kind in CIRR_FILES:
            allowed -= {queries[query_id].reference_id}
        if kind == "recall_subset":
            allowed &= set(queries[query_id].subset_ids)
        if len(names) != length or len(set(names)) != length or not set(names) <= allowed:
            return False
    return True


@settings(deadline=None)
@given(st.data(), st.sampled_from(list(EXAMPLES)))
def test_the_verdict_equals_a_naive_one(tmp_path_factory, data, kind):
    benchmark, good = made_up(kind)
    content = copy.deepcopy(good)
    pool = [*benchmark.gallery_ids[:8], "nobody", "1"]
    entries = st.sampled_from(pool if kind in CIRR_FILES else [*map(int, pool[:8]), 5, 1002])
    for _ in range(data.draw(st.integers(0, 3))):
        query = data.draw(st.sampled_from(sorted(content.keys() - {"version", "metric"})))
        names = content[query]
        place = data.draw(st.integers(0, len(names)))
        names[place : place + data.draw(st.integers(0, 1))] = data.draw(st.lists(entries, max_size=1))
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(content))
    violations = validate_submission(str(path), benchmark)
    assert (violations == []) == naively_valid(benchmark, content, kind), violations


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(EXAMPLES)))
def test_what_is_written_is_valid_and_is_the_ranking(tmp_path_factory, seed, kind):
    benchmark, _ = made_up(kind)
    ranking = make_ranking(benchmark, seed)
    folder = tmp_path_factory.getbasetemp() / "written"
    uris = write_submission(ranking, benchmark, str(folder))
    for uri, item in zip(uris, CIRR_FILES if kind in CIRR_FILES else (kind,), strict=True):
        assert json.loads(Path(uri).read_text()) == expected_content(benchmark, ranking, item)
        assert validate_submission(uri, benchmark) == []
