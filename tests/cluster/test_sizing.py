"""The sizes: each formula on numbers that are worked out by hand, and the tables of cluster/README.md."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from cir_core import files
from cir_core.embedding_store import PartInfo, StoreSpec
from cir_core.embedding_store.manifest import Manifest
from jobs import gallery_search
from jobs.batch_retrieve import BatchRetrieveConfig

ROOT = Path(__file__).resolve().parents[2]
_PATH = ROOT / "cluster" / "sizing.py"
spec = importlib.util.spec_from_file_location("sizing", _PATH)
sizing = sys.modules["sizing"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sizing)

ROUND = sizing.Sizing(
    model="ViT-B-32", images=(3_600_000,), queries=1000, k=10, hours=0.5, gpu_tflops=88.0, gpu_share=0.1, decode=500.0,
    read=2000.0, search_gflops=1024.0, tile=300, share_gb=1.0, decode_cores=2, image_kb=100.0, shard_images=1000,
    manifest_bytes=300, manifest_us=10.0, gpu_hour=2.0, core_hour=0.1, gb_month=0.02, puts=0.01, gets=0.001,
)  # fmt: skip


def test_embedding_by_hand():
    found = sizing.embed(ROUND, 3_600_000)
    # 88e12 * 0.1 / 8.8e9 = 1000 images/s; a core: 1 / (1/500 + 1/2000) = 400 images/s
    assert found["gpu_hours"] == pytest.approx(1.0)
    assert found["gpus"] == 2
    assert found["core_hours"] == pytest.approx(2.5)
    assert found["decode_cores"] == pytest.approx(5.0)
    assert found["images_gb"] == pytest.approx(360.0)
    assert found["store_gb"] == pytest.approx(3.6e6 * 1044 / 1e9)
    assert found["parts"] == 3600
    assert found["manifest_mb"] == pytest.approx(1.08)
    assert found["manifest_s"] == pytest.approx(0.036)
    assert found["listings"] == 4
    # GPU 2.00, cores 0.25, 10,800 PUTs 0.108, 3600 + 45,000 GETs 0.0486
    assert found["cost"] == pytest.approx(2.0 + 0.25 + 0.108 + 0.0486)
    assert found["cost_month"] == pytest.approx((360 + 3.7584) * 0.02)


def test_training_by_hand():
    found = sizing.train(ROUND, 3_600_000)
    # 2 * 8.8 + 6.0 = 23.6 GFLOP a pair, 372.9 pairs/s
    assert found["gpu_hours"] == pytest.approx(23.6 / 8.8)
    assert found["gpus"] == 6
    assert found["decode_cores"] == pytest.approx(6 * 8800 / 23.6 / 400)
    assert found["steps"] == pytest.approx(3515.625)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": ()}, "images: names no size"),
        ({"images": (0,)}, "images: must be above 0"),
        ({"gpu_share": 1.5}, "gpu_share: must be a share, above 0 and at most 1"),
        ({"hours": 0}, "hours: must be above 0"),
        ({"model": "ViT"}, "model must be one of ViT-B-32"),
    ],
)
def test_sizes_that_are_none_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        sizing.replace(ROUND, **wrong)


def test_searching_by_hand():
    found = sizing.search(ROUND, 5_000_000)
    # 5e6 * 512 * 4 = 10.24 GB in 11 shares; 2 * 512 * 5e6 * 1000 = 5.12e12 FLOP, 5 core-seconds
    assert found["held_gb"] == pytest.approx(10.24)
    assert found["shares"] == found["pods"] == 11
    assert found["core_hours"] == pytest.approx(5 / 3600)
    assert found["hours"] == pytest.approx(5 / 3600 / 22)
    assert found["tiles"] == 4
    assert found["tiles_gb"] == pytest.approx(1000 * 512 * 8 * 11 / 1e9)
    # 11 lists to two tasks, and their 2 to one
    assert found["merge_gb"] == pytest.approx(1000 * 10 * 12 * 13 / 1e9)
    assert found["streamed_tb"] == pytest.approx(5e6 * 1044 * 4 / 1e12)
    more = sizing.search(sizing.replace(ROUND, queries=10**9), 5_000_000)
    assert more["pods"] == 1389  # 5e6 core-seconds in half an hour, two cores each
    assert more["hours"] <= ROUND.hours


def test_one_share_merges_nothing():
    assert sizing.search(ROUND, 1000)["merge_gb"] == 0


def test_constants_are_those_of_the_search():
    assert sizing._FAN_IN == gallery_search.FAN_IN
    assert BatchRetrieveConfig.model_fields["queries_per_part"].default == sizing.Sizing.tile
    assert gallery_search._HELD_BYTES == 4


def test_a_part_takes_that_much_of_a_manifest(tmp_path):
    parts = tuple(
        PartInfo(i, f"part-{i:05d}", 10_000, 3, f"{i:064x}", f"{-i % 2**64:064x}", 15_550_000 + i, ())
        for i in range(1000)
    )
    spec = StoreSpec("ViT-L-14", "openai", *["a" * 64] * 4, "p", 768, "float16", "b" * 64, "fp32")
    files.write_json(str(tmp_path / "m.json"), Manifest(spec, 10**7, 3000, (), parts).to_json())
    assert (tmp_path / "m.json").stat().st_size / 1000 == pytest.approx(sizing.Sizing.manifest_bytes, rel=0.02)


def test_search_s_rate_is_that_of_the_benchmarks():
    text = (ROOT / "jobs" / "BENCHMARKS.md").read_text(encoding="utf-8")
    seconds = float(re.search(r"exact_top_k, prepared gallery \| ([\d.]+)", text)[1])
    assert sizing.Sizing.search_gflops == pytest.approx(2 * 256 * 400_000 * 512 / seconds / 2 / 1e9, rel=0.01)


def test_the_tables_of_the_readme_are_the_script_s_output():
    done = subprocess.run([sys.executable, str(_PATH)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() in (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments", [["--models", "[ViT-X]"], ["--decode", "0"], ["--images", "[0]"], ["--gpus", "1"]]
)
def test_mistakes_end_with_exit_code_2(arguments):
    done = subprocess.run([sys.executable, str(_PATH), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00078, "0.00078"),
        (0.053, "0.053"),
        (5.29, "5.3"),
        (9.4, "9.4"),
        (53.1, "53"),
        (976562.5, "976,562"),
    ],
)
def test_numbers_are_shown_with_two_digits(value, text):
    assert sizing.shown(value) == text


def test_every_setting_says_where_it_is_from():
    for name in asdict(ROUND):
        assert re.search(rf"^        {name}: ", sizing.Sizing.__doc__, re.MULTILINE)
