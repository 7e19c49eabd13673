"""Composed queries over scenes: reference, sentence, target, and distractors that make both halves necessary."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from cir_core.scenes.captions import PLACE_WORDS, phrase
from cir_core.scenes.model import COLOURS, MAX_OBJECTS, PLACES, SIZES, Scene, SceneObject, free_object, random_scene

KINDS = ("show", "change", "remove", "add")


@dataclass(frozen=True, slots=True)
class ComposedScene:
    """One query in terms of scenes.

    image_distractors look like the reference and do not do what the sentence asks;
    text_distractors show what the sentence asks for in a scene unlike the reference.
    """

    kind: str
    reference: Scene
    relative_caption: str
    target: Scene
    image_distractors: tuple[Scene, ...]
    text_distractors: tuple[Scene, ...]


def _show(rng: random.Random, reference: Scene) -> tuple[str, Scene, SceneObject]:
    old = rng.choice(reference.objects)
    place = old.place if rng.random() < 0.5 else free_object(rng, reference).place
    new = replace(free_object(rng, reference), place=place)
    text = phrase(new, rng, size=rng.random() < 0.7, place=rng.random() < 0.7)
    ending = rng.choice(("instead", f"instead of the {old.shape}", f"in place of the {old.shape}"))
    return f"{text} {ending}", reference.swap(old, new), new


def _change(rng: random.Random, reference: Scene) -> tuple[str, Scene, SceneObject]:
    old = rng.choice(reference.objects)
    attribute = rng.choices(("colour", "size", "place"), weights=(3, 1, 1))[0]
    if attribute == "colour":
        new = replace(old, colour=rng.choice([colour for colour in COLOURS if colour != old.colour]))
        said = (
            f"make the {old.shape} {new.colour}",
            f"the {old.shape} is {new.colour}",
            f"change the {old.shape} to {new.colour}",
        )
    elif attribute == "size":
        new = replace(old, size=SIZES[1 - SIZES.index(old.size)])
        word = "bigger" if new.size == "large" else "smaller"
        said = (
            f"make the {old.shape} {word}",
            f"the {old.shape} is {new.size}",
            f"a {new.size} {old.colour} {old.shape}",
        )
    else:
        new = replace(old, place=rng.choice([p for p in PLACES if all(p != item.place for item in reference.objects)]))
        where = rng.choice(PLACE_WORDS[new.place])
        said = (
            f"move the {old.shape} to the {new.place}",
            f"the {old.shape} is {where}",
            f"the {old.colour} {old.shape} {where}",
        )
    return rng.choice(said), reference.swap(old, new), new


def _remove(rng: random.Random, reference: Scene) -> tuple[str, Scene, SceneObject]:
    old = rng.choice(reference.objects)
    target = reference.without(old)
    said = (f"remove the {old.shape}", f"without the {old.shape}", f"no {old.shape}",
            f"only {' and '.join(f'the {item.colour} {item.shape}' for item in target.objects)}")  # fmt: skip
    return rng.choice(said), target, rng.choice(target.objects)


def _add(rng: random.Random, reference: Scene) -> tuple[str, Scene, SceneObject]:
    new = free_object(rng, reference)
    text = phrase(new, rng, size=rng.random() < 0.7, place=rng.random() < 0.7)
    return rng.choice((f"add {text}", f"with {text}", f"there is also {text}", f"{text} too")), reference.plus(new), new


_EDITS = {"show": _show, "change": _change, "remove": _remove, "add": _add}


def _reference_for(rng: random.Random, kind: str) -> Scene:
    while True:
        scene = random_scene(rng)
        if (kind == "remove" and len(scene.objects) == 1) or (kind == "add" and len(scene.objects) == MAX_OBJECTS):
            continue
        return scene


NUM_IMAGE_DISTRACTORS, NUM_TEXT_DISTRACTORS = 6, 3


def _with_context(rng: random.Random, text: str, target: Scene, new: SceneObject) -> str:
    """Let three sentences in five also mention something that stays, as people do to be understood."""
    kept = [item for item in target.objects if item != new and f"{item.colour} {item.shape}" not in text]
    if not kept or rng.random() > 0.6:
        return text
    other = phrase(rng.choice(kept), rng, size=rng.random() < 0.5, place=rng.random() < 0.5)
    return rng.choice((f"{text}, next to {other}", f"{text}, with {other}", f"{text} and {other}"))


def _possible_edits(scene: Scene) -> list[str]:
    impossible = {1: "remove", MAX_OBJECTS: "add"}.get(len(scene.objects))
    return [kind for kind in KINDS if kind != impossible]


def compose_query(rng: random.Random, kind: str) -> ComposedScene:
    """Draw one composed query of a kind: "show", "change", "remove" or "add". No distractor equals the target.

    Image distractors are the reference after another edit that does not bring what the sentence asks for; text
    distractors hold what it asks for among other objects.
    """
    reference = _reference_for(rng, kind)
    text, target, new = _EDITS[kind](rng, reference)
    text = _with_context(rng, text, target, new)
    image_distractors: list[Scene] = []
    while len(image_distractors) < NUM_IMAGE_DISTRACTORS:
        scene = _EDITS[rng.choice(_possible_edits(reference))](rng, reference)[1]
        if (scene != target and new not in scene.objects) or (kind == "remove" and scene != target):
            image_distractors.append(scene)
    text_distractors: list[Scene] = []
    while len(text_distractors) < NUM_TEXT_DISTRACTORS:
        scene = Scene(random_scene(rng).background, (new,))
        for _ in range(len(target.objects) - 1):
            scene = scene.plus(free_object(rng, scene))
        if scene != target:
            text_distractors.append(scene)
    return ComposedScene(kind, reference, text, target, tuple(image_distractors), tuple(text_distractors))
