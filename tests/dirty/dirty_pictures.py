"""Kinds of picture files: wrong, damaged, hostile, and only odd. Those that are sound must give open_clip's pixels."""

from __future__ import annotations

from collections.abc import Callable

import dirty_bombs as bombs
import numpy as np
from dirty_kind import Kind, encode, file_writer, jpeg, photo, with_neighbours
from PIL import Image


def _kind(
    name: str,
    what: str,
    data: Callable[[], bytes],
    reason: str = "",
    *,
    as_if: Callable[[], bytes] | None = None,
    suffix: str = "jpg",
    note: str = "",
) -> Kind:
    """A sample "odd" with this picture: rejected, or kept with open_clip's pixels of it (or of the file `as_if`)."""

    def build(name: str) -> bytes:
        return with_neighbours(name, (f"{name}/odd.{suffix}", data()), (f"{name}/odd.txt", b"odd"))

    rejects = (("odd", reason),) if reason else ()
    kept = ("a", "z") if reason else ("a", "odd", "z")
    same = "" if reason or as_if else "the pixels are open_clip's"
    write, notes = file_writer(name, ".tar", build), "; ".join(filter(None, (same, note)))
    return Kind(name, "picture", what, write, kept, rejects, note=notes, as_if=as_if, compare=not reason)


def _plain(image: Callable[[], Image.Image]) -> Callable[[], bytes]:
    return lambda: encode(image().convert("RGB"))


def _saved(form: str, image: Callable[[], Image.Image] = photo, **options: object) -> Callable[[], bytes]:
    return lambda: encode(image(), form, **options)


def _cut(data: Callable[[], bytes], share: float) -> Callable[[], bytes]:
    return lambda: data()[: int(len(data()) * share)]


def _replaced(data: Callable[[], bytes], old: bytes, new: bytes) -> Callable[[], bytes]:
    return lambda: data().replace(old, new, 1)


def _bytes(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _lying() -> Image.Image:
    return photo().transpose(Image.Transpose.ROTATE_90)  # orientation 6 undoes this


def _palette() -> Image.Image:
    return photo().quantize(16)


def _deep() -> Image.Image:
    return Image.fromarray(np.asarray(photo(mode="L")).astype(np.uint16) * 257)


def _rgb_16_bit() -> bytes:
    import zlib

    rows = b"".join(b"\0" + row.repeat(2, axis=1).tobytes() for row in np.asarray(photo()))
    return bombs.png(90, 70, depth=16, colour=2, data=zlib.compress(rows))


def _frames() -> dict[str, object]:
    return {"save_all": True, "append_images": [Image.new("RGB", (90, 70), "green")]}


def _crossed_png() -> bytes:
    data = bytearray(encode(photo()))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


_BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\xff\xff\xff\xff"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
_HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 400

WRONG = [
    _kind("picture-html", "an error page saved as .jpg", _bytes(b"<!DOCTYPE html><title>404</title>" * 40), "unreadable"),
    _kind("picture-json", "an error of an API saved as .jpg", _bytes(b'{"error": "expired"}'), "unreadable"),
    _kind("picture-zeros", "10 kB of zeros", _bytes(b"\0" * 10_000), "unreadable"),
    _kind("picture-svg", "SVG, which has no pixels", _bytes(_SVG), "unreadable"),
    _kind("picture-pdf", "a PDF", _bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), "unreadable"),
    _kind("picture-eps", "PostScript, for which Pillow would start a program", _bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "unreadable"),
    _kind("picture-heic", "HEIC, as telephones store it", _bytes(_HEIC), "unreadable", note="convert it first"),
    _kind("picture-avif", "AVIF", _saved("AVIF"), "unreadable", note="convert it first"),
    _kind("picture-ppm", "PPM", _saved("PPM"), "unreadable", note="convert it first"),
    _kind("picture-psd", "a Photoshop file", _bytes(b"8BPS\0\1" + b"\0" * 400), "unreadable"),
    _kind("picture-half-jpeg", "the first half of a JPEG", _cut(jpeg, 0.5), "truncated"),
    _kind("picture-jpeg-without-end", "a JPEG without its end marker", lambda: jpeg()[:-2], note="its pixels are all there"),
    _kind("picture-jpeg-start", "the first three bytes of a JPEG", _bytes(b"\xff\xd8\xff"), "unreadable"),
    _kind("picture-half-png", "the first half of a PNG", _cut(_saved("PNG"), 0.5), "truncated"),
    _kind("picture-half-gif", "the first half of a GIF", _cut(_saved("GIF"), 0.5), "truncated"),
    _kind("picture-half-webp", "the first half of a WebP", _cut(_saved("WEBP"), 0.5), "unreadable"),
    _kind("picture-half-bmp", "the first half of a BMP", _cut(_saved("BMP"), 0.5), "truncated"),
    _kind("picture-half-tiff", "the first half of a TIFF", _cut(_saved("TIFF"), 0.5), "truncated"),
    _kind("picture-damaged-png", "a PNG with a flipped byte in its pixels", _crossed_png, "unreadable"),
    _kind("picture-before-jpeg", "a newline before a JPEG", lambda: b"\n" + jpeg(), "unreadable"),
    _kind("picture-png-no-width", "a PNG of 0 x 70 pixels", lambda: bombs.png(0, 70), "unreadable"),
    _kind("picture-jpeg-no-size", "a JPEG of 0 x 0 pixels", lambda: bombs.jpeg_sized(0, 0), "unreadable"),
    _kind("picture-gif-no-size", "a GIF of 0 x 0 pixels", lambda: bombs.gif_frame(0, 0), "unreadable"),
    _kind("picture-float", "a TIFF of floating point numbers", _saved("TIFF", lambda: photo(mode="F")), "unsupported_mode"),
]  # fmt: skip

