"""Pixels equal to open_clip's, every kind of file, and hostile ones."""

import dataclasses
import functools
import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from cir_core.preprocessing import (
    IMAGE_ERROR_REASONS,
    ImageError,
    Preprocessing,
    _padded,
    _resized,
    _scale,
    normalize,
    preprocess_image,
)
from cir_core.schema import CirError

SIZE = 64


def picture(width, height, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 30, 60, 120))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encode(image, form="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def open_clip_pixels(data, resize_mode, interpolation="bicubic", size=SIZE):
    """The image just before ToTensor, read back from it."""
    transform = image_transform(
        size,
        is_train=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        resize_mode=resize_mode,
        interpolation=interpolation,
    )
    return (transform(Image.open(io.BytesIO(data))) * 255).round().to(torch.uint8).numpy()


SHAPES = [
    (64, 64),
    (65, 64),
    (100, 67),
    (67, 100),
    (333, 64),
    (30, 45),
    (640, 427),
    (63, 1000),
    (1, 1),
    (7, 300),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mode", "resize_mode"), [("center_crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clip(shape, mode, resize_mode, interpolation):
    preprocessing = Preprocessing(SIZE, mode, interpolation)
    for data in (
        encode(picture(*shape)),
        encode(picture(*shape), "JPEG", quality=90),
        encode(picture(*shape), "JPEG", progressive=True),
        encode(picture(*shape, "L"), "JPEG"),
        encode(picture(*shape, "RGBA")),
        encode(picture(*shape, "RGBA").convert("LA")),
        encode(picture(*shape), "WEBP", lossless=True),
    ):
        ours = preprocess_image(data, preprocessing)
        assert ours.dtype == np.uint8
        assert ours.flags["C_CONTIGUOUS"]
        assert np.array_equal(ours, open_clip_pixels(data, resize_mode, interpolation))


def four_colours(image):
    """CMYK with black ink, as printers separate it; Pillow's own conversion uses none."""
    inks = 255 - np.asarray(image.convert("RGB")).astype(int)
    black = inks.min(-1, keepdims=True)
    inks = (inks - black) * 255 // np.maximum(255 - black, 1)
    return Image.fromarray(np.concatenate([inks, black], -1).astype(np.uint8), "CMYK")


@functools.cache
def in_other_modes(width, height, box=None, colour="black"):
    """Files of a picture, with a rectangle of this colour, in every mode that open_clip resizes before it converts."""
    image = picture(width, height)
    if box:
        image.paste(colour, box)
    palette, bits, see_through = image.quantize(40), image.convert("1"), bytes(range(0, 240, 6))
    green = Image.new("RGB", image.size, "green").quantize(40)
    return {
        "P PNG": encode(palette),
        "P PNG, 4 colours": encode(image.quantize(4)),
        "P PNG, transparent": encode(palette, transparency=see_through),
        "P PNG, one transparent": encode(palette, transparency=3),
        "P GIF": encode(palette, "GIF"),
        "P GIF, transparent": encode(palette, "GIF", transparency=3),
        "P GIF, animated": encode(palette, "GIF", save_all=True, append_images=[green]),
        "P BMP": encode(palette, "BMP"),
        "P TIFF": encode(palette, "TIFF"),
        "1 PNG": encode(bits),
        "1 BMP": encode(bits, "BMP"),
        "1 TIFF": encode(bits, "TIFF"),
        "CMYK JPEG": encode(four_colours(image), "JPEG", quality=90),
        "CMYK TIFF": encode(four_colours(image), "TIFF"),
        "YCbCr TIFF": encode(image.convert("YCbCr"), "TIFF"),
        "LAB TIFF": encode(image.convert("LAB"), "TIFF"),
        "LA TIFF": encode(image.convert("LA"), "TIFF"),
        "RGB PNG, one transparent": encode(image, transparency=image.getpixel((0, 0))),
        "L PNG, one transparent": encode(image.convert("L"), transparency=7),
    }


def mode_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.mode


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mode", "resize_mode"), [("center_crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_other_modes_equal_open_clip(shape, mode, resize_mode, interpolation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on transparent palettes: ours is silent, see below
        files = {
            name: (data, open_clip_pixels(data, resize_mode, interpolation))
            for name, data in in_other_modes(*shape).items()
        }
    for name, (data, expected) in files.items():
        assert mode_of(data) == name.split()[0], name
        assert np.array_equal(preprocess_image(data, Preprocessing(SIZE, mode, interpolation)), expected), name


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 70))
def test_any_shape_equals_open_clip(width, height, size):
    data = encode(picture(width, height))
    ours = preprocess_image(data, Preprocessing(size))
    assert np.array_equal(ours, open_clip_pixels(data, "shortest", size=size))


class TargetPad:
    """The definition used by CLIP4Cir and SEARLE, with torchvision's pad."""

    def __call__(self, image):
        width, height = image.size
        if max(width, height) / min(width, height) < 1.25:
            return image
        wanted = max(width, height) / 1.25
        horizontal = max(int((wanted - width) / 2), 0)
        vertical = max(int((wanted - height) / 2), 0)
        return F.pad(image, [horizontal, vertical, horizontal, vertical], 0, "constant")


@pytest.mark.parametrize("shape", [*SHAPES, (80, 64), (64, 80), (79, 64), (81, 64), (300, 100)])
def test_target_pad(shape):
    transform = Compose([TargetPad(), Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE), ToTensor()])
    image = picture(*shape)
    expected = (transform(image) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(preprocess_image(encode(image), Preprocessing(SIZE, "target_pad")), expected)


BLACK = {"CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "LAB": (0, 128, 128)}


@pytest.mark.parametrize("shape", [(90, 80), (300, 100), (101, 333)])
def test_target_pad_pads_in_the_mode_of_the_picture(shape):
    after = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])
    for name, data in in_other_modes(*shape, (20, 20, 60, 60)).items():  # so that the palette has black
        stored = Image.open(io.BytesIO(data))
        black = BLACK.get(stored.mode, 0)
        if stored.mode == "P":
            colours = np.array(stored.getpalette()).reshape(-1, 3)
            index = np.flatnonzero(~colours.any(1))
            if index.size:
                black = int(index[0])
            else:
                stored, black = stored.convert("RGBA").convert("RGB"), 0
            assert index.size or "4 colours" in name  # too few for black
        wanted = max(shape) / 1.25 if max(shape) / min(shape) >= 1.25 else 0
        border = [max(int((wanted - side) / 2), 0) for side in shape]
        if name == "P PNG, 4 colours" and not any(border):
            stored = Image.open(io.BytesIO(data))
        expected = after(F.pad(stored, [*border, *border], black) if any(border) else stored).convert("RGB")
        ours = preprocess_image(data, Preprocessing(SIZE, "target_pad"))
        assert np.array_equal(ours, np.asarray(expected).transpose(2, 0, 1)), name


