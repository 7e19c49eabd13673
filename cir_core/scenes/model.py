"""What a scene is: a background and up to three objects, each with a shape, colour, size and place of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "grey", "brown")
# The nine cells of a 3 x 3 grid, row by row.
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MAX_OBJECTS = 3


@dataclass(frozen=True, slots=True, order=True)
class SceneObject:
    """One shape in a scene. All four attributes are words from the tuples above."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and objects whose shapes and places are all different, so that a sentence can single one out.

    Objects are kept sorted: two scenes are equal exactly when they show the same things.
    """

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        """Sort the objects and refuse scenes whose objects could be mistaken for each other."""
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))
        for attribute in ("shape", "place"):
            values = [getattr(item, attribute) for item in self.objects]
            if len(set(values)) != len(values):
                raise ValueError(f"a scene's objects need different {attribute}s, got {values}")
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, got {len(self.objects)}")

    def swap(self, old: SceneObject, new: SceneObject) -> Scene:
        """Return this scene with one object exchanged for another."""
        return replace(self, objects=tuple(new if item == old else item for item in self.objects))

    def without(self, old: SceneObject) -> Scene:
        """Return this scene with one object fewer."""
        return replace(self, objects=tuple(item for item in self.objects if item != old))

    def plus(self, new: SceneObject) -> Scene:
        """Return this scene with one object more."""
        return replace(self, objects=(*self.objects, new))


def seeded(*parts: object) -> random.Random:
    """Return a random generator that depends on the parts alone, the same on every machine and Python build."""
    return random.Random(":".join(map(str, parts)))


def random_object(
    rng: random.Random, shapes: tuple[str, ...] = SHAPES, places: tuple[str, ...] = PLACES
) -> SceneObject:
    """Draw one object with a shape and a place from those given."""
    return SceneObject(rng.choice(shapes), rng.choice(COLOURS), rng.choice(SIZES), rng.choice(places))


def free_object(rng: random.Random, scene: Scene) -> SceneObject:
    """Draw an object that `scene` could take in: its shape and place are not in use there."""
    shapes = tuple(shape for shape in SHAPES if all(shape != item.shape for item in scene.objects))
    places = tuple(place for place in PLACES if all(place != item.place for item in scene.objects))
    return random_object(rng, shapes, places)


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: one object in a fifth of them, two in half, three in the rest."""
    count = rng.choices((1, 2, 3), weights=(2, 5, 3))[0]
    scene = Scene(rng.choice(BACKGROUNDS), (random_object(rng),))
    for _ in range(count - 1):
        scene = scene.plus(free_object(rng, scene))
    return scene