HOSTILE = [
    _kind("bomb-png", "a sound PNG of 30,000 x 30,000 pixels in 110 kB", lambda: bombs.black_png(30_000, 30_000), "too_many_pixels"),
    _kind("bomb-png-header", "a PNG that announces 2^31 x 2^31 pixels", lambda: bombs.png(2**31 - 1, 2**31 - 1), "too_many_pixels"),
    _kind("bomb-png-text", "a zTXt chunk that unpacks to 100 MB", lambda: bombs.text_bomb(b"zTXt"), "unreadable"),
    _kind("bomb-png-itxt", "an iTXt chunk that unpacks to 100 MB", lambda: bombs.text_bomb(b"iTXt"), "unreadable"),
    _kind("bomb-png-profile", "a colour profile that unpacks to 100 MB", lambda: bombs.text_bomb(b"iCCP"), "unreadable"),
    _kind("bomb-png-texts", "100 text chunks that unpack to a megabyte each", bombs.many_texts, "unreadable"),
    _kind("bomb-jpeg", "a JPEG that announces 65,535 x 65,535 pixels", lambda: bombs.jpeg_sized(65_535, 65_535), "too_many_pixels"),
    _kind("bomb-jpeg-scans", "a progressive JPEG with 3000 scans: minutes of work in 1 MB", bombs.scan_bomb, "too_many_scans"),
    _kind("bomb-gif-screen", "a GIF on a screen of 65,535 x 65,535 pixels", lambda: bombs.gif_screen(65_535, 65_535), "too_many_pixels"),
    _kind("bomb-gif-frame", "a GIF whose frame is 65,535 x 65,535 pixels", lambda: bombs.gif_frame(65_535, 65_535), "too_many_pixels"),
    _kind("bomb-gif-frames", "a GIF of 20,000 frames", lambda: bombs.gif_of_frames(20_000),
          note="the first frame is taken"),
    _kind("bomb-webp-canvas", "a WebP on a canvas of 16,000 x 16,000 pixels", lambda: bombs.webp_canvas(16_000, 16_000), "too_many_pixels"),
    _kind("bomb-bmp", "a BMP that announces 100,000 x 100,000 pixels", lambda: bombs.bmp_sized(100_000, 100_000), "too_many_pixels"),
    _kind("bomb-tiff", "a TIFF that announces 2^31 x 2^31 pixels", lambda: bombs.tiff_sized(2**31, 2**31), "too_many_pixels"),
    _kind("bomb-tiff-tag", "a TIFF tag that announces 2^32 numbers", lambda: bombs.tiff_tag_of(2**32 - 1), note="the tag is passed over"),
    _kind("bomb-thin", "1 x 30,000 pixels: 122 million once its short side is 64", lambda: bombs.black_png(1, 30_000), "extreme_shape"),
]  # fmt: skip