def test_target_pad_is_black_where_nothing_was():
    for name, data in in_other_modes(400, 100, (0, 0, 400, 100), "white").items():  # the palettes have no black
        ours = preprocess_image(data, Preprocessing(SIZE, "target_pad"))
        assert ours[:, 0].max() <= 2, name
        assert ours[:, SIZE // 2].min() >= 250, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.new("RGB", (96, 64), "black")
    ImageDraw.Draw(upright).rectangle((0, 0, 40, 20), fill="red")
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        ours = preprocess_image(encode(stored, form, exif=exif, **options), Preprocessing(SIZE))
        assert np.array_equal(ours, preprocess_image(encode(upright), Preprocessing(SIZE)))
    upright = picture(130, 90)
    turn = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, undo)
    for form, image in (
        ("PNG", upright.quantize(16)),
        ("PNG", upright.convert("1")),
        ("TIFF", upright.quantize(16)),
        ("TIFF", four_colours(upright)),
    ):
        data = encode(image.transpose(turn) if turn is not None else image, form, exif=exif)
        assert np.array_equal(
            preprocess_image(data, Preprocessing(SIZE)), open_clip_pixels(encode(image, form), "shortest")
        )


def test_broken_exif_is_no_orientation():
    data = encode(picture(80, 70), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\xff\xff\xff\xff")
    assert np.array_equal(preprocess_image(data, Preprocessing(SIZE)), open_clip_pixels(data, "shortest"))


def test_every_mode_gives_sensible_rgb():
    red = np.array([200, 10, 20])
    base = Image.new("RGB", (90, 70), tuple(red))
    palette = base.quantize(4)
    see_through = palette.copy()
    files = {
        "palette": encode(palette),
        "palette with transparency": encode(see_through, transparency=bytes([0, 128, 255, 255])),
        "palette with one transparent colour": encode(palette, transparency=0),
        "RGBA": encode(base.convert("RGBA")),
        "CMYK": encode(base.convert("CMYK"), "JPEG", quality=100),
        "CMYK TIFF": encode(base.convert("CMYK"), "TIFF"),
        "GIF": encode(base, "GIF"),
        "BMP": encode(base, "BMP"),
        "YCbCr": encode(base.convert("YCbCr"), "TIFF"),
        "LAB": encode(base.convert("LAB"), "TIFF"),
        "palette and alpha": encode(palette.convert("PA"), "TIFF"),
    }
    for name, data in files.items():
        ours = preprocess_image(data, Preprocessing(SIZE))
        assert np.abs(ours.mean((1, 2)) - red).max() < 8, name


def test_premultiplied_grey_has_its_alpha_divided_out():
    grey = picture(90, 70, "RGBA").convert("LA")
    tag = b"\x52\x01\x03\0\x01\0\0\0"  # ExtraSamples: 2 is alpha, 1 is alpha that is multiplied in
    files = [
        encode(image, "TIFF").replace(tag + b"\2", tag + b"\1") for image in (grey, grey.convert("L").convert("LA"))
    ]
    assert [mode_of(data) for data in files] == ["La", "La"]
    resize = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])
    expected = resize(Image.open(io.BytesIO(files[0]))).convert("LA").convert("RGB")
    assert np.array_equal(preprocess_image(files[0], Preprocessing(SIZE)), np.asarray(expected).transpose(2, 0, 1))
    opaque = open_clip_pixels(encode(grey.convert("L")), "shortest")
    assert np.array_equal(preprocess_image(files[1], Preprocessing(SIZE)), opaque)


