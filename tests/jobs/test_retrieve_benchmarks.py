"""batch_retrieve on the benchmarks, end to end: pictures in files to scores, against plain loops over the same pictures.

The pictures are placeholders made here, one for every id; the annotations are the real ones where CIR_BENCHMARKS names
them, and made up elsewhere.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from cir_core.benchmarks import load_benchmark, read_captions
from cir_core.composition import compose_gallery, mean_texts, slerp
from cir_core.encoders import load_encoder
from cir_core.evaluation import evaluate, load_ranking, validate_submission
from cir_core.preprocessing import preprocess_image
from cir_core.schema import Ranking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def annotations():
    folder = os.environ.get("CIR_BENCHMARKS")
    if not folder:
        pytest.skip("CIR_BENCHMARKS does not name a folder of benchmark annotations")
    return Path(folder)


def draw(path: Path) -> None:
    """Write a picture of noise that its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.stem.encode())).integers(0, 256, (4, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((70, 40)).save(path)


def draw_all(benchmark, folder: Path, suffix: str) -> None:
    for name in benchmark.image_ids:
        path = folder / (benchmark.images.stems.get(name, name) + suffix)
        if not path.exists():
            draw(path)


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def run(servers, benchmark, root, model, name, *more):
    done = servers.run(
        "batch_retrieve", "--benchmark", benchmark, "--root", str(root), "--model", f"local-dir:{model}", "--adapter", "none",
        "--name", name, "--contact_sheet_rows", "4", *more,
    )  # fmt: skip
    return done, servers.storage / "batch_retrieve" / name


ONE = ("--methods", "[slerp]", "--alphas", "[0.8]", "--alpha", "0.8")


def embeddings(benchmark, encoder):
    """Embed every picture and text of a benchmark: float64[images, D] in the order of image_ids, float64[Q, D]."""
    files = benchmark.image_files()
    pixels = []
    for name in benchmark.image_ids:
        cut = benchmark.crops[name].cut if name in benchmark.crops else None
        pixels.append(preprocess_image(Path(files[name].uri).read_bytes(), encoder.preprocessing, cut=cut))
    images = [encoder.encode_images(torch.from_numpy(np.stack(pixels[i : i + 64]))) for i in range(0, len(pixels), 64)]
    captions = [list(query.captions) for query in benchmark.queries]
    flat = encoder.encode_texts([text for texts in captions for text in texts])
    return torch.cat(images).double(), mean_texts(flat, list(map(len, captions))).double()


def naive_metrics(benchmark, encoder, alpha, k=60, compose=None):
    """Rank with one product a query in float64 and a full sort, then evaluate."""
    images, texts = embeddings(benchmark, encoder)
    place = {name: row for row, name in enumerate(benchmark.image_ids)}
    references = images[[place[query.reference_id] for query in benchmark.queries]]
    asked = slerp(references, texts, alpha)
    rows = images if compose is None else compose(benchmark.image_ids, images)
    left_out = [query.reference_id if benchmark.reference_removed else "" for query in benchmark.queries]

    def ranked(galleries, width):
        ids, scores = np.full((len(asked), width), "", dtype="<U64"), np.full((len(asked), width), -np.inf, np.float32)
        for row, (query, gallery, reference) in enumerate(zip(asked, galleries, left_out, strict=True)):
            found = (rows[[place[name] for name in gallery]] @ query).float().numpy()
            best = [i for i in np.argsort(-found, kind="stable")[: width + 1] if gallery[i] != reference][:width]
            ids[row, : len(best)], scores[row, : len(best)] = [gallery[i] for i in best], found[best]
        return Ranking(tuple(query.query_id for query in benchmark.queries), ids, scores)

    groups = [query.subset_ids for query in benchmark.queries]
    subsets = ranked(groups, max(map(len, groups))) if any(groups) else None
    whole = subsets if benchmark.own_galleries else ranked([benchmark.gallery_ids] * len(groups), k)
    return evaluate(whole, benchmark, subset_ranking=subsets, num_resamples=100).metrics


def scores_of(folder, **wanted):
    rows = json.loads((folder / "scores.json").read_text())
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row


def children_of(servers, printed):
    page = next(line for line in printed.splitlines() if line.startswith("MLflow: "))
    client = mlflow.MlflowClient(servers.tracking_uri)
    parent = client.get_run(page.rsplit("/", 1)[-1])
    return client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")


def test_cirr_with_its_real_annotations(servers, annotations, tiny_model_dir, tmp_path):
    shutil.copytree(annotations / "cirr", tmp_path, dirs_exist_ok=True)
    val = load_benchmark("cirr", tmp_path)
    draw_all(val, tmp_path, ".png")
    done, folder = run(servers, "cirr", tmp_path, tiny_model_dir, "cirr", *ONE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4181 queries, 2297 gallery images" in done.stdout
    found = scores_of(folder, method="slerp")
    expected = naive_metrics(val, load_encoder(f"local-dir:{tiny_model_dir}"), 0.8)
    assert found["metrics"] == pytest.approx(
        expected, abs=1.1 / 4181
    )  # a score that rounds to a tie may move one query
    protocol = found["protocol"]
    assert (protocol["reference"], protocol["targets"], protocol["ranking"]["alpha"]) == ("removed", "hard", 0.8)
    assert protocol["ranking"]["preprocessing"].startswith("center_crop-32-bilinear")
    assert {"code_version", "weights", "store", "texts_truncated"} <= protocol["ranking"].keys()
    rankings = folder / "rankings" / "base_model"
    again = evaluate(
        load_ranking(str(rankings / "slerp.parquet"))[0.8],
        val,
        subset_ranking=load_ranking(str(rankings / "slerp.subset.parquet"))[0.8],
        num_resamples=100,
    )
    assert again.metrics == found["metrics"]


@pytest.mark.long
def test_cirr_test1_becomes_files_for_its_server(servers, annotations, tiny_model_dir, tmp_path):
    shutil.copytree(annotations / "cirr", tmp_path, dirs_exist_ok=True)
    test1 = load_benchmark("cirr", tmp_path, split="test1")
    draw_all(test1, tmp_path, ".png")
    done, folder = run(servers, "cirr", tmp_path, tiny_model_dir, "cirr-test1", *ONE, "--split", "test1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4148 queries, 2315 gallery images" in done.stdout
    assert "1 empty" in done.stdout
    written = sorted((folder / "submissions").rglob("*.json"))
    assert [path.name for path in written] == ["cirr_test1_recall.json", "cirr_test1_recall_subset.json"]
    assert [validate_submission(path, test1) for path in written] == [[], []]
    assert str(written[0]) in done.stdout


@pytest.mark.long
def test_fashioniq_with_its_real_annotations(servers, annotations, tiny_model_dir, tmp_path):
    shutil.copytree(annotations / "fashioniq", tmp_path, dirs_exist_ok=True)
    for category in ("dress", "toptee"):
        draw_all(load_benchmark("fashioniq", tmp_path, category=category), tmp_path / "images", ".jpg")
    protocol = {"category": ["dress", "toptee"], "gallery": ["original", "val"], "caption_join": "averaged"}
    done, folder = run(
        servers, "fashioniq", tmp_path, tiny_model_dir, "fashioniq", "--methods", "[slerp, sum]", "--alphas", "[0.5, 0.8]",
        "--protocol", json.dumps(protocol),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for size in (3817, 2628, 5373, 2902):
        assert f"{size} gallery images" in done.stdout
    assert done.stdout.count("embedding store") == 2  # the val galleries lie inside the original ones
    alpha = scores_of(folder, part="mean val", method="slerp")["alpha"]
    encoder = load_encoder(f"local-dir:{tiny_model_dir}")
    benchmark = load_benchmark("fashioniq", tmp_path, category="dress", gallery="val", caption_join="averaged")
    found = scores_of(folder, part="dress val", method="slerp", alpha=alpha)["metrics"]
    assert found == pytest.approx(naive_metrics(benchmark, encoder, alpha), abs=1.1 / 2017)
    parts = [
        scores_of(folder, part=f"{name} val", method="slerp", alpha=alpha)["metrics"] for name in ("dress", "toptee")
    ]
    mean = scores_of(folder, part="mean val", method="slerp")
    assert mean["metrics"]["recall@10"] == pytest.approx(np.mean([part["recall@10"] for part in parts]))
    other = {0.5: 0.8, 0.8: 0.5}[alpha]
    rivals = [
        scores_of(folder, part=f"{name} val", method="slerp", alpha=other)["metrics"] for name in ("dress", "toptee")
    ]
    assert sum(part["recall@10"] for part in parts) >= sum(part["recall@10"] for part in rivals)
    children = children_of(servers, done.stdout)
    assert len(children) == 2 * (4 + 2)  # methods x (parts + means)
    (child,) = [
        one for one in children if one.data.params["part"] == "toptee original" and one.data.params["method"] == "sum"
    ]
    assert child.data.params["caption_join"] == "averaged"
    assert child.data.params["preprocessing"].startswith("center_crop")
    assert (
        child.data.metrics["recall_at_10"]
        == scores_of(folder, part="toptee original", method="sum")["metrics"]["recall@10"]
    )
    assert (folder / "toptee-original" / "contact_sheet.html").exists()


@pytest.mark.long
def test_genecis_crops_are_embedded_not_whole_pictures(servers, tiny_model_dir, tmp_path):
    boxes = [{"image_id": number, "instance_bbox": [3 * number, 2, 20, 30]} for number in range(1, 9)]
    other = {"image_id": 1, "instance_bbox": [30, 0, 25, 12]}
    rows = [
        {"condition": "small red", "reference": boxes[0], "target": boxes[1], "gallery": boxes[2:5]},
        {"condition": "green", "reference": boxes[5], "target": other, "gallery": [boxes[0], boxes[6], boxes[7]]},
    ]
    write(tmp_path / "focus_attribute.json", rows)
    for number in range(1, 9):
        draw(tmp_path / "VG_100K" / f"{number}.jpg")
    done, folder = run(
        servers, "genecis", tmp_path, tiny_model_dir, "crops", *ONE, "--protocol", '{"task": "focus_attribute"}',
        "--preprocessing_mode", "squash",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    benchmark = load_benchmark("genecis", tmp_path, task="focus_attribute")
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", preprocessing_mode="squash")
    found = scores_of(folder)
    assert found["metrics"] == naive_metrics(benchmark, encoder, 0.8)
    assert found["protocol"]["ranking"]["preprocessing"].startswith("squash-32")
    saved = load_ranking(str(folder / "rankings" / "base_model" / "slerp.parquet"))[0.8]
    images, texts = embeddings(benchmark, encoder)
    rows = dict(zip(benchmark.image_ids, images, strict=True))
    asked = slerp(rows[benchmark.queries[0].reference_id], texts[0], 0.8)
    scores = {name: float(asked @ rows[name]) for name in benchmark.queries[0].subset_ids}
    assert dict(zip(saved.image_ids[0], saved.scores[0], strict=True)) == pytest.approx(scores, abs=1e-6)


@pytest.fixture
def circo(tmp_path):
    """CIRCO in small: 70 pictures, three queries a split."""
    for split in ("val", "test"):
        rows = []
        for place in range(3):
            row = {
                "id": place,
                "reference_img_id": 60 + place,
                "relative_caption": "is red",
                "shared_concept": "a circle",
            }
            if split == "val":
                answers = [10 * place + 1, 10 * place + 4]
                row |= {"target_img_id": answers[0], "gt_img_ids": answers, "semantic_aspects": ["addition"]}
            rows.append(row)
        write(tmp_path / "annotations" / f"{split}.json", rows)
    images = [{"id": number} for number in range(1, 71)]
    write(tmp_path / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json", {"images": images})
    for number in range(1, 71):
        draw(tmp_path / "COCO2017_unlabeled" / "unlabeled2017" / f"{number:012d}.jpg")
    return tmp_path


@pytest.mark.long
def test_circo_with_a_composed_gallery(servers, circo, tiny_model_dir):
    texts = {str(number): ("a red circle", "a blue star", "one cross")[number % 3] for number in range(1, 70)}
    captions = circo / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": key, "caption": text}) + "\n" for key, text in texts.items()))
    composed = ("--gallery_alpha", "0.4", "--gallery_captions", str(captions), "--protocol", '{"shared_concept": "on"}')
    done, folder = run(servers, "circo", circo, tiny_model_dir, "circo", *ONE, *composed)
    assert done.returncode == 0, done.stderr[-3000:]
    val = load_benchmark("circo", circo, shared_concept="on")
    encoder = load_encoder(f"local-dir:{tiny_model_dir}")
    held = read_captions(str(captions))

    def compose(names, rows):
        captioned = torch.tensor([name in held for name in names])
        return compose_gallery(rows, encoder.encode_texts([held.get(name, "") for name in names]), captioned, 0.4)

    found = scores_of(folder)
    assert found["metrics"] == pytest.approx(naive_metrics(val, encoder, 0.8, compose=compose))
    assert found["metrics"] != pytest.approx(naive_metrics(val, encoder, 0.8))
    assert found["not_applicable"]
    assert found["protocol"]["ranking"]["gallery_alpha"] == 0.4


@pytest.mark.long
def test_pictures_that_are_missing_or_unreadable_are_left_out_on_request(servers, circo, tiny_model_dir):
    pictures = circo / "COCO2017_unlabeled" / "unlabeled2017"
    (pictures / f"{4:012d}.jpg").write_bytes(b"no picture")  # one of two answers of query 0
    (pictures / f"{61:012d}.jpg").unlink()  # the reference of query 1
    done, folder = run(servers, "circo", circo, tiny_model_dir, "left-out", *ONE, "--missing_images", "skip")
    assert done.returncode == 0, done.stderr[-3000:]
    protocol = scores_of(folder)["protocol"]
    told = ("gallery_size", "images_left_out", "queries_left_out")
    assert [protocol[key] for key in told] == [68, 2, 1]
    assert "queries_left_out" in done.stdout