ODD = [
    _kind("picture-png-as-jpg", "a PNG named .jpg", _saved("PNG"), note="the content decides"),
    _kind("picture-webp-as-png", "a WebP named .png", _saved("WEBP", lossless=True), suffix="png", note="the content decides"),
    _kind("picture-1x1", "one pixel", _saved("PNG", lambda: photo(1, 1))),
    _kind("picture-thin", "1 x 2,000 pixels", lambda: bombs.black_png(1, 2_000)),
    _kind("picture-garbage-after-jpeg", "a JPEG with 10 kB after its end", lambda: jpeg() + b"\xffgarbage" * 1250),
    _kind("picture-garbage-after-png", "a PNG with 10 kB after its end", lambda: encode(photo()) + b"garbage__" * 1250),
    _kind("picture-png-without-end", "a PNG without its last chunk", lambda: encode(photo())[:-12], note="its pixels are all there"),
    _kind("picture-progressive", "a progressive JPEG", _saved("JPEG", progressive=True)),
    _kind("picture-grey-jpeg", "a grey JPEG", _saved("JPEG", lambda: photo(mode="L"))),
    _kind("picture-two-in-one", "an MPO, two JPEGs in one file", bombs.two_pictures, note="the first is taken"),
    _kind("picture-cmyk", "a JPEG in CMYK", _saved("JPEG", lambda: photo(mode="CMYK"))),
    _kind("picture-ycck", "a JPEG in Adobe's YCCK", bombs.ycck_jpeg),
    _kind("picture-ycbcr", "a TIFF in YCbCr", _saved("TIFF", lambda: photo(mode="YCbCr"))),
    _kind("picture-lab", "a TIFF in CIE L*a*b*", _saved("TIFF", lambda: photo(mode="LAB"))),
    _kind("picture-palette", "a palette of 16 colours", _saved("PNG", _palette), note="nearest pixels"),
    _kind("picture-palette-transparent", "a palette with transparency", _saved("PNG", _palette, transparency=bytes(range(0, 256, 16))),
          note="nearest pixels, transparency is dropped"),
    _kind("picture-palette-one-transparent", "a palette with one transparent colour", _saved("PNG", _palette, transparency=3),
          note="nearest pixels, transparency is dropped"),
    _kind("picture-palette-alpha", "a TIFF with a palette and alpha", _saved("TIFF", lambda: _palette().convert("PA")),
          as_if=_plain(_palette), note="converted to RGB, then resized; open_clip would make it black"),
    _kind("picture-rgba", "a PNG with transparency", _saved("PNG", lambda: photo(mode="RGBA"))),
    _kind("picture-grey-transparent", "a grey PNG with transparency", _saved("PNG", lambda: photo(mode="RGBA").convert("LA"))),
    _kind("picture-16-bit-grey", "a grey PNG of 16 bits", _saved("PNG", _deep), as_if=_plain(lambda: photo(mode="L")),
          note="its high bytes; open_clip would make everything above 255 white"),
    _kind("picture-16-bit-rgb", "a PNG of 16 bits a colour", _rgb_16_bit, as_if=_plain(photo), note="its high bytes"),
    _kind("picture-16-bit-tiff", "a grey TIFF of 16 bits", _saved("TIFF", _deep), as_if=_plain(lambda: photo(mode="L")), note="its high bytes"),
    _kind("picture-1-bit", "a PNG of one bit", _saved("PNG", lambda: photo(mode="1")), note="nearest pixels"),
    _kind("picture-animated-gif", "an animated GIF", _saved("GIF", _palette, **_frames()), note="the first frame, nearest pixels"),
    _kind("picture-animated-webp", "an animated WebP", _saved("WEBP", lossless=True, **_frames()), note="the first frame"),
    _kind("picture-animated-png", "an animated PNG", _saved("PNG", **_frames()), note="the first frame"),
    _kind("picture-pages", "a TIFF of two pages", _saved("TIFF", **_frames()), note="the first page"),
    _kind("picture-rotated", "a picture that EXIF says to turn", _saved("PNG", _lying, exif=_exif(6)), as_if=_plain(photo),
          note="turned upright; open_clip leaves it on its side"),
    _kind("picture-rotated-tiff", "a TIFF that says to turn it", _saved("TIFF", _lying, exif=_exif(6)), as_if=_plain(photo), note="turned upright, once"),
    _kind("picture-rotated-99", "EXIF orientation 99", _saved("JPEG", exif=_exif(99)), note="taken as upright"),
    _kind("picture-broken-exif", "EXIF that ends early", _saved("JPEG", exif=_BROKEN_EXIF), note="taken as upright"),
    _kind("picture-broken-profile", "a colour profile of junk", _saved("JPEG", icc_profile=b"junk" * 50)),
    _kind("picture-broken-png-profile", "a colour profile that does not unpack",
          lambda: bombs.png_with(bombs.png_chunk(b"iCCP", b"profile\0\0junk"))),
    _kind("picture-long-text", "a PNG with half a megabyte of text", bombs.long_text),
    _kind("picture-top-down-bmp", "a BMP stored from the top", bombs.top_down_bmp),
]  # fmt: skip

KINDS = WRONG + HOSTILE + ODD