def test_a_palette_with_alpha_is_converted_before_it_is_resized():
    palette = picture(90, 70).quantize(16)
    data = encode(palette.convert("PA"), "TIFF")
    assert mode_of(data) == "PA"
    assert not open_clip_pixels(data, "shortest").any()  # black: this is why
    expected = open_clip_pixels(encode(palette.convert("RGB")), "shortest")
    assert np.array_equal(preprocess_image(data, Preprocessing(SIZE)), expected)


def test_a_cut_is_given_grey_or_rgb():
    modes = []

    def cut(image):
        modes.append(image.mode)
        return image.crop((5, 5, 95, 75))

    files = in_other_modes(100, 80)
    for data in files.values():
        plain = Image.open(io.BytesIO(data))
        if plain.mode not in ("L", "LA", "RGB"):
            plain = plain.convert("RGBA" if plain.mode == "P" else "RGB").convert("RGB")
        expected = open_clip_pixels(encode(plain.crop((5, 5, 95, 75))), "shortest")
        assert np.array_equal(preprocess_image(data, Preprocessing(SIZE), cut=cut), expected)
    assert set(modes) == {"L", "LA", "RGB"}


def test_sixteen_bit_keeps_its_high_byte():
    ramp = np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96)
    expected = preprocess_image(encode(Image.fromarray((ramp >> 8).astype(np.uint8))), Preprocessing(SIZE))
    for form in ("PNG", "TIFF"):
        assert np.array_equal(preprocess_image(encode(Image.fromarray(ramp), form), Preprocessing(SIZE)), expected)
    big_endian = Image.frombytes("I;16B", (96, 64), ramp.astype(">u2").tobytes())
    assert np.array_equal(preprocess_image(encode(big_endian, "TIFF"), Preprocessing(SIZE)), expected)
    int32 = Image.fromarray(ramp.astype(np.int32))
    assert np.array_equal(preprocess_image(encode(int32, "TIFF"), Preprocessing(SIZE)), expected)

    with pytest.raises(ImageError) as caught:
        preprocess_image(encode(Image.fromarray(ramp.astype(np.float32)), "TIFF"), Preprocessing(SIZE))
    assert caught.value.reason == "unsupported_mode"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    ours = preprocess_image(data, Preprocessing(SIZE)).mean((1, 2))
    assert np.abs(ours - [255, 0, 0]).max() < 3


# ---- fast decoding


