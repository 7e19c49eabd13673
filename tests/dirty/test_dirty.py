"""Every kind of dirty data ends as its table says: kept and rejected keys, reasons, pixels, messages, memory."""

import io
import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import dirty_table
import numpy as np
import pytest
import torch
from dirty_bombs import black_png, scan_bomb
from dirty_kind import PREPROCESSING, End, end_of_folder, end_of_shard, tar_bytes
from dirty_table import KINDS, SHARDS
from open_clip.transform import image_transform
from PIL import Image

from cir_core import files
from cir_core.embedding_store import EmbeddingWriter, StoreSpec
from cir_core.encoders import load_encoder
from cir_core.preprocessing import MAX_SCANS, ImageError, preprocess_image
from cir_core.schema import CirError, Reject
from cir_core.shards import REJECT_REASONS, Sample, index_shard, list_shards, read_shard, read_slice, read_slice_rows

OPEN_CLIP = image_transform(
    PREPROCESSING.size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode="shortest", interpolation="bicubic"
)
SPEC = StoreSpec(
    model="m", weights="w", weights_digest="0", adapter_digest="", config_digest="0", tokenizer_digest="0",
    preprocessing="p", dim=8, dtype="float32", input_digest="0", precision="fp32",
)  # fmt: skip


def of_groups(*groups):
    found = [kind for kind in KINDS if kind.group in groups]
    return pytest.mark.parametrize("kind", found, ids=[kind.name for kind in found])


every_shard = of_groups("tar", "caption", "picture", "Parquet")


def read_by_slices(uri, require_caption):
    """Samples and rejects by index and slices, which must count what they give."""
    index = index_shard(uri, slice_rows=2, require_caption=require_caption)
    samples = [row for part in index.slices for row in read_slice(part, require_caption=require_caption)]
    assert index.num_samples == len(samples)
    return samples, list(index.rejects)


