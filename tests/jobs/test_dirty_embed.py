"""All dirty shards that open, in one folder, through `embed` on a real cluster: every row is there or says why not."""

import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dirty"))

from dirty_kind import PREPROCESSING
from dirty_table import SHARDS

from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.shards import list_shards, write_tar_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ends():
    """The kinds whose end does not hang on captions being required: embedding pictures requires none."""
    return [kind for kind in SHARDS if kind.group != "URI list" and not kind.error and not kind.require_caption]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A folder with the shards, and the kind of each by file name."""
    folder = tmp_path_factory.mktemp("dirty")
    return folder, {Path(kind.write(folder)).name: kind for kind in ends()}


@pytest.fixture(scope="module")
def model(make_tiny_model_dir, tmp_path_factory):
    """A model whose pictures have the size at which the table was made: `extreme_shape` depends on it."""
    vision = {"image_size": PREPROCESSING.size, "layers": 1, "width": 32, "patch_size": 16, "head_width": 8}
    return make_tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny", vision_cfg=vision)


def embed(servers, data, output, model, *more):
    return servers.run("embed", "--data", str(data), "--output", str(output), "--model", f"local-dir:{model}", *more)


def test_every_dirty_row_is_kept_or_rejected(servers, dirty, model, tmp_path):
    folder, kinds = dirty
    assert len(kinds) >= 60
    assert load_encoder(f"local-dir:{model}", device="cpu").preprocessing.size == PREPROCESSING.size
    done = embed(servers, folder, tmp_path / "store", model, "--captions", "embed")  # odd texts reach the tokenizer
    assert done.returncode == 0, done.stderr[-3000:]
    store = EmbeddingStore.open(str(tmp_path / "store"))
    kept = [key for _, ids in store.iter_ids() for key in ids.to_pylist()]
    in_order = [kinds[Path(shard).name] for shard in list_shards(str(folder))]
    assert kept == [key for kind in in_order for key in kind.end.kept]
    found = [
        row for part in sorted((tmp_path / "store" / "rejects").iterdir()) for row in pq.read_table(part).to_pylist()
    ]
    assert Counter((Path(row["shard"]).name, row["key"], row["reason"]) for row in found) == Counter(
        (name, key, reason) for name, kind in kinds.items() for key, reason in kind.end.rejects
    )
    assert (store.manifest.num_rows, store.manifest.num_rejects) == (len(kept), len(found))
    rows_in = sum(len(kind.kept) + len(kind.rejects) for kind in kinds.values())
    assert store.manifest.num_rows + store.manifest.num_rejects == rows_in


@pytest.mark.long
def test_a_limit_on_rejects_stops_the_job_and_names_some(servers, dirty, model, tmp_path):
    done = embed(servers, dirty[0], tmp_path / "store", model, "--max_rejects", "3")
    assert done.returncode == 2
    assert any(reason in done.stderr for kind in ends() for _, reason in kind.rejects)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.long
def test_a_shard_of_pages_stops_the_job_before_its_end(servers, model, tmp_path):
    pages = [(f"k{number:05d}", b"<html>not found</html>", "jpg", "a page") for number in range(20_000)]
    (tmp_path / "data").mkdir()
    write_tar_shard(str(tmp_path / "data" / "00000.tar"), pages)
    for _ in range(2):
        done = embed(servers, tmp_path / "data", tmp_path / "store", model, "--batch_size", "100")
        assert done.returncode == 2
        (found,) = re.findall(r"error: (\d+) of \1 images cannot be used, more than the share of 0\.5", done.stderr)
        assert 1000 <= int(found) < 5000
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / "store").glob("part-*"))
