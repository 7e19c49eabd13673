"""Benchmarks: the scenes loader on generated and hand-made folders, and the checks of Benchmark."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from cir_core.benchmarks import (
    LOADERS,
    Benchmark,
    load_benchmark,
    metric_parts,
    protocol_options,
    read_queries,
)
from cir_core.scenes.write import write_benchmark
from cir_core.schema import CirError, Query


def line(number: int = 0, **changes: object) -> dict[str, object]:
    base = {
        "query_id": f"q{number}",
        "reference": "a",
        "relative_caption": "make it red",
        "target_ids": ["b"],
        "kind": "change",
    }
    return {**base, **changes}


def write_folder(root: Path, lines: list[dict[str, object]], **changes: object) -> str:
    folder = root / "val"
    folder.mkdir(parents=True)
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    summary = {"name": "scenes", "version": 1, "seed": 0, "num_gallery": 3, "num_queries": len(lines)}
    summary["gallery_ids"] = ["a", "b", "c"]
    (folder / "benchmark.json").write_text(json.dumps({**summary, **changes}))
    return str(root)


def test_the_generators_folder_loads(tmp_path):
    write_benchmark(str(tmp_path), "val", 8, seed=3)
    benchmark = load_benchmark("scenes", tmp_path)
    summary = json.loads((tmp_path / "val" / "benchmark.json").read_text())
    assert (len(benchmark.queries), len(benchmark.gallery_ids)) == (
        summary["num_queries"],
        summary["num_gallery"],
    )
    assert benchmark.gallery_ids == tuple(summary["gallery_ids"])
    assert set(benchmark.query_kinds.values()) == {"show", "change", "remove", "add"}
    assert sorted(Path(benchmark.image_shards).glob("*.tar"))
    assert benchmark.protocol["seed"] == 3
    assert benchmark.protocol["gallery_size"] == len(benchmark.gallery_ids)
    assert pickle.loads(pickle.dumps(benchmark)) == benchmark  # noqa: S301 - it travels between processes


def test_a_hand_made_folder_gives_exactly_what_it_says(tmp_path):
    root = write_folder(tmp_path, [line(0, target_ids=["b", "c"]), line(1, reference="c", relative_caption="")])
    benchmark = load_benchmark("scenes", root)
    assert benchmark.queries == (Query("q0", "a", "make it red", ("b", "c")), Query("q1", "c", "", ("b",)))
    assert benchmark.query_kinds == {"q0": "change", "q1": "change"}
    assert benchmark.reference_removed
    assert benchmark.max_k == 50
    assert not load_benchmark("scenes", root, reference="kept").reference_removed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: load_benchmark("scene", root), "did you mean 'scenes'"),
        (lambda root: load_benchmark("scenes", root, referense="kept"), "did you mean 'reference'"),
        (lambda root: load_benchmark("scenes", root, reference="dropped"), "'removed' or 'kept', not"),
        (lambda root: load_benchmark("scenes", root, "test"), r"test/benchmark.json: missing"),
    ],
)  # fmt: skip
def test_wrong_names_and_options_list_the_valid_ones(tmp_path, call, message):
    with pytest.raises(CirError, match=message):
        call(write_folder(tmp_path, [line()]))


def test_options_come_from_the_loaders_signatures():
    assert protocol_options("scenes") == {"reference": "removed"}
    assert set(LOADERS) >= {"scenes"}


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([line(), line()], {}, "query id 'q0' is listed twice"),
        ([line(), line(1, target_ids=[])], {}, "query 'q1': has no ground truth"),
        ([line(), line(1, target_ids=["z"])], {}, "query 'q1': its target 'z' is not in the gallery"),
        ([line(), line(1, reference="z")], {}, "query 'q1': its reference 'z' is not in the gallery"),
        ([line(), line(1, target_ids=["a"])], {}, "query 'q1': its reference 'a' is a target"),
        ([line(), line(1, target_ids=["b", "b"])], {}, "query 'q1': target 'b' is listed twice"),
        ([line()], {"gallery_ids": ["a", "b", "b"]}, "gallery id 'b' is listed twice"),
        ([line()], {"gallery_ids": ["a", "b", ""]}, "an empty gallery id"),
        ([line()], {"gallery_ids": ["a", "b", 3]}, "gallery_ids must be strings"),
        ([line()], {"num_gallery": 4}, "num_gallery = 4, found 3"),
        ([line()], {"num_queries": 9}, "num_queries = 9, found 1"),
        ([line()], {"version": 2}, "version 2, expected 'scenes' version 1"),
        ([line()], {"name": "cirr"}, "is 'cirr' version 1"),
        ([line()], {"seed": None}, "seed must be of type int"),
        ([], {}, "0 queries"),
    ],
)
def test_faulty_benchmarks_are_refused_by_name(tmp_path, lines, changes, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("scenes", write_folder(tmp_path, lines, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query_id": "q"', "line 2: not a JSON object"),
        ("[1]", "line 2: expected a JSON object, found list"),
        (json.dumps(line(target_id=["b"])), "line 2: unknown key 'target_id'; did you mean 'target_ids'"),
        (json.dumps({"query_id": "q", "reference": "a"}), "line 2.*: relative_caption must be .* no such key"),
        (json.dumps(line(query_id="")), "line 2: query_id must be a non-empty string, found ''"),
        (json.dumps(line(reference=7)), "line 2.*: reference must be a non-empty string, found 7"),
        (json.dumps(line(target_ids="b")), "line 2.*: target_ids must be a list"),
        (json.dumps(line(target_ids=["b", None])), "line 2.*: target_ids must be a list"),
        (json.dumps(line(kind=3)), "line 2.*: kind must be"),
        ('{"query_id": "\\udc80\xff"', "line 2: not a JSON object"),
    ],
)
def test_a_faulty_line_of_queries_is_named(tmp_path, text, message):
    path = tmp_path / "queries.jsonl"
    path.write_bytes(json.dumps(line()).encode() + b"\n" + text.encode("latin-1") + b"\n")
    with pytest.raises(CirError, match=message):
        read_queries(str(path))


def test_queries_keep_subsets_unusual_text_and_skip_blank_lines(tmp_path):
    path = tmp_path / "queries.jsonl"
    caption = "größer \u2028 <b>&"  # a line separator inside a string does not end the line
    bare = {"query_id": "x", "reference": "u", "relative_caption": ""}
    rows = [line(0, relative_caption=caption, subset_ids=["a", "b"]), bare]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n", encoding="utf-8")
    queries, kinds = read_queries(str(path))
    assert queries == (Query("q0", "a", caption, ("b",), ("a", "b")), Query("x", "u", ""))
    assert kinds == {"q0": "change"}


BENCHMARK = Benchmark(
    name="hand",
    split="val",
    queries=(Query("q0", "a", "x", ("b",), ("b", "c")),),
    gallery_ids=("a", "b", "c"),
    protocol={"reference": "removed"},
    metrics=("recall@5", "recall_subset@1", "map@10"),
    headline="recall@5",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headline": "recall@1"}, "headline 'recall@1' is not among"),
        ({"metrics": ("recall@5", "ndcg@5")}, "unknown metric 'ndcg@5'; known: recall@K"),
        ({"protocol": {"reference": "gone"}}, "must be 'removed' or 'kept'"),
        ({"queries": (Query("q0", "a", "x", ("b",), ("z",)),)}, "query 'q0': its subset member 'z' is not"),
        ({"gallery_ids": ()}, "0 gallery images"),
    ],
)
def test_benchmark_checks_itself(changes, message):
    with pytest.raises(CirError, match=message):
        replace(BENCHMARK, **changes)


def test_a_split_with_hidden_answers_may_lack_targets():
    hidden = replace(BENCHMARK, queries=(Query("q0", "a", "x"),), has_targets=False)
    assert hidden.queries[0].target_ids == ()
    assert hidden.max_k == 10


@pytest.mark.parametrize("name", ["recall", "recall@0", "recall@x", "@5", "recall@5 ", "Recall@5"])
def test_malformed_metric_names_are_refused(name):
    with pytest.raises(CirError, match="unknown metric"):
        metric_parts(name)
