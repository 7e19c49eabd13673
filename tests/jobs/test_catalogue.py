"""People's own queries on a real cluster: as a plain search answers them, whatever the shards, parts, formats and kills."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cir_core.benchmarks import load_benchmark, read_queries
from cir_core.composition import query_weights, slerp
from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.evaluation import evaluate, load_ranking
from cir_core.preprocessing import preprocess_image
from cir_core.scenes import write_pairs
from cir_core.schema import Ranking
from cir_core.search import weighted_top_k
from cir_core.shards import read_shard
from jobs.gallery_search import Gallery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_QUERIES = 40


@pytest.fixture(scope="module")
def shop(servers, tiny_model_dir, tmp_path_factory):
    """A gallery of 120 pictures in three parts, its store, and 40 queries: every fourth reference is a picture's path."""
    home = tmp_path_factory.mktemp("shop")
    write_pairs(str(home / "pairs"), 120, shard_rows=40)
    model = f"local-dir:{tiny_model_dir}"
    done = servers.run("embed", "--data", str(home / "pairs"), "--output", str(home / "store"), "--model", model,
                       "--captions", "embed")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    write_pairs(str(home / "more"), 10, seed=7)
    (home / "pictures").mkdir()
    for number, row in enumerate(read_shard(next(str(path) for path in (home / "more").iterdir()))):
        (home / "pictures" / f"{number}.jpg").write_bytes(row.image)
    ids = EmbeddingStore.open(str(home / "store")).read_ids()
    rows = []
    for number in range(NUM_QUERIES):
        outside = str(home / "pictures" / f"{number // 4}.jpg")
        outside = f"file://{outside}" if number % 8 else outside
        rows.append(
            {
                "query_id": f"q{number}",
                "reference": ids[3 * number] if number % 4 else outside,
                "relative_caption": f"make it {'red green blue'.split()[number % 3]}",
                "target_ids": [ids[(7 * number + 1) % 120], ids[(7 * number + 5) % 120]],
            }
        )
    write_jsonl(home / "queries.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), home / "queries.parquet", row_group_size=16)
    return home


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(shop, queries, name, *more):
    return (
        "--benchmark", "custom", "--queries", str(queries), "--gallery", str(shop / "store"), "--name", name,
        "--contact_sheet_rows", "3", *more,
    )  # fmt: skip


def answer(servers, shop, queries, name, *more):
    return servers.run("batch_retrieve", *arguments(shop, queries, name, *more))


def lists(servers, name, method="slerp"):
    """Return {query: [(image, score), ...]} of a run, per alpha."""
    found = {}
    for part in sorted((servers.storage / "batch_retrieve" / name / "results" / method).iterdir()):
        for alpha, ranking in load_ranking(str(part)).items():
            for query_id, ids, scores in zip(ranking.query_ids, ranking.image_ids, ranking.scores, strict=True):
                found.setdefault(alpha, {})[query_id] = [
                    (str(one), float(s)) for one, s in zip(ids, scores, strict=True) if one
                ]
    return found


def plain_search(shop, model_dir, queries, alpha, *, removed=True, k=60):
    """Encode and search in this process, all at once."""
    encoder = load_encoder(f"local-dir:{model_dir}", device="cpu")
    store = EmbeddingStore.open(str(shop / "store"))
    ids = store.read_ids()
    index = {name: row for row, name in enumerate(ids)}
    images = []
    for query in queries:
        if query.reference_id in index:
            images.append(torch.from_numpy(store.take([query.reference_id]))[0])
        else:
            with open(query.reference_id.removeprefix("file://"), "rb") as file:  # noqa: PTH123
                pixels = preprocess_image(file.read(), encoder.preprocessing)
            images.append(encoder.encode_images(torch.from_numpy(pixels)[None])[0])
    image, text = torch.stack(images), encoder.encode_texts([query.relative_caption for query in queries])
    weights = {0: query_weights("slerp", image, text, alpha)}
    exclude = [index.get(query.reference_id, -1) if removed else -1 for query in queries]
    gallery = np.concatenate([block.embeddings for block in store.iter_blocks()])
    top = weighted_top_k(image, text, gallery, weights, k, exclude)[0]
    return {
        query.query_id: [(ids[row], float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for query, rows, scores in zip(queries, top.indices.tolist(), top.scores.tolist(), strict=True)
    }


def assert_same_lists(found, expected):
    assert found.keys() == expected.keys()
    for query_id, results in expected.items():
        assert [one for one, _ in found[query_id]] == [one for one, _ in results]
        assert [s for _, s in found[query_id]] == pytest.approx([s for _, s in results], abs=1e-6)


PARTS = ("--num_shards", "3", "--queries_per_part", "7")


@pytest.fixture(scope="module")
def many(servers, shop):
    """A run of six parts."""
    done = answer(servers, shop, shop / "queries.parquet", "many", *PARTS, "--gallery_images", str(shop / "pairs"))
    assert done.returncode == 0, done.stderr[-3000:]
    return servers.storage / "batch_retrieve" / "many"


def test_the_lists_are_those_of_a_plain_search(servers, shop, many, tiny_model_dir):
    queries, _ = read_queries(str(shop / "queries.jsonl"))
    ((alpha, found),) = lists(servers, "many").items()
    assert alpha == 0.8
    assert_same_lists(found, plain_search(shop, tiny_model_dir, queries, 0.8))
    parts = sorted((many / "results" / "slerp").iterdir())
    assert len(parts) == 6
    result = json.loads((many / "result.json").read_text())
    assert (result["num_queries"], result["num_answered"], result["num_rejects"]) == (NUM_QUERIES, NUM_QUERIES, 0)
    saved = [load_ranking(str(part))[0.8] for part in parts]
    whole = Ranking(
        tuple(name for part in saved for name in part.query_ids),
        np.concatenate([part.image_ids for part in saved]),
        np.concatenate([part.scores for part in saved]),
    )
    benchmark = load_benchmark("custom", str(shop / "queries.jsonl"), gallery=str(shop / "store"))
    scored = evaluate(whole, benchmark)
    for metric, (mean, low, high) in result["scores"]["slerp@0.8"].items():
        assert mean == pytest.approx(scored.metrics[metric], abs=1e-12)
        assert (low, high) == pytest.approx(scored.intervals[metric], abs=1e-12)
    ranks = pa.concat_tables([pq.read_table(path) for path in sorted((many / "per_query").iterdir())])
    assert ranks.column("rank").to_pylist() == scored.per_query.column("rank").to_pylist()
    sheet = (many / "contact_sheet.html").read_text()
    assert "data:image/webp" in sheet
    assert sheet.count('unreadable"') == 0


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_the_same(servers, shop, many):
    given = arguments(shop, shop / "queries.parquet", "cut", *PARTS)
    folder = servers.storage / "batch_retrieve" / "cut"
    process = subprocess.Popen(
        servers.command("batch_retrieve", *given), env=servers.environment(), cwd=servers.storage,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(folder.glob("_progress/part-*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the cluster ends the tasks of a driver that is gone
    assert not (folder / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("results/slerp/*.parquet")
              if (folder / "_progress" / f"{path.stem}.json").exists()}  # fmt: skip
    assert 1 <= len(before) < 6
    done = answer(servers, shop, shop / "queries.parquet", "cut", *PARTS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(before)} of 6 parts are finished, going on with the rest" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for kind in ("results/slerp", "rejects", "per_query", "_progress"):
        pairs = [
            {p.name: p.read_bytes() for p in (servers.storage / "batch_retrieve" / name / kind).iterdir()}
            for name in ("many", "cut")
        ]
        assert pairs[0] == pairs[1]
    results = [
        json.loads((servers.storage / "batch_retrieve" / name / "result.json").read_text()) for name in ("many", "cut")
    ]
    assert {**results[0], "name": ""} == {**results[1], "name": ""}


@pytest.mark.long
def test_a_picture_that_cannot_be_used(servers, shop, tiny_model_dir, tmp_path):
    rows = [json.loads(line) for line in (shop / "queries.jsonl").read_text().splitlines()][:6]
    for row in rows:
        del row["target_ids"]
    rows[2]["reference"] = str(tmp_path / "gone.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    rows[3]["reference"] = f"file://{tmp_path}/broken.jpg"
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    more = ("--queries_per_part", "3", "--methods", "[slerp, sum]", "--alphas", "[0.5, 0.8]",
            "--protocol", '{"reference": "kept"}')  # fmt: skip
    refused = answer(servers, shop, queries, "some", *more)
    assert refused.returncode == 2
    assert "query 'q2': missing" in refused.stderr or "query 'q3': unreadable" in refused.stderr
    some = answer(servers, shop, queries, "some", *more, "--max_rejects", "2")
    assert some.returncode == 0, some.stderr[-3000:]
    folder = servers.storage / "batch_retrieve" / "some"
    result = json.loads((folder / "result.json").read_text())
    assert (result["num_queries"], result["num_answered"], result["num_rejects"]) == (6, 4, 2)
    assert result["scores"] == {}
    rejects = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "rejects").iterdir())]).to_pylist()
    assert [(row["key"], row["reason"]) for row in rejects] == [("q2", "missing"), ("q3", "unreadable")]
    kept = [query for query in read_queries(str(queries))[0] if query.query_id not in ("q2", "q3")]
    for alpha in (0.5, 0.8):
        assert_same_lists(lists(servers, "some")[alpha], plain_search(shop, tiny_model_dir, kept, alpha, removed=False))
    assert lists(servers, "some", "sum").keys() == {None}


@pytest.mark.long
def test_a_gallery_with_captions_is_composed(servers, shop):
    done = answer(servers, shop, shop / "queries.jsonl", "composed", "--gallery_alpha", "0.3", "--num_shards", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "slerp@0.8 alone" in done.stdout
    store = EmbeddingStore.open(str(shop / "store"))
    (query,) = [query for query in read_queries(str(shop / "queries.jsonl"))[0] if query.query_id == "q1"]
    plain = Gallery(store.uri)
    composed = Gallery(store.uri, alpha=0.3)
    assert plain.parts() == composed.parts()
    rows = {alpha: torch.cat([torch.tensor(block) if isinstance(block, np.ndarray) else block for _, block in gallery.blocks(gallery.parts())])
            for alpha, gallery in ((0.0, plain), (0.3, composed))}  # fmt: skip
    captions = np.concatenate(
        [block.columns["caption_embedding"] for block in store.iter_blocks(columns=("caption_embedding",))]
    )
    assert torch.equal(rows[0.3], slerp(rows[0.0], torch.tensor(captions), 0.3))
    found = lists(servers, "composed")[0.8]["q1"]
    ids = store.read_ids()
    text = load_encoder(store.manifest.spec.model, device="cpu").encode_texts([query.relative_caption])[0]
    asked = slerp(rows[0.0][ids.index(query.reference_id)], text, 0.8)
    expected = (rows[0.3].double() @ asked.double()).numpy()
    assert [score for _, score in found] == pytest.approx([expected[ids.index(name)] for name, _ in found], abs=1e-6)
    best = [ids[row] for row in np.argsort(-expected) if ids[row] != query.reference_id]
    assert found[0][0] == best[0]


def test_a_query_with_subset_ids_ranks_only_those(servers, shop, tiny_model_dir, tmp_path):
    ids = EmbeddingStore.open(str(shop / "store")).read_ids()
    base = {"relative_caption": "red"}
    rows = [{"query_id": f"q{n}", "reference": ids[n], "subset_ids": ids[n : n + 100 : 9], **base} for n in range(4)]
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    done = answer(servers, shop, queries, "subsets", "--alpha", "0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = plain_search(shop, tiny_model_dir, read_queries(str(queries))[0], 0.5, k=120)
    for row in rows:
        members = set(row["subset_ids"]) - {row["reference"]}
        expected = [pair for pair in whole[row["query_id"]] if pair[0] in members]
        assert_same_lists({"": lists(servers, "subsets")[0.5][row["query_id"]]}, {"": expected})


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"reference": "nowhere"}], (), "reference 'nowhere' of query 'q0'"),
        ([{"target_ids": ["nowhere"]}], (), "target 'nowhere' of query 'q0'"),
        ([{"target_ids": ["{1}"]}, {}], (), "1 of 2 queries have target_ids, query 'q1' of"),
        ([{"refrence": "x"}], (), "line 1: unknown key 'refrence'; did you mean 'reference'"),
        ([{}], ("--model", "{other}"), "weights_digest"),
        ([{}], ("--adapter", "/nowhere/adapter"), "/nowhere/adapter"),
        ([{}], ("--gallery", "/nowhere"), "/nowhere: this embedding store does not exist"),
        ([{}], ("--protocol", '{"referense": "kept"}'), "did you mean 'reference'"),
        ([{}], ("--queries", ""), "--queries is needed"),
        ([{}], ("--split", "test"), "--split does nothing with --benchmark custom"),
        ([{}], ("--gallery_images", "/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_are_found_before_work_starts(servers, shop, make_tiny_model_dir, tmp_path, rows, more, message):
    first, second = EmbeddingStore.open(str(shop / "store")).read_ids()[:2]
    base = {"reference": first, "relative_caption": "red"}
    text = json.dumps([{"query_id": f"q{n}", **base, **row} for n, row in enumerate(rows)]).replace("{1}", second)
    queries = write_jsonl(tmp_path / "queries.jsonl", json.loads(text))
    other = f"local-dir:{make_tiny_model_dir(tmp_path / 'other', seed=5)}" if "{other}" in more else ""
    refused = answer(servers, shop, queries, "mistake", *[word.replace("{other}", other) for word in more])
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert message in refused.stderr
    assert not (servers.storage / "batch_retrieve" / "mistake").exists()


def test_query_ids_are_unique_across_files(servers, shop, tmp_path):
    first = EmbeddingStore.open(str(shop / "store")).read_ids()[0]
    for name in ("a", "b"):
        rows = [{"query_id": one, "reference": first, "relative_caption": "red"} for one in ("both", name)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    refused = answer(servers, shop, tmp_path, "shared")
    assert refused.returncode == 2
    assert "b.jsonl: query id 'both' is also in" in refused.stderr


ALL_LISTS = ("--approximate", "ivf", "--nlist", "4", "--nprobe", "4", "--recall_queries", "15")


def folder_of(servers, name):
    return servers.storage / "batch_retrieve" / name


@pytest.mark.long
def test_approximate_search_is_measured_and_its_indexes_are_kept(servers, shop, many):
    whole = answer(servers, shop, shop / "queries.parquet", "all-lists", *PARTS, *ALL_LISTS)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert lists(servers, "all-lists") == lists(servers, "many")
    result = json.loads((folder_of(servers, "all-lists") / "result.json").read_text())
    found = result.pop("approximate")
    assert found["num_sampled"] == 15
    assert [mean for mean, _, _ in found["recall"]["slerp@0.8"].values()] == [1.0, 1.0, 1.0]
    assert "slerp@0.8 recall_of_exact@60" in whole.stdout
    assert "3 indexes made, 0 loaded" in whole.stdout
    exact = json.loads((many / "result.json").read_text())
    assert result["scores"] == exact["scores"]

    some = ("--approximate", "ivf", "--nlist", "4", "--nprobe", "1", "--recall_queries", "1000", "--k", "5")
    one = answer(servers, shop, shop / "queries.parquet", "one-list", *PARTS, *some)
    assert one.returncode == 0, one.stderr[-3000:]
    assert "0 indexes made, 3 loaded" in one.stdout
    recorded = json.loads((folder_of(servers, "one-list") / "result.json").read_text())
    measured = recorded["approximate"]["recall"]["slerp@0.8"]
    best, mine = lists(servers, "many")[0.8], lists(servers, "one-list")[0.8]
    assert recorded["approximate"]["num_sampled"] == len(best) == NUM_QUERIES
    for k in (1, 5):
        overlap = [len(dict(best[name][:k]).keys() & dict(mine[name][:k]).keys()) / k for name in best]
        assert measured[f"recall_of_exact@{k}"][0] == pytest.approx(np.mean(overlap), abs=1e-12)
    assert measured["recall_of_exact@5"][0] < 1
    for name, results in mine.items():
        exact_scores = dict(best[name])
        assert all(score == exact_scores[one] for one, score in results if one in exact_scores)

    before = (folder_of(servers, "one-list") / "result.json").read_bytes()
    for lost in ("_progress/part-00002.json", "sample/part-00004.safetensors", "recall.json", "result.json"):
        (folder_of(servers, "one-list") / lost).unlink()
    again = answer(servers, shop, shop / "queries.parquet", "one-list", *PARTS, *some)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "4 of 6 parts are finished" in again.stdout
    assert (folder_of(servers, "one-list") / "result.json").read_bytes() == before


@pytest.mark.long
def test_a_damaged_index_and_that_of_another_store_are_refused(servers, shop, tmp_path):
    given = ("--approximate", "hnsw", "--hnsw_m", "5", "--num_shards", "1", "--storage_path", str(tmp_path / "own"))
    assert answer(servers, shop, shop / "queries.jsonl", "graph", *given).returncode == 0
    (marker,) = (tmp_path / "own" / "approximate_indexes").rglob("shard-00000.json")
    data = marker.with_suffix(".safetensors")
    sound, made = data.read_bytes(), marker.read_text()
    data.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    refused = answer(servers, shop, shop / "queries.jsonl", "graph-2", *given)
    assert refused.returncode == 2
    assert "not the file that was written (checksum); remove it" in refused.stderr
    data.write_bytes(sound)
    identity = EmbeddingStore.open(str(shop / "store")).identity
    marker.write_text(made.replace(identity, "0" * len(identity)))
    refused = answer(servers, shop, shop / "queries.jsonl", "graph-2", *given)
    assert refused.returncode == 2
    assert "this approximate index was made of something else (store: '0000" in refused.stderr
    marker.write_text(made)
    assert answer(servers, shop, shop / "queries.jsonl", "graph-2", *given).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--nprobe", "3"), "--nprobe does nothing without --approximate ivf or hnsw"),
        (("--approximate", "hnsw", "--nprobe", "3"), "--nprobe does nothing with --approximate hnsw"),
        (("--approximate", "hnsw", "--nlist", "3"), "nlist is a setting of ivf, and the kind is hnsw"),
        (("--approximate", "hnsw", "--ef_search", "59"), "ef_search must be a whole number from 60"),
        (("--approximate", "ivf", "--nlist", "61"), "nlist must be a whole number from 1 to 40"),
        (("--approximate", "ivf", "--nlist", "2", "--nprobe", "3"), "nprobe must be a whole number from 1 to 2"),
        (("--approximate", "ivf", "--k", "121"), "--k 121 is more than the 120 images of the gallery"),
        (("--approximate", "ivf", "--recall_queries", "0"), "recall_queries"),
        (("--approximate", "flat"), "approximate"),
    ],
)
def test_mistakes_of_approximate_search_are_found_before_work_starts(servers, shop, more, message):
    refused = answer(servers, shop, shop / "queries.jsonl", "mistake", *more)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert message in refused.stderr
    assert not folder_of(servers, "mistake").exists()


@pytest.mark.long
def test_subsets_are_not_searched_approximately(servers, shop, tmp_path):
    ids = EmbeddingStore.open(str(shop / "store")).read_ids()
    row = {"query_id": "q", "reference": ids[0], "subset_ids": ids[:9], "relative_caption": "red"}
    refused = answer(servers, shop, write_jsonl(tmp_path / "queries.jsonl", [row]), "mistake", "--approximate", "ivf")
    assert refused.returncode == 2
    assert "queries with subset_ids rank only those, always exactly" in refused.stderr