@functools.cache
def noise(seed):
    """A plane of 1/f noise, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048)[None])
    frequency[0, 0] = 1
    spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency**1.2
    plane = np.fft.irfft2(spectrum, s=(2048, 2048)).astype(np.float32)
    return (plane - plane.mean()) / plane.std() * 45


def photograph(width, height, seed=0):
    """Noise as in photographs, with hard edges, thin lines and writing."""
    rng = np.random.default_rng(seed)
    planes = [np.roll(noise(plane), seed * 100)[:height, :width] + rng.uniform(70, 180) for plane in range(3)]
    image = Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, r = (int(value) for value in (rng.integers(width), rng.integers(height), rng.integers(9, width // 5)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        draw.line(
            (x, y, int(rng.integers(width)), int(rng.integers(height))), fill=colour[::-1], width=max(1, width // 200)
        )
        draw.text((x // 2, y), "The quick brown fox", fill=colour[::-1], font=ImageFont.load_default(width // 20))
    return image


def both(data, preprocessing):
    exact = preprocess_image(data, preprocessing)
    fast = preprocess_image(data, dataclasses.replace(preprocessing, decode="fast"))
    return exact.astype(int), fast.astype(int)


@pytest.mark.parametrize("mode", ["center_crop", "target_pad", "squash"])
@pytest.mark.parametrize("shape", [(897, 903), (1200, 902), (1041, 1291), (2048, 1366), (1016, 1800)])
def test_fast_decoding_keeps_its_tolerance(shape, mode):
    for seed, (quality, subsampling) in enumerate([(75, 2), (95, 0)]):
        data = encode(photograph(*shape, seed), "JPEG", quality=quality, subsampling=subsampling)
        exact, fast = both(data, Preprocessing(224, mode))
        difference = np.abs(exact - fast)
        assert difference.mean() < 1
        assert np.percentile(difference, 99.9) <= 16
        assert difference.max() <= 64
        assert difference.any()  # it did something else than exact decoding


def waves(width, height):
    """Smooth waves so steep after resizing that a quarter of a pixel aside is tens of levels."""
    y, x = np.mgrid[:height, :width] * (np.pi / 2 / (min(width, height) / 64) / 4)
    planes = [np.sin(x), np.sin(y), np.sin(x + y)]
    return Image.fromarray((np.stack(planes, -1) * 120 + 128).round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(261, 300), (700, 523)])
@pytest.mark.parametrize("mode", ["center_crop", "target_pad", "squash"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_decoding_shifts_nothing(shape, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, height in (shape, (shape[0] // 8 * 8, shape[1] // 8 * 8)):
        data = encode(waves(width, height), "JPEG", quality=98, subsampling=0, exif=exif)
        exact, fast = both(data, Preprocessing(SIZE, mode))
        assert np.abs(exact - fast).max() <= 6
        moved = orientation > 1 or (mode == "target_pad" and max(shape) / min(shape) >= 1.25)
        assert np.array_equal(exact, fast) == (moved and (width, height) == shape)


def test_fast_decoding_is_exact_where_it_could_not_be_close():
    def crop(image):
        return image.crop((100, 50, 500, 450))

    large = photograph(900, 700)
    fast = Preprocessing(SIZE, decode="fast")
    exact = Preprocessing(SIZE)
    for data in (encode(large), encode(large, "WEBP", quality=90), encode(photograph(127, 200), "JPEG")):
        assert np.array_equal(preprocess_image(data, fast), preprocess_image(data, exact))
    data = encode(large, "JPEG")
    assert np.array_equal(preprocess_image(data, fast, cut=crop), preprocess_image(data, exact, cut=crop))
    assert not np.array_equal(preprocess_image(data, fast), preprocess_image(data, exact))


@pytest.mark.parametrize("mode", ["center_crop", "target_pad", "squash"])
@pytest.mark.parametrize("shape", [(897, 903), (1016, 1800)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_decoding_of_cmyk_keeps_its_tolerance(shape, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(four_colours(photograph(*shape)), "JPEG", quality=85, exif=exif)
    exact, fast = both(data, Preprocessing(224, mode))
    difference = np.abs(exact - fast)
    assert difference.mean() < 1
    assert np.percentile(difference, 99.9) <= 16
    assert difference.max() <= 64
    evenly = orientation > 1 or (mode == "target_pad" and max(shape) / min(shape) >= 1.25)
    assert difference.any() == (not evenly or not any(side % 2 for side in shape))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_fast_decoding_of_other_jpegs(mode):
    data = encode(photograph(900, 700).convert(mode), "JPEG", progressive=True)
    exact, fast = both(data, Preprocessing(SIZE))
    assert np.abs(exact - fast).mean() < 1
    assert reason_of(data[: len(data) // 2], preprocessing=Preprocessing(SIZE, decode="fast")) == "truncated"
    assert reason_of(data, preprocessing=Preprocessing(SIZE, decode="fast"), max_pixels=899 * 700) == "too_many_pixels"


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    target=st.integers(1, 400),
    mode=st.sampled_from(["center_crop", "target_pad", "squash"]),
    turned=st.booleans(),
)
def test_a_reduced_picture_is_twice_the_target(size, target, mode, turned):
    preprocessing = Preprocessing(target, mode)
    scale = _scale(size, preprocessing, turned=turned)
    padded = _padded(size, preprocessing)
    resized = (target, target) if mode == "squash" else _resized(padded, target)
    evenly = turned or padded != size
    assert scale in (1, 2, 4, 8)
    if scale > 1:
        assert all(side / scale >= 2 * goal for side, goal in zip(padded, resized, strict=True))
        assert not evenly or all(side % scale == 0 for side in size)
    elif not evenly:
        assert any(side / 2 < 2 * goal for side, goal in zip(padded, resized, strict=True))


def reason_of(data, preprocessing=Preprocessing(SIZE), **limits):  # noqa: B008 - frozen
    with pytest.raises(ImageError) as caught:
        preprocess_image(data, preprocessing, **limits)
    error = caught.value
    assert error.reason in IMAGE_ERROR_REASONS
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - exceptions travel between Ray workers
    assert (type(copy), copy.reason, copy.detail, str(copy)) == (
        ImageError,
        error.reason,
        error.detail,
        str(error),
    )
    return error.reason


def png_of_size(width, height):
    """A PNG whose header announces any size, with hardly any data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def test_hostile_files():
    jpeg = encode(picture(300, 200), "JPEG")
    assert reason_of(b"") == "empty"
    assert reason_of(b"<!DOCTYPE html><html><body>404</body></html>") == "unreadable"
    assert reason_of(b"\xff\xd8\xff") == "unreadable"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "unreadable"
    assert reason_of(jpeg, max_bytes=len(jpeg) - 1) == "too_large"
    assert reason_of(jpeg, max_pixels=300 * 200 - 1) == "too_many_pixels"
    assert reason_of(png_of_size(10_000, 10_000)) == "too_many_pixels"  # Pillow would warn
    assert reason_of(png_of_size(30_000, 30_000)) == "too_many_pixels"  # Pillow would raise
    assert reason_of(png_of_size(2**31 - 1, 2**31 - 1)) == "too_many_pixels"
    assert reason_of(jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason_of(encode(picture(300, 200))[:40_000]) == "truncated"
    assert reason_of(png_of_size(100, 100)) in ("truncated", "unreadable")


def test_long_thin_images_do_not_explode():
    thin = encode(Image.new("L", (1, 60_000)))
    assert preprocess_image(thin, Preprocessing(SIZE, "squash")).shape == (3, SIZE, SIZE)
    for mode in ("center_crop", "target_pad"):
        with pytest.raises(ImageError) as caught:
            preprocess_image(thin, Preprocessing(SIZE, mode))
        assert caught.value.reason == "extreme_shape"


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *in_other_modes(40, 30)]),
    mode=st.sampled_from(["center_crop", "target_pad"]),
    cut=st.floats(0, 1),
    noise=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
