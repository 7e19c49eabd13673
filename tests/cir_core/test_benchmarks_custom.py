"""People's own queries: the reader of both formats, its slices, every bad input by name, and the loader."""

import json
import string

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.benchmarks import (
    LOADERS,
    list_query_files,
    load_benchmark,
    plan_query_file,
    query_files,
    read_queries,
    read_query_slice,
)
from cir_core.benchmarks.custom import check_answerable, metrics_up_to
from cir_core.embedding_store import EmbeddingWriter, StoreSpec
from cir_core.evaluation import evaluate, load_ranking, save_ranking
from cir_core.schema import CirError, Query, Ranking

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("query_id", "reference", "relative_caption", "kind")]
    + [(name, pa.list_(pa.string())) for name in ("target_ids", "subset_ids")]
)


@st.composite
def query_rows(draw):
    ids = draw(st.lists(NAME, min_size=1, max_size=12, unique=True))
    names = st.lists(NAME, max_size=3, unique=True)
    optional = {"target_ids": names | st.none(), "subset_ids": names | st.none(), "kind": NAME | st.none()}
    rows = draw(
        st.lists(
            st.fixed_dictionaries({"reference": NAME, "relative_caption": TEXT}, optional=optional),
            min_size=len(ids),
            max_size=len(ids),
        )
    )
    return [{"query_id": one, **row} for one, row in zip(ids, rows, strict=True)]


def write_jsonl(path, rows, *, end="\n", ascii_only=False):
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path.write_bytes(text.encode())
    return str(path)


def write_table(path, rows, *, row_group_size=3):
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=row_group_size)
    return str(path)


