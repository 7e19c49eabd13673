"""Small files that would fill the memory or the hours of a careless reader, made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache

from dirty_kind import encode, photo
from PIL import Image, PngImagePlugin


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """Return a PNG with any header; data: its compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def black_png(width: int, height: int) -> bytes:
    """Return a sound 1-bit PNG of any size, all black: 30,000 x 30,000 are 110 kB."""
    packer, row = zlib.compressobj(1), b"\0" * (1 + (width + 7) // 8)
    block = max(1, (1 << 20) // len(row))
    parts = [packer.compress(row * min(block, height - start)) for start in range(0, height, block)]
    return png(width, height, depth=1, data=b"".join([*parts, packer.flush()]))


def png_with(*chunks: bytes) -> bytes:
    """Return a sound picture with more chunks after its header."""
    data = encode(photo())
    return data[:33] + b"".join(chunks) + data[33:]


def text_bomb(kind: bytes) -> bytes:
    """Return a picture with a text chunk that unpacks to 100 MB."""
    text = zlib.compress(b"\0" * 100_000_000, 1)
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    return png_with(png_chunk(kind, head + text))


def many_texts() -> bytes:
    """Return a picture with 100 text chunks that unpack to a megabyte each."""
    text = zlib.compress(b" " * 1_000_000)
    return png_with(*[png_chunk(b"zTXt", b"Comment\0\0" + text)] * 100)


def long_text() -> bytes:
    """Return a picture with half a megabyte of sound text, as programs that generate pictures write it."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "node " * 100_000, zip=True)
    return encode(photo(), pnginfo=info)


def jpeg_sized(width: int, height: int) -> bytes:
    """Return a JPEG whose header announces another size."""
    data = bytearray(encode(photo(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@lru_cache
def scan_bomb(side: int = 4000, scans: int = 3000) -> bytes:
    """Return a progressive JPEG with a scan repeated: each costs a walk over the whole picture, and hardly any bytes."""
    data = encode(Image.new("L", (side, side)), "JPEG", progressive=True, quality=50)
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    return data[:table] + data[table:-2] * scans + b"\xff\xd9"


def gif_screen(width: int, height: int) -> bytes:
    """Return a small GIF on a screen of any size."""
    data = encode(photo(), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def gif_frame(width: int, height: int) -> bytes:
    """Return a GIF whose first frame is larger than its screen."""
    data = encode(photo(), "GIF")
    start = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 90, 70))
    return data[: start + 5] + struct.pack("<HH", width, height) + data[start + 9 :]


def gif_of_frames(count: int) -> bytes:
    """Return a GIF that repeats its second frame."""
    first, second = photo().convert("P"), Image.new("P", (90, 70), 3)
    data = encode(first, "GIF", save_all=True, append_images=[second], duration=20, loop=0)
    start = data.rindex(b"\x21\xf9\x04")
    return data[:start] + data[start:-1] * count + b"\x3b"


def webp_canvas(width: int, height: int) -> bytes:
    """Return an animated WebP whose canvas is larger than its frames."""
    data = encode(photo(), "WEBP", save_all=True, append_images=[Image.new("RGB", (90, 70))], lossless=True)
    start = data.index(b"VP8X") + 12
    return data[:start] + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3] + data[start + 6 :]


def tiff_sized(width: int, height: int) -> bytes:
    """Return a TIFF that announces another size."""
    data = bytearray(encode(photo(), "TIFF"))
    (directory,) = struct.unpack("<I", data[4:8])
    for entry in range(2):
        start = directory + 2 + 12 * entry
        data[start + 2 : start + 12] = struct.pack("<HII", 4, 1, (width, height)[entry])
    return bytes(data)


def tiff_tag_of(count: int) -> bytes:
    """Return a TIFF with a tag that announces `count` numbers."""
    data = bytearray(encode(photo(), "TIFF", software="x" * 40))
    (directory,) = struct.unpack("<I", data[4:8])
    (entries,) = struct.unpack("<H", data[directory : directory + 2])
    for start in range(directory + 2, directory + 2 + 12 * entries, 12):
        if struct.unpack("<H", data[start : start + 2]) == (305,):
            data[start + 4 : start + 8] = struct.pack("<I", count)
    return bytes(data)


def bmp_sized(width: int, height: int) -> bytes:
    """Return a BMP that announces another size; a negative height counts from the top."""
    data = encode(photo(), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def top_down_bmp() -> bytes:
    """Return a sound BMP stored from the top."""
    flipped = photo().transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    data = encode(flipped, "BMP")
    return data[:22] + struct.pack("<i", -70) + data[26:]


def ycck_jpeg() -> bytes:
    """Return a JPEG with four colours in Adobe's YCCK."""
    data = bytearray(encode(photo().convert("CMYK"), "JPEG", quality=95))
    start = data.index(b"Adobe")
    data[start + 11] = 2
    return bytes(data)


def two_pictures() -> bytes:
    """Return an MPO: two JPEGs in one file, as stereo cameras write."""
    sink = io.BytesIO()
    photo().save(sink, "MPO", save_all=True, append_images=[Image.new("RGB", (90, 70))])
    return sink.getvalue()