def test_damaged_files_give_pixels_or_an_image_error(form, mode, cut, noise):
    data = bytearray(in_other_modes(40, 30).get(form) or encode(picture(40, 30), form))
    for place, value in noise:
        data[int(place * len(data))] = value
    data = bytes(data[: int(len(data) * cut)])
    try:
        assert preprocess_image(data, Preprocessing(16, mode), max_pixels=1 << 20).shape == (3, 16, 16)
    except ImageError as error:
        assert error.reason in IMAGE_ERROR_REASONS  # noqa: PT017 - both ends are legal


def test_settings_are_checked():
    assert Preprocessing(224, "target_pad", "bilinear").tag == "target_pad-224-bilinear"
    assert Preprocessing(224, decode="fast").tag == "center_crop-224-bicubic-fast"
    with pytest.raises(CirError, match=r"decode 'fsat' is not one of exact, fast; did you mean 'fast'"):
        Preprocessing(224, decode="fsat")
    with pytest.raises(CirError, match=r"mode 'center-crop' is not one of .*did you mean 'center_crop'"):
        Preprocessing(64, "center-crop")
    with pytest.raises(CirError, match="interpolation 'lanczos'"):
        Preprocessing(64, interpolation="lanczos")
    with pytest.raises(CirError, match="size must be"):
        Preprocessing(0)


def test_normalize_equals_open_clip():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    data = encode(picture(90, 70))
    ours = normalize(torch.from_numpy(preprocess_image(data, Preprocessing(SIZE)))[None], mean, std)
    theirs = image_transform(SIZE, is_train=False, mean=mean, std=std)(Image.open(io.BytesIO(data)))
    assert torch.equal(ours[0], theirs)
    with pytest.raises(CirError, match="expected uint8"):
        normalize(torch.zeros(1, 3, 4, 4), mean, std)
    with pytest.raises(CirError, match="expected uint8"):
        normalize(torch.zeros(3, 4, 4, dtype=torch.uint8), mean, std)
