"""Where a benchmark's pictures lie. Looked for only when they are to be embedded: scoring needs no pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from cir_core import files
from cir_core.files import StoredFile
from cir_core.preprocessing import ImageError
from cir_core.schema import CirError

SUFFIXES = (".png", ".jpg", ".jpeg")  # copies of one data set differ; the first that is there is taken
_NAMED = 5


@dataclass(frozen=True)
class ImageFiles:
    """Folders of pictures named by image id.

    folders: where to look, in this order; those that do not exist are passed over.
    stems: image id -> path below a folder, without the suffix; an id that is absent is its own path.
    source: where a person gets the pictures.
    """

    folders: tuple[str, ...]
    source: str
    stems: Mapping[str, str] = field(default_factory=dict)

    def locate(self, image_ids: Iterable[str], *, missing: Literal["error", "skip"] = "error") -> dict[str, StoredFile]:
        """Return {image id: its picture file} in the order asked for.

        Lists each folder once. missing: what to do about ids without a .png, .jpg or .jpeg (in either case):
        "error" raises a CirError that counts them and names the first, because a picture left out makes the
        benchmark easier; "skip" leaves them out of the result.
        """
        wanted = {name: self.stems.get(name, name) for name in image_ids}
        found: dict[str, StoredFile] = {}
        for folder in self.folders:
            if len(found) < len(wanted) and files.is_folder(folder):
                listed = _pictures_by_stem(folder, {stem.rpartition("/")[0] for stem in wanted.values()})
                for name, stem in wanted.items():
                    if name not in found and stem in listed:
                        found[name] = listed[stem]
        lost = [name for name in wanted if name not in found]
        if lost and (missing == "error" or not found):
            more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
            raise CirError(
                f"{len(lost)} of {len(wanted)} images are missing: {', '.join(lost[:_NAMED])}{more}; looked "
                f"for {', '.join(SUFFIXES)} in {', '.join(map(files.redact, self.folders))}; get them from {self.source}"
            )
        return {name: found[name] for name in wanted if name in found}


@dataclass(frozen=True, slots=True)
class Crop:
    """A box of a picture, to cut out before it is preprocessed.

    left, top, width, height: the object's box in pixels. dilation: the share of the box's size that is added
    to its left and its top, and only there, as GeneCIS's published code does. Its right and lower edges are
    counted from the dilated corner, so they move right and down where that corner was held at the picture's
    border. pad_square: the cut is then padded with black to a square, centred.
    """

    left: float
    top: float
    width: float
    height: float
    dilation: float = 0.0
    pad_square: bool = False

    def box(self, image_width: int, image_height: int) -> tuple[int, int, int, int]:
        """Return (left, upper, right, lower) in whole pixels, inside a picture of that size.

        >>> Crop(100, 50, 40, 20, dilation=0.5).box(640, 480)
        (80, 40, 140, 70)
        >>> Crop(10, 50, 40, 20, dilation=0.5).box(640, 480)
        (0, 40, 60, 70)
        """
        left = max(0.0, self.left - self.dilation * self.width)
        top = max(0.0, self.top - self.dilation * self.height)
        right = min(float(image_width), left + (1 + self.dilation) * self.width)
        lower = min(float(image_height), top + (1 + self.dilation) * self.height)
        return round(left), round(top), round(right), round(lower)

    def cut(self, image: Image.Image) -> Image.Image:
        """Return the box of a picture, padded if so asked; for `preprocess_image(..., cut=crop.cut)`.

        Raises ImageError ("outside") where nothing of the box lies in the picture.
        """
        left, top, right, lower = self.box(*image.size)
        width, height = right - left, lower - top
        if width < 1 or height < 1:
            raise ImageError("outside", f"{self} in a picture of {image.width} x {image.height} pixels")
        part = image.crop((left, top, right, lower))
        if not self.pad_square or width == height:
            return part
        side = max(width, height)
        square = Image.new(part.mode, (side, side))  # black
        square.paste(part, ((side - width) // 2, (side - height) // 2))
        return square


def _pictures_by_stem(folder: str, below: set[str]) -> dict[str, StoredFile]:
    """Map "path/without-suffix" to file for the pictures of a folder, listing no more of it than is asked for."""
    tops = {path.partition("/")[0] for path in below}
    pictures: dict[str, tuple[int, StoredFile]] = {}
    for top in sorted(tops):
        start = files.join(folder, top) if top else folder
        if not files.is_folder(start):
            continue
        for file in files.list_files(start, recursive=bool(top)):
            stem, dot, suffix = (f"{top}/{file.name}" if top else file.name).rpartition(".")
            order = SUFFIXES.index(dot + suffix.lower()) if dot + suffix.lower() in SUFFIXES else None
            if order is not None and (stem not in pictures or order < pictures[stem][0]):
                pictures[stem] = (order, file)
    return {stem: file for stem, (_, file) in pictures.items()}