@every_shard
def test_shard(kind, tmp_path):
    local = kind.write(tmp_path)
    remote = f"memory://{uuid.uuid4().hex}/{Path(local).name}"
    uris = [local] if "-mib-" in kind.name else [local, remote]
    if len(uris) == 2:
        files.write_bytes(remote, Path(local).read_bytes())
    for uri in uris:
        if kind.error:
            for read in (end_of_shard, read_by_slices):
                with pytest.raises(CirError) as caught:
                    read(uri, require_caption=kind.require_caption)
                assert kind.error in str(caught.value)
                assert files.redact(uri) in str(caught.value)
            continue
        assert end_of_shard(uri, require_caption=kind.require_caption) == kind.end
        rows = list(read_shard(uri, require_caption=kind.require_caption))
        samples = [row for row in rows if isinstance(row, Sample)]
        rejects = [row for row in rows if isinstance(row, Reject)]
        assert read_by_slices(uri, kind.require_caption) == (samples, rejects)
        assert len(rows) == len(kind.kept) + len(kind.rejects)
        assert {reject.reason for reject in rejects} <= set(REJECT_REASONS)
        assert max([len(reject.detail) for reject in rejects], default=0) < 500
        captions = {row.key: row.caption for row in samples}
        assert {key: captions[kind.key(key)] for key in kind.captions} == kind.captions
    files.filesystem(remote)[0].delete_dir_contents("/", missing_dir_ok=True, accept_root_dir=True)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow alone says what it finds odd; ours must not
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.compare], ids=lambda kind: kind.name)
def test_pixels(kind, tmp_path):
    (data,) = [
        row.image for row in read_shard(kind.write(tmp_path), require_caption=False) if row.key == kind.key("odd")
    ]
    image = Image.open(io.BytesIO(kind.as_if() if kind.as_if else data))
    expected = (OPEN_CLIP(image) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(preprocess_image(data, PREPROCESSING), expected)


@of_groups("URI list")
def test_list_of_uris(kind, tmp_path):
    uri = kind.write(tmp_path)
    if kind.error:
        for read in (end_of_shard, read_by_slices):
            with pytest.raises(CirError) as caught:
                read(uri, require_caption=False)
            assert kind.error in str(caught.value)
            assert uri in str(caught.value)
        return
    found = end_of_shard(uri, require_caption=False)
    assert found == kind.end
    index = index_shard(uri, slice_rows=2, require_caption=False)
    rows = [row for part in index.slices for row in read_slice_rows(part, require_caption=False)]
    whole = list(read_shard(uri, require_caption=False))
    assert [row for row in whole if isinstance(row, Sample)] == [row for row in rows if isinstance(row, Sample)]
    late = [row for row in rows if isinstance(row, Reject)]  # what only a look at the picture tells
    assert sorted(map(str, [*index.rejects, *late])) == sorted(str(row) for row in whole if isinstance(row, Reject))
    assert index.num_samples == len(rows)


@of_groups("folder")
def test_folder(kind, tmp_path):
    uri = kind.write(tmp_path)
    if kind.error:
        with pytest.raises(CirError) as caught:
            end_of_folder(uri)
        assert kind.error in str(caught.value)
        assert uri in str(caught.value)
    else:
        found = end_of_folder(uri)
        assert End(tuple(sorted(found.kept)), found.rejects) == kind.end


@of_groups("list")
def test_list(kind, tmp_path):
    given = kind.write(tmp_path)
    if kind.error:
        with pytest.raises(CirError) as caught:
            list_shards(given)
        assert kind.error in str(caught.value)
    else:
        assert tuple(Path(shard).name for shard in list_shards(given)) == kind.kept


@of_groups("embedding")
def test_embedding(kind, tmp_path):
    vectors = np.load(kind.write(tmp_path))
    writer = EmbeddingWriter(str(tmp_path / "store"), SPEC)
    with pytest.raises(CirError) as caught:
        writer.write_part(0, ["a", "odd", "z"], vectors)
    assert kind.error in str(caught.value)
    assert "row 1" in str(caught.value)
    assert writer.finished_parts() == {}


def test_a_model_that_gives_nan_writes_nothing(tmp_path, make_tiny_model_dir):
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model_dir(tmp_path / "model")
    tensors = load_file(folder / "open_clip_model.safetensors")
    tensors["visual.ln_post.weight"][3] = float("nan")
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    vectors = encoder.encode_images(
        torch.zeros(2, 3, encoder.preprocessing.size, encoder.preprocessing.size, dtype=torch.uint8)
    )
    writer = EmbeddingWriter(str(tmp_path / "store"), replace(SPEC, dim=encoder.dim))
    with pytest.raises(CirError, match="2 of 2 rows are not finite unit vectors"):
        writer.write_part(0, ["a", "b"], vectors.numpy())
    assert writer.finished_parts() == {}


def test_the_table_for_people_is_up_to_date():
    assert dirty_table.TABLE.read_text(encoding="utf-8") == dirty_table.markdown()


def test_names_and_keys_are_unique():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 60
    kept = [key for kind in SHARDS for key in kind.end.kept]
    assert len(set(kept)) == len(kept)
    assert all(bool(kind.error) != bool(kind.kept or kind.rejects or "no rows" in kind.note) for kind in KINDS)


def test_a_sample_of_many_members_is_named_in_short(tmp_path):
    path = tmp_path / "film.tar"
    path.write_bytes(tar_bytes([(f"film.{number:05}.jpg", b"x") for number in range(2000)]))
    (reject,) = read_shard(str(path))
    assert reject.detail.startswith("it holds 00000.jpg, ")
    assert reject.detail.endswith("00007.jpg, ...")


def test_only_a_bomb_has_too_many_scans():
    sound, hidden = scan_bomb(90, MAX_SCANS - 20), b"\xff\xfe\x01\x02" + b"\xff\xda" * 128
    for data in (sound, sound[:2] + hidden + sound[2:], sound + b"\xff\xda" * 200):  # in a comment; after the end
        assert preprocess_image(data, PREPROCESSING).shape == (3, 64, 64)
    bomb = scan_bomb(90, MAX_SCANS)
    for data in (bomb, bomb[:2] + b"\xff\xfe\0\4\xff\xd9" + bomb[2:]):  # an end marker inside a comment
        with pytest.raises(ImageError, match="too_many_scans"):
            preprocess_image(data, PREPROCESSING)


_MEASURE = """
import json, resource, sys
from pathlib import Path
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.shards import Sample, index_shard, read_shard, read_slice

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
peaks = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    for row in read_shard(str(path), require_caption=False):
        try:
            if isinstance(row, Sample):
                preprocess_image(row.image, Preprocessing(64))
        except ImageError:
            pass
    for part in index_shard(str(path), require_caption=False).slices:
        for row in read_slice(part, require_caption=False):
            pass
    peaks[path.name] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
print(json.dumps(peaks))
"""


def test_bombs_stay_in_bounds(tmp_path):
    """In a process of 4 GiB: no bomb takes more than a large picture does, and the largest allowed is bounded too."""
    for kind in SHARDS:
        if not kind.error and kind.name.startswith(
            ("bomb-", "tar-65", "tar-3000", "tar-huge", "json-nested", "caption-of-a")
        ):
            kind.write(tmp_path)
    (tmp_path / "largest.tar").write_bytes(tar_bytes([("a.png", black_png(8192, 8192))]))
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)
    assert peaks.pop("largest.tar") < 1200
    assert {name: peak for name, peak in peaks.items() if peak > 600} == {}
    assert len(peaks) >= 15
