"""A folder of images as a shard: one sample a file, its key the path in the folder, suffix included."""

from __future__ import annotations

from collections.abc import Iterator

from cir_core import files
from cir_core.schema import CirError, Reject
from cir_core.shards.model import IMAGE_SUFFIXES, MAX_SAMPLE_BYTES, Row, ShardIndex, Slice, sort_rows


def _stem_suffix(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition(".")
    return stem, suffix.lower()


def list_images(uri: str) -> list[files.StoredFile]:
    """Return the image files below a folder, sorted by name, chosen by suffix; CirError if there is none."""
    found = [file for file in files.list_files(uri) if _stem_suffix(file.name)[1] in IMAGE_SUFFIXES]
    if not found:
        raise CirError(f"{files.redact(uri)}: no image in this folder; looked for .{', .'.join(IMAGE_SUFFIXES)}")
    return found


def index_image_folder(uri: str, slice_rows: int = 256, *, require_caption: bool = False) -> ShardIndex:
    """Index a folder; captions are the `.txt` files beside the images, read here to be checked.

    Raises CirError for a folder without images.
    """
    if slice_rows < 1:
        raise CirError(f"slice_rows must be at least 1, not {slice_rows}")
    images = list_images(uri)
    texts = {_stem_suffix(file.name)[0]: file for file in files.list_files(uri) if file.name.endswith(".txt")}
    rejects: list[Reject] = []
    kept: list[tuple[str, ...]] = []
    rows = (_index_row(image, texts.get(_stem_suffix(image.name)[0])) for image in images)
    for row, verdict in sort_rows(rows, shard=files.redact(uri), require_caption=require_caption):
        if isinstance(verdict, Reject):
            rejects.append(verdict)
        else:
            kept.append((row.key, *row.members))
    slices = tuple(
        Slice(uri, start, len(run), start, len(run), files=tuple(name for names in run for name in names))
        for start in range(0, len(kept), slice_rows)
        for run in [kept[start : start + slice_rows]]
    )
    return ShardIndex(uri, len(kept), slices, tuple(rejects), sum(image.size_bytes for image in images))


def _index_row(image: files.StoredFile, text: files.StoredFile | None) -> Row:
    members = (text.name,) if text else ()
    if text and text.size_bytes > MAX_SAMPLE_BYTES:
        problem = ("sample_too_large", f"{text.name}: {text.size_bytes} bytes")
        return Row(image.name, 0, 0, problem=problem)
    caption = files.read_bytes(text.uri) if text else None
    return Row(image.name, 0, 0, b"", image.size_bytes, caption, members=members)


def slice_rows(part: Slice) -> Iterator[Row]:
    """Yield the rows of a slice; `part.files` lists each image, then its caption file if it has one."""
    names = part.files
    for index, name in enumerate(names):
        if _stem_suffix(name)[1] == "txt":
            continue
        has_text = index + 1 < len(names) and _stem_suffix(names[index + 1])[1] == "txt"
        image = files.read_bytes(files.join(part.shard, name))
        caption = files.read_bytes(files.join(part.shard, names[index + 1])) if has_text else None
        yield Row(name, index, index + 1, image, len(image), caption)