def expected(rows):
    return tuple(
        Query(
            row["query_id"], row["reference"], row["relative_caption"],
            tuple(row.get("target_ids") or ()), tuple(row.get("subset_ids") or ()),
        )
        for row in rows
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(query_rows(), st.integers(1, 14), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_slices_of_any_size_and_both_formats_give_the_same_queries(tmp_path_factory, rows, size, ascii_only, end):
    folder = tmp_path_factory.mktemp("queries")
    uris = [
        write_jsonl(folder / "q.jsonl", rows, end=end, ascii_only=ascii_only),
        write_table(folder / "q.parquet", rows),
    ]
    plans = [plan_query_file(uri, size) for uri in uris]
    for uri, plan in zip(uris, plans, strict=True):
        assert read_queries(uri) == (expected(rows), {row["query_id"]: row["kind"] for row in rows if row.get("kind")})
        assert [part.num_queries for part in plan.slices[:-1]] == [size] * (len(plan.slices) - 1)
        assert tuple(query for part in plan.slices for query in read_query_slice(part)) == expected(rows)
        assert plan.counts.num_queries == len(rows)
        assert plan.counts.num_with_targets == sum(bool(row.get("target_ids")) for row in rows)
    assert plans[0].digest == plans[1].digest
    assert [part.digest for part in plans[0].slices] == [part.digest for part in plans[1].slices]


@settings(deadline=None, max_examples=40)
@given(query_rows(), st.integers(1, 40))
def test_a_stream_read_in_small_blocks_gives_the_same(tmp_path_factory, rows, block):
    uri = write_jsonl(tmp_path_factory.mktemp("queries") / "q.jsonl", rows)
    before, query_files._READ_BYTES = query_files._READ_BYTES, block
    try:
        assert read_queries(uri)[0] == expected(rows)
    finally:
        query_files._READ_BYTES = before


def row(number=0, **changes):
    return {"query_id": f"q{number}", "reference": "a", "relative_caption": "red", **changes}


GOOD = json.dumps(row()).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query_id": "q"', "line 2: not a JSON object"),
        (b"\xff\xfe{}", "line 2: not a JSON object in UTF-8"),
        (b'{"query_id": "q", "query_id": "r"}', "line 2: not a JSON object .*'query_id' twice"),
        (b"[" * 100_000, "line 2: not a JSON object"),
        (b'["q"]', "line 2: expected a JSON object, found list"),
        (b"\xef\xbb\xbf" + json.dumps(row(1)).encode(), "line 2: not a JSON object"),  # a mark belongs to the start
        (json.dumps({"query_id": "q1", "reference": "a"}).encode(), "line 2, query 'q1': relative_caption .* no such"),
        (json.dumps(row(1, refrence="a")).encode(), "line 2: unknown key 'refrence'; did you mean 'reference'"),
        (json.dumps(row(1, query_id=None)).encode(), "line 2: query_id must be a non-empty string, found None"),
        (json.dumps(row(1, reference="")).encode(), "line 2, query 'q1': reference must be a non-empty string"),
        (json.dumps(row(1, relative_caption="\ud800")).encode(), "query 'q1': relative_caption holds half of a surrog"),
        (json.dumps(row(1, target_ids="b")).encode(), "query 'q1': target_ids must be a list of non-empty strings"),
        (json.dumps(row(1, target_ids=["b", "b"])).encode(), "query 'q1': target 'b' is listed twice"),
        (json.dumps(row(1, subset_ids=["b", ""])).encode(), "query 'q1': subset_ids must be a list"),
        (json.dumps(row()).encode(), "line 2: query id 'q0' is listed twice, first in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(GOOD + line + b"\n")
    with pytest.raises(CirError, match=message) as found:
        plan_query_file(str(path), 1)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query_id": ["q0", "q1"], "reference": ["a", "b"]}, "needs the columns query_id, reference, relative_capt"),
        ({"query_id": [1, 2]}, "column 'query_id' must hold strings, found int64"),
        ({"target_ids": ["a", "b"]}, "column 'target_ids' must hold lists of strings, found string"),
        ({"target_ids": [[1], [2]]}, "column 'target_ids' must hold lists of strings, found list"),
        ({"kinds": ["a", "b"]}, "unknown column 'kinds'; did you mean 'kind'"),
        ({"reference": ["a", None]}, "row 2, query 'q1': reference must be a non-empty string, found None"),
        ({"query_id": [None, None]}, "row 1: query_id must be a non-empty string"),
        ({"query_id": ["q0", "q0"]}, "row 2: query id 'q0' is listed twice, first in row 1"),
        ({"target_ids": [["b"], ["c", None]]}, "row 2, query 'q1': target_ids must be a list"),
        ({"reference": pa.array([b"a", b"\xff"]).view(pa.string())}, "rows 1 to 2: text that is not UTF-8"),
    ],
)
def test_a_bad_table_is_named(tmp_path, columns, message):
    base = {"query_id": ["q0", "q1"], "reference": ["a", "b"], "relative_caption": ["x", "y"]}
    table = {**base, **columns} if set(columns) - {"query_id", "reference"} or len(columns) == 1 else columns
    pq.write_table(pa.table(table), tmp_path / "q.parquet")
    with pytest.raises(CirError, match=message):
        plan_query_file(str(tmp_path / "q.parquet"))


def test_other_text_types_are_read_as_text(tmp_path):
    rows = [row(n, target_ids=["b"]) for n in range(5)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(0, "query_id", table.column(0).cast(pa.large_string()))
    table = table.set_column(1, "reference", table.column(1).dictionary_encode())
    table = table.set_column(3, "target_ids", table.column(3).cast(pa.large_list(pa.string())))
    pq.write_table(table.append_column("kind", pa.nulls(5)), tmp_path / "q.parquet")
    assert read_queries(str(tmp_path / "q.parquet")) == (expected(rows), {})


def test_files_that_are_empty_damaged_or_marked(tmp_path):
    path = tmp_path / "q.jsonl"
    for nothing in (b"", b"\n \r\n"):
        path.write_bytes(nothing)
        with pytest.raises(CirError, match="holds no queries"):
            plan_query_file(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)  # a byte order mark
    assert plan_query_file(str(path)).counts.num_queries == 1
    assert read_query_slice(plan_query_file(str(path)).slices[0]) == expected([row()])
    path.write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(CirError, match="line 1: not a JSON object in UTF-8"):
        plan_query_file(str(path))
    (tmp_path / "q.parquet").write_bytes(GOOD)
    with pytest.raises(CirError, match=r"unreadable queries file .* not a sound Parquet file"):
        plan_query_file(str(tmp_path / "q.parquet"))
    pq.write_table(pa.Table.from_pylist([], SCHEMA), tmp_path / "q.parquet")
    with pytest.raises(CirError, match="holds no queries"):
        plan_query_file(str(tmp_path / "q.parquet"))


def test_a_line_that_never_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(query_files, "_MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(query_files, "_READ_BYTES", 100)
    path = tmp_path / "q.jsonl"
    path.write_bytes(GOOD + b" " * 2000)
    with pytest.raises(CirError, match="a line of more than"):
        plan_query_file(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_changes_after_the_check_is_refused(tmp_path, suffix):
    write = write_jsonl if suffix == "jsonl" else write_table
    path = tmp_path / f"q.{suffix}"
    plan = plan_query_file(write(path, [row(n) for n in range(9)]), 4)
    write(path, [row(n, relative_caption="rad") for n in range(9)])
    for part in plan.slices:
        with pytest.raises(CirError, match="changed since it was checked"):
            read_query_slice(part)
    write(path, [row(0)])
    with pytest.raises(CirError, match="changed since it was checked"):
        read_query_slice(plan.slices[-1])


def test_equal_hashes_of_different_ids_are_not_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(query_files, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    assert plan_query_file(write_jsonl(tmp_path / "q.jsonl", [row(n) for n in range(5)]), 2).counts.num_queries == 5


def test_visitors_see_every_query_once_and_names_expand(tmp_path):
    rows = [row(n) for n in range(7)]
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, rows)
    write_table(tmp_path / "c.parquet", rows)
    (tmp_path / "readme.txt").write_text("x")
    seen = []
    plan_query_file(str(tmp_path / "a.jsonl"), 3, visit=seen.extend)
    assert tuple(seen) == expected(rows)
    names = [uri.rpartition("/")[2] for uri in list_query_files(str(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert len(list_query_files(f"{tmp_path}/*.jsonl")) == 2
    with pytest.raises(CirError, match=r"ends in \.jsonl or \.parquet"):
        list_query_files(str(tmp_path / "readme.txt"))


GALLERY = [*string.ascii_lowercase]


def test_the_loader_reads_files_and_folders(tmp_path):
    uri = write_jsonl(tmp_path / "test.jsonl", [row(0, target_ids=["b"], kind="k"), row(1, reference="s3://x/y.jpg", target_ids=["c"])])  # fmt: skip
    for root in (uri, str(tmp_path)):
        benchmark = load_benchmark("custom", root, "test", gallery_ids=GALLERY)
        assert [query.reference_id for query in benchmark.queries] == ["a", "s3://x/y.jpg"]
        assert (benchmark.has_targets, benchmark.own_galleries, benchmark.max_k) == (True, False, 50)
        assert benchmark.query_kinds == {"q0": "k"}
        assert benchmark.protocol["gallery"] == "explicit"
    write_table(tmp_path / "queries.parquet", [row()])
    assert not load_benchmark("custom", str(tmp_path), "val", gallery_ids=GALLERY).has_targets
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "b.jsonl", [row(1, kind="k")])
    write_table(tmp_path / "more" / "a.parquet", [row()])
    benchmark = load_benchmark("custom", str(tmp_path / "more"), gallery_ids=GALLERY)
    assert [query.query_id for query in benchmark.queries] == ["q0", "q1"]
    assert benchmark.query_kinds == {"q1": "k"}
    own = write_jsonl(tmp_path / "own.jsonl", [row(0, subset_ids=["b", "c"])])
    assert load_benchmark("custom", own, gallery_ids=GALLERY).own_galleries


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row(0, target_ids=["b"]), row(1)], {}, r"1 of 2 queries have target_ids, query 'q1' of .*q\.jsonl has none"),
        ([row(0, subset_ids=["b"]), row(1)], {}, "1 of 2 queries have subset_ids, query 'q1' of"),
        ([row(0, target_ids=["zz"])], {}, "query 'q0': its target 'zz' is not in the gallery"),
        ([row(0, target_ids=["a"])], {}, "query 'q0': its reference 'a' is a target, yet removed"),
        ([row()], {"gallery_ids": None}, "needs one gallery"),
        ([row()], {"gallery": "/nowhere"}, "needs one gallery"),
        ([row()], {"gallery_ids": None, "gallery": "/nowhere"}, "/nowhere: this embedding store does not exist"),
        ([row()], {"reference": "gone"}, "reference must be 'removed' or 'kept'"),
        ([], {}, "holds no queries"),
    ],
)
def test_the_loader_names_what_is_wrong(tmp_path, rows, options, message):
    uri = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(CirError, match=message):
        load_benchmark("custom", uri, **{"gallery_ids": GALLERY, **options})


def test_a_folder_that_does_not_say_which_file_is_meant(tmp_path):
    with pytest.raises(CirError, match=r"no \*\.jsonl or \*\.parquet file in this folder"):
        load_benchmark("custom", str(tmp_path), gallery_ids=GALLERY)
    write_jsonl(tmp_path / "val.jsonl", [row()])
    write_table(tmp_path / "val.parquet", [row()])
    with pytest.raises(CirError, match=r"holds val\.jsonl and val\.parquet"):
        load_benchmark("custom", str(tmp_path), gallery_ids=GALLERY)
    assert "custom" in LOADERS


def test_a_saved_ranking_is_scored_again_with_the_ids_of_a_store(tmp_path):
    spec = StoreSpec("m", "own", "w", "", "c", "t", "p", 2, "float32", "i", "fp32")
    writer = EmbeddingWriter(str(tmp_path / "store"), spec)
    writer.write_part(0, GALLERY, np.tile(np.float32([1, 0]), (26, 1)))
    writer.commit(rows_in=26)
    queries = [row(0, target_ids=["c"]), row(1, target_ids=["b"], reference="https://x/y.png")]
    uri = write_jsonl(tmp_path / "q.jsonl", queries)
    ids = np.array([["b", "c", *GALLERY[3:]], GALLERY[1:]])
    scores = np.tile(np.linspace(1, 0, 25, dtype=np.float32), (2, 1))
    save_ranking({0.8: Ranking(("q0", "q1"), ids, scores)}, str(tmp_path / "part.parquet"))
    benchmark = load_benchmark("custom", uri, gallery=str(tmp_path / "store"))
    with pytest.raises(CirError, match="query 'q1' has 25"):  # 'a' is no reference of q1, so it may not be missing
        evaluate(load_ranking(str(tmp_path / "part.parquet"))[0.8], benchmark)
    whole = np.array([["b", "c", *GALLERY[3:], ""], [*GALLERY[1:], "a"]])
    scores = np.tile(np.linspace(1, 0, 26, dtype=np.float32), (2, 1))
    scores[0, -1] = -np.inf
    save_ranking({0.8: Ranking(("q0", "q1"), whole, scores)}, str(tmp_path / "part.parquet"))
    result = evaluate(load_ranking(str(tmp_path / "part.parquet"))[0.8], benchmark)
    assert (result.metrics["recall@1"], result.metrics["recall@5"]) == (0.5, 1.0)
    assert benchmark.protocol["store"] == spec.identity


def test_helpers_for_parts_of_a_catalogue():
    assert metrics_up_to(60)[0] == "recall@10"
    assert metrics_up_to(1) == ("recall@1",)
    check_answerable(Query("q", "a", "x", ("b",), ("a", "b")), reference_removed=True)
    with pytest.raises(CirError, match="query 'q': its reference 'a' is a target"):
        check_answerable(Query("q", "a", "x", ("a",)), reference_removed=True)
    with pytest.raises(CirError, match="query 'q': a target is not in the query's own gallery"):
        check_answerable(Query("q", "a", "x", ("b",), ("c",)), reference_removed=False)
