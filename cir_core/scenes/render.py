"""Scenes as pictures: 64 x 64 RGB with jitter in place, size, turn, colour and light; no two are alike."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from cir_core.scenes.model import PLACES, Scene, SceneObject

IMAGE_SIZE = 64  # pixels, both sides
_SUPERSAMPLE = 2  # drawn at twice the size, then box-filtered: smooth edges at 0.1 ms

_RGB = {
    "red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 215), "yellow": (240, 215, 40),
    "purple": (135, 55, 170), "orange": (240, 135, 30), "cyan": (50, 200, 215), "pink": (245, 140, 190),
    "white": (240, 240, 240), "black": (25, 25, 25), "grey": (130, 130, 130), "brown": (110, 75, 50),
}  # fmt: skip
_RADIUS = {"small": (4.6, 5.8), "large": (8.4, 9.8)}  # pixels of the finished picture


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * step / points - math.pi / 2 for step in range(2 * points)]
    return [
        ((1.0 if step % 2 == 0 else inner) * math.cos(a), (1.0 if step % 2 == 0 else inner) * math.sin(a))
        for step, a in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(a) / 16, -float(b) / 16) for a, b in zip(x, y, strict=True)]


_T = 0.36  # half the thickness of a cross's bars
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(5, 0.42),
    "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
    "cross": [(-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T),
              (_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T)],
    "heart": _heart(),
}  # fmt: skip


def _jittered(rng: random.Random, colour: str, spread: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in _RGB[colour])


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, background: tuple[int, ...], rng: random.Random) -> None:
    row, column = divmod(PLACES.index(item.place), 3)
    cell = IMAGE_SIZE / 3
    x, y = ((index + 0.5) * cell + rng.uniform(-1.5, 1.5) for index in (column, row))
    radius = rng.uniform(*_RADIUS[item.size])
    fill = _jittered(rng, item.colour, 18)
    if item.shape in ("circle", "ring"):
        for reach, paint in ((radius, fill), (radius * 0.55, background)):
            box = [(value - reach * sign) * _SUPERSAMPLE for sign in (1, -1) for value in (x, y)]
            draw.ellipse(box, fill=paint)
            if item.shape == "circle":
                return
        return
    turn = rng.uniform(-0.2, 0.2)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    outline = [
        ((x + cos * dx - sin * dy) * _SUPERSAMPLE, (y + sin * dx + cos * dy) * _SUPERSAMPLE)
        for dx, dy in _OUTLINES[item.shape]
    ]
    draw.polygon(outline, fill=fill)


def render(scene: Scene, rng: random.Random, look: str = "snapshot") -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to show.
        rng: the jitter; the same scene with another generator gives another picture of the same things.
        look: "studio" is even light and a sharp picture, what the small model was pre-trained on; "snapshot" adds what
            a cheap camera does: a blotchy background, a colour cast, changed contrast, blur and noise. Training pairs
            and benchmarks are snapshots: pictures as a catalogue has them, not as the model learnt them.

    Returns:
        RGB picture of IMAGE_SIZE x IMAGE_SIZE pixels.
    """
    background = _jittered(rng, scene.background, 12)
    canvas = Image.new("RGB", (IMAGE_SIZE * _SUPERSAMPLE,) * 2, background)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _draw_object(draw, item, background, rng)
    small = np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.int16)
    # Light falls off across the picture and the sensor is noisy, as in photographs.
    slope_x, slope_y = rng.uniform(-14, 14), rng.uniform(-14, 14)
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    light = ramp[None, :, None] * slope_x + ramp[:, None, None] * slope_y
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, small.shape[:2])[..., None]
    pixels = small + light + noise
    if look == "snapshot":
        pixels = _as_snapshot(pixels, rng)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _as_snapshot(pixels: npt.NDArray[np.float64], rng: random.Random) -> npt.NDArray[np.float64]:
    """Return float[H, W, 3] as a cheap camera sees it."""
    draw = np.random.default_rng(rng.getrandbits(32))
    blotches = Image.fromarray(draw.normal(0, 20, (6, 6)).astype(np.float32)).resize((IMAGE_SIZE,) * 2)
    shown = Image.fromarray(np.clip(pixels + np.asarray(blotches)[..., None], 0, 255).astype(np.uint8))
    shown = shown.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    contrast, brightness = rng.uniform(0.55, 1.0), rng.uniform(-30, 30)
    cast = draw.uniform(0.75, 1.25, 3)
    changed = (np.asarray(shown, dtype=np.float64) - 128) * contrast * cast + 128 + brightness
    return changed + draw.normal(0, 8, (IMAGE_SIZE, IMAGE_SIZE, 3))


def encode_image(image: Image.Image) -> bytes:
    """Return the picture as JPEG bytes (quality 92, the same bytes on every call)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
