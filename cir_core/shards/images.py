"""A folder of images as a shard: one sample a file, its key the path in the folder, suffix included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cir_core import files
from cir_core.schema import AccessError, CirError, Reject
from cir_core.shards.fetch import fetch_image, in_order
from cir_core.shards.linked import fetch_sample
from cir_core.shards.local_folders import odd_entries
from cir_core.shards.model import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    Row,
    Sample,
    ShardIndex,
    Slice,
    UnusableError,
    judge,
)


def _stem_suffix(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition(".")
    return stem, suffix.lower()


def is_image_name(name: str) -> bool:
    """Whether a file's suffix is an image's. The `._name` twins that macOS writes hold attributes and are none."""
    return _stem_suffix(name)[1] in IMAGE_SUFFIXES and not name.rpartition("/")[2].startswith("._")


def list_images(uri: str, *, listed: Sequence[files.StoredFile] | None = None) -> list[files.StoredFile]:
    """Return the image files below a folder, sorted by name, chosen by suffix; CirError if there is none.

    listed: what `files.list_files(uri)` returned, where the caller has it: listing millions of objects takes minutes.
    """
    if listed is None:
        odd_entries(uri)  # its errors come first: a circle of links would be followed for ever
        listed = files.list_files(uri)
    found = [file for file in listed if is_image_name(file.name)]
    if not found:
        raise CirError(f"{files.redact(uri)}: no image in this folder; looked for .{', .'.join(IMAGE_SUFFIXES)}")
    return found


def index_image_folder(
    uri: str,
    slice_rows: int = 256,
    *,
    require_caption: bool = False,
    captions: bool = True,
    listed: Sequence[files.StoredFile] | None = None,
) -> ShardIndex:
    """Index a folder from its listing alone: no file is opened, so that ten million objects take minutes.

    A caption is the `.txt` file beside the image. It is read with the image, and one that turns out bad is a
    Reject then (see `read_slice_rows`). captions: without them no `.txt` is ever read. listed: as in `list_images`.
    Raises CirError for a folder without images.
    """
    if slice_rows < 1:
        raise CirError(f"slice_rows must be at least 1, not {slice_rows}")
    shard = files.redact(uri)
    rejects = [Reject(shard, name, "not_a_file", what) for name, what in odd_entries(uri) if is_image_name(name)]
    listed = files.list_files(uri) if listed is None else listed
    images = list_images(uri, listed=listed)
    wanted = captions or require_caption
    texts = {_stem_suffix(file.name)[0]: file for file in listed if wanted and file.name.endswith(".txt")}
    kept: list[tuple[str, ...]] = []
    for image in images:
        text = texts.get(_stem_suffix(image.name)[0])
        try:
            _check_listed(image, text, require_caption=require_caption)
        except UnusableError as fault:
            rejects.append(Reject(shard, image.name, fault.reason, fault.detail))
        else:
            kept.append((image.name, text.name) if text else (image.name,))
    slices = tuple(
        Slice(uri, start, len(run), start, len(run), files=tuple(name for names in run for name in names))
        for start in range(0, len(kept), slice_rows)
        for run in [kept[start : start + slice_rows]]
    )
    return ShardIndex(uri, len(kept), slices, tuple(rejects), sum(image.size_bytes for image in images))


def _check_listed(image: files.StoredFile, text: files.StoredFile | None, *, require_caption: bool) -> None:
    """Raise UnusableError for what names and sizes tell; a text counts as a sound caption until it is read."""
    problem = None
    if text and text.size_bytes > MAX_SAMPLE_BYTES:
        problem = ("sample_too_large", f"{text.name}: {text.size_bytes} bytes")
    row = Row(image.name, 0, 0, b"", image.size_bytes, b"" if text else None, problem=problem)
    judge(row, require_caption=require_caption)


def read_folder_slice(part: Slice, *, require_caption: bool) -> Iterator[Sample | Reject]:
    """Yield a Sample or a Reject for each image of a slice, in order; several files are fetched at once."""
    shard = files.redact(part.shard)
    rows = in_order(lambda names: _read_row(part.shard, *names), _pairs(part.files))
    for position, row in enumerate(rows, start=part.first_row):
        try:
            caption = judge(row, require_caption=require_caption)
        except UnusableError as fault:
            yield Reject(shard, row.key, fault.reason, fault.detail)
        else:
            yield Sample(shard, row.key, position, row.image or b"", caption)


def _pairs(names: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    """Yield (image, its caption file or None); `Slice.files` lists each image, then its caption file if it has one."""
    for index, name in enumerate(names):
        if is_image_name(name):
            after = names[index + 1] if index + 1 < len(names) else ""
            yield name, after if after and not is_image_name(after) else None


def _read_row(folder: str, name: str, text_name: str | None) -> Row:
    image = fetch_sample(files.join(folder, name))
    if isinstance(image, UnusableError):
        return Row(name, 0, 0, problem=(image.reason, image.detail))
    try:
        caption = fetch_image(files.join(folder, text_name)) if text_name else None
    except AccessError:
        raise
    except CirError as error:
        return Row(name, 0, 0, problem=("missing", str(error)))
    return Row(name, 0, 0, image, len(image), caption)
