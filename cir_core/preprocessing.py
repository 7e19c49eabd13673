"""From the bytes of an image file to uint8 pixels of a fixed size, and from those to a model's input.

Files are hostile: sizes are checked before anything is decoded, and whatever is wrong becomes an
`ImageError` with one of `IMAGE_ERROR_REASONS`. The pixels are exactly those of open_clip's evaluation transform;
`preprocess_image` names the exceptions. Decoding is at full scale: a JPEG decoder's own reduction changes the pixels,
a little, and is done only where it is asked for (`Preprocessing.decode`).
"""

from __future__ import annotations

import difflib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cir_core.schema import CirError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["center_crop", "target_pad", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
Decode = Literal["exact", "fast"]

MAX_PIXELS = 1 << 26
"""Default limit of decoded and of intermediate pixels: 67 million, 200 MB in RGB."""
MAX_BYTES = 64 << 20
"""Default limit of a file's size in bytes."""
MAX_SCANS = 100
"""Scans of a JPEG: encoders write 10, and each costs a walk over the whole picture, which 50 bytes may ask for."""
TARGET_RATIO = 1.25
"""target_pad pads images that are longer than this: the value of CLIP4Cir and of the work built on it."""

IMAGE_ERROR_REASONS = {
    "empty": "zero bytes",
    "too_large": "the file is larger than max_bytes",
    "too_many_pixels": "the header announces more than max_pixels",
    "too_many_scans": f"a JPEG with more than {MAX_SCANS} scans, made to keep a decoder busy for minutes",
    "extreme_shape": "so long and thin that resizing or padding it would need more than max_pixels",
    "truncated": "the file ends early",
    "unreadable": "not an image of a known format, or a damaged one",
    "outside": "the box to cut out does not lie in the picture",
    "unsupported_mode": "pixels without a defined range, such as floating point",
}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CUT_SHORT = re.compile(r"truncat|not enough image data|end of file", re.IGNORECASE)
_UPRIGHT = {  # EXIF orientation (tag 0x0112) -> the operation that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
_JPEG_SCALES = (8, 4, 2)
_FAST_MARGIN = 2  # see Preprocessing
_RESIZED_AS_THEY_ARE = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")  # converted after resizing
_BLACK = {"CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "LAB": (0, 128, 128)}


class ImageError(ValueError):
    """An image that cannot be used. reason: one of IMAGE_ERROR_REASONS; detail: what a person should know."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a square of `size` x `size` pixels.

    mode: "center_crop" resizes the shorter side and crops the middle; "target_pad" first pads images longer
    than 5:4 with black, then does the same; "squash" resizes both sides and ignores the aspect ratio.
    decode: "exact" gives open_clip's own pixels. "fast" lets the JPEG decoder deliver 1/2, 1/4 or 1/8 of both sides
    where that is still twice what is resized to: from 896 pixels on at size 224; 2 to 6 times as many images per
    second from 1024 to 4096 pixels. Its tolerance, over photographs, writing and thin lines: of the levels 0 to 255
    they differ by less than 1 on average, 99.9 % of them by at most 16, none by more than 64 (once the size instead
    of twice the size would double this). Other formats, smaller images, parts cut out of a picture, and turned or
    padded pictures whose sides the reduction does not divide are decoded exactly all the same.
    Raises CirError for values that do not exist.
    """

    size: int
    mode: Mode = "center_crop"
    interpolation: Interpolation = "bicubic"
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise CirError(f"preprocessing size must be between 1 and 4096 pixels, not {self.size}")
        for name, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
            ("decode", self.decode, get_args(Decode)),
        ):
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise CirError(f"preprocessing {name} {value!r} is not one of {', '.join(known)}{hint}")

    @property
    def tag(self) -> str:
        """The name that goes into identities.

        >>> Preprocessing(64).tag
        'center_crop-64-bicubic'
        >>> Preprocessing(64, decode="fast").tag
        'center_crop-64-bicubic-fast'
        """
        return f"{self.mode}-{self.size}-{self.interpolation}" + ("-fast" if self.decode == "fast" else "")


def preprocess_image(
    data: bytes,
    preprocessing: Preprocessing,
    *,
    cut: Callable[[Image.Image], Image.Image] | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> npt.NDArray[np.uint8]:
    """Decode an image file and return uint8[3, size, size], RGB.

    As open_clip does it, a picture is resized in its own mode and converted to RGB after that: grey, RGB and both
    with alpha, CMYK, YCbCr and LAB with the chosen filter, palettes and 1-bit by taking the nearest pixel. Alpha is
    dropped (`convert("RGB")`), and of an animation the first frame is taken. These differ from open_clip's transform:

    - EXIF orientation is applied.
    - 16-bit and 32-bit grey keeps the high byte of 16 bits: open_clip makes all above 255 white.
    - Floating point is refused, for its range is not known: open_clip cuts it to 0..255.
    - A palette with alpha (PA, in TIFF) is converted first: open_clip averages the indices, and its picture is black.
    - Grey with premultiplied alpha (La, in TIFF) has the alpha divided out after resizing: open_clip fails.
    - target_pad is not open_clip's. It pads with what is black in the picture's mode; a palette without black is
      converted to RGB before padding, and so resized with the chosen filter.

    cut: takes a part of the upright picture, such as `cir_core.benchmarks.Crop.cut`; it is given grey or RGB, perhaps
    with alpha: other modes are converted before cutting. Raises ImageError; emits no warning.
    """
    if not data:
        raise ImageError("empty")
    if len(data) > max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, at most {max_bytes} allowed")
    _check_scans(data)
    _silence_pillow()
    reduction = preprocessing if preprocessing.decode == "fast" and cut is None else None
    picture = _decode(data, max_pixels, reduction)
    if cut is not None:
        image = picture.image
        image = cut(image if image.mode in ("L", "LA", "RGB", "RGBA") else _to_rgb(image))
        picture = _Picture(image, image.size)
    _check_shape(picture.size, preprocessing, max_pixels)
    pixels = np.asarray(_to_rgb(_fit(picture, preprocessing)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # the others stand inside a scan


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG with more than MAX_SCANS scans before its end marker."""
    if not data.startswith(b"\xff\xd8") or data.count(_SCAN) <= MAX_SCANS:
        return
    position, scans = 2, 0
    while (found := _MARKER.search(data, position)) and found.group(1) != b"\xd9":
        position = found.end()
        position += int.from_bytes(data[position : position + 2], "big")
        scans += found.group(1) == _SCAN[1:]
    if scans > MAX_SCANS:
        raise ImageError("too_many_scans", f"{scans} scans")


_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _silence_pillow() -> None:
    """Ignore Pillow's warnings on size and odd metadata; safe in threads, as catch_warnings is not."""
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class _Picture:
    """An upright image. size: width and height at full scale; the image holds 1/scale of both, rounded up."""

    image: Image.Image
    size: tuple[int, int]
    scale: int = 1


def _decode(data: bytes, max_pixels: int, reduction: Preprocessing | None) -> _Picture:
    """Open, check the announced size, decode, turn upright, in a mode that can be resized.

    reduction: what for, if the decoder may deliver less than the whole.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError("too_many_pixels", f"{image.width} x {image.height}, at most {max_pixels}")
            if image.format != "JPEG":
                image.load()  # first: a PNG loads itself to find its EXIF, whose errors count for nothing; a TIFF turns itself
            operation = _UPRIGHT.get(_orientation(image))
            stored = image.size
            size = stored[::-1] if operation in _SWAPS_SIDES else stored
            scale = 1
            if reduction is not None and image.format == "JPEG":
                scale = _scale(size, reduction, turned=operation is not None)
                image.draft(None, (stored[0] // scale, stored[1] // scale))
            image.load()
            whole = _resizable(image)
            return _Picture(whole.transpose(operation) if operation is not None else whole, size, scale)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", f"{error}; at most {max_pixels}") from None
    except UnidentifiedImageError:
        raise ImageError("unreadable", f"no known image format; the file starts with {data[:16]!r}") from None
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        text = f"{type(error).__name__}: {error}"[:200]
        cut = isinstance(error, EOFError) or _CUT_SHORT.search(text)
        raise ImageError("truncated" if cut else "unreadable", text) from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; metadata that cannot be read counts as none."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # as above; the pixels are sound
        return 1
    return value if isinstance(value, int) else 1


def _resizable(image: Image.Image) -> Image.Image:
    if image.mode in _RESIZED_AS_THEY_ARE:
        return image  # no copy: it is loaded, and stays so when its file is closed
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("unsupported_mode", "floating point pixels; store 8-bit or 16-bit ones")
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # Pillow would convert this colour too, which fails for odd ones
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _resized(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Return width and height once the shorter side is `target`."""
    width, height = size
    short, long = min(size), max(size)
    scaled = int(target * long / short)
    return (target, scaled) if width <= height else (scaled, target)


def _padding(size: tuple[int, int]) -> tuple[int, int]:
    """Return the pixels that target_pad adds left and right, and above and below (CLIP4Cir's TargetPad)."""
    if max(size) / min(size) < TARGET_RATIO:
        return 0, 0
    wanted = max(size) / TARGET_RATIO
    return max(int((wanted - size[0]) / 2), 0), max(int((wanted - size[1]) / 2), 0)


def _padded(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height of what is resized."""
    left, top = _padding(size) if preprocessing.mode == "target_pad" else (0, 0)
    return size[0] + 2 * left, size[1] + 2 * top


def _scale(size: tuple[int, int], preprocessing: Preprocessing, *, turned: bool) -> int:
    """Return by how much a JPEG decoder may reduce a picture of this size, upright.

    Where the scale does not divide a side, the last row or column stands for less than a whole pixel. That is right
    only while it is the last: not in a turned or padded picture.
    """
    width, height = _padded(size, preprocessing)
    target = preprocessing.size
    resized = (target, target) if preprocessing.mode == "squash" else _resized((width, height), target)
    most = min(width / resized[0], height / resized[1]) / _FAST_MARGIN
    evenly = turned or (width, height) != size
    fits = [scale for scale in _JPEG_SCALES if scale <= most and not (evenly and (size[0] % scale or size[1] % scale))]
    return fits[0] if fits else 1


def _check_shape(size: tuple[int, int], preprocessing: Preprocessing, max_pixels: int) -> None:
    if preprocessing.mode == "squash":
        return
    width, height = _padded(size, preprocessing)
    resized = _resized((width, height), preprocessing.size)
    if max(width * height, resized[0] * resized[1]) > max_pixels:
        raise ImageError("extreme_shape", f"{size[0]} x {size[1]} pixels")


def _fit(picture: _Picture, preprocessing: Preprocessing) -> Image.Image:
    """Pad, resize and crop to size x size, in the arithmetic of torchvision's Resize and CenterCrop.

    Of a reduced picture, `box` is what the whole one covers, to a fraction of a pixel.
    """
    size, resampling = preprocessing.size, _RESAMPLING[preprocessing.interpolation]
    image, scale = picture.image, picture.scale
    padded = _padded(picture.size, preprocessing)
    resized = (size, size) if preprocessing.mode == "squash" else _resized(padded, size)
    border = [(outer - inner) / 2 / scale for outer, inner in zip(padded, picture.size, strict=True)]
    start = math.ceil(border[0]), math.ceil(border[1])
    if any(start):
        image = _pad(image, start)
    corner = start[0] - border[0], start[1] - border[1]
    box = (*corner, corner[0] + padded[0] / scale, corner[1] + padded[1] / scale)
    image = image.resize(resized, resampling, box=box)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, border: tuple[int, int]) -> Image.Image:
    """Return the picture with black left and right, and above and below."""
    palette = list[int]()
    black: int | tuple[int, ...] = _BLACK.get(image.mode, 0)
    if image.mode == "P":
        palette = image.getpalette("RGB") or []
        colours = [tuple(palette[start : start + 3]) for start in range(0, len(palette), 3)]
        if (0, 0, 0) in colours:
            black = colours.index((0, 0, 0))
        else:
            image = _to_rgb(image)
    padded = Image.new(image.mode, (image.width + 2 * border[0], image.height + 2 * border[1]), black)
    if image.mode == "P":
        padded.putpalette(palette)
    padded.paste(image, border)
    return padded


def normalize(images_uint8_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32[B, 3, H, W] = (images / 255 - mean) / std, on the device of the images.

    Raises CirError if the images are not uint8[B, 3, H, W].
    """
    import torch  # here: processes that only decode start in half the time without it

    images = images_uint8_B3HW
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise CirError(f"normalize: expected uint8[B, 3, H, W], found {images.dtype}{list(images.shape)}")
    shape = (1, 3, 1, 1)
    mean_tensor = torch.tensor(list(mean), dtype=torch.float32, device=images.device).view(shape)
    std_tensor = torch.tensor(list(std), dtype=torch.float32, device=images.device).view(shape)
    return images.to(torch.float32).div_(255).sub_(mean_tensor).div_(std_tensor)
