"""Captions as people write them: some full, most partial, in changing order and words."""

from __future__ import annotations

import random

from cir_core.scenes.model import SHAPES, Scene, SceneObject

PLACE_WORDS = {
    "top left": ("in the top left corner", "at the top left"),
    "top": ("at the top", "above"),
    "top right": ("in the top right corner", "at the top right"),
    "left": ("on the left", "on the left side"),
    "center": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom", "below"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "this shows ", "there is ", "we see ")
# What clings to captions on the web and says nothing about the picture. It teaches a model to read past such words.
_CHATTER = (
    "make your own", "add to cart", "change it any time", "move it where you like", "remove before use", "also in a shop",
    "the only one", "bigger is better", "smaller is fine", "nice too", "in place of a photo", "made to order", "it is for you",
)  # fmt: skip
_BACKGROUND = ("on a {} background", "on {}", "against a {} background", "with a {} background")


def phrase(item: SceneObject, rng: random.Random, *, size: bool = True, place: bool = True, article: str = "a") -> str:
    """Say one object, e.g. "a large red star on the left"; size and place only where asked for."""
    words = [rng.choice(SIZE_WORDS[item.size])] if size else []
    words += [item.colour, item.shape]
    if place:
        words.append(rng.choice(PLACE_WORDS[item.place]))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words] if article else words)


def describe(scene: Scene, rng: random.Random) -> str:
    """Write a caption for a scene.

    Size and place of an object are named about two times in three, the background every second time, a third
    object sometimes goes unmentioned, one caption in twelve also says what is not there, and one in six carries words
    that have nothing to do with the picture.
    """
    objects = list(scene.objects)
    rng.shuffle(objects)
    if len(objects) == 3 and rng.random() < 0.15:
        objects.pop()
    phrases = [phrase(item, rng, size=rng.random() < 0.65, place=rng.random() < 0.7) for item in objects]
    caption = phrases[0]
    if len(phrases) > 1:
        joint = rng.choice((" and ", ", ", " with ", " next to ")) if len(phrases) == 2 else ", "
        caption = joint.join(phrases) if len(phrases) == 2 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if rng.random() < 0.5:
        caption += " " + rng.choice(_BACKGROUND).format(scene.background)
    if rng.random() < 1 / 12:
        absent = rng.choice([shape for shape in SHAPES if all(shape != item.shape for item in scene.objects)])
        caption += rng.choice((f", no {absent}", f", without a {absent}", f" instead of a {absent}"))
    caption = rng.choice(_OPENINGS) + caption
    if rng.random() < 1 / 6:
        chatter = rng.choice(_CHATTER)
        caption = rng.choice((f"{caption}, {chatter}", f"{chatter}: {caption}"))
    return caption
