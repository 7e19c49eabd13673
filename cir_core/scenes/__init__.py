"""Scenes: the generated data set that ships with the system. Seeded, any size, made where it is needed.

A scene is a background and one to three coloured shapes. From it come a picture (`render`), a caption that says
as much or as little as people say (`captions`), and composed queries with hard distractors (`queries`). `write`
puts them on disk as image-text shards and as a benchmark folder.

Scores on scenes are a smoke signal for the machinery and the method, never comparable with published benchmarks.
"""

from cir_core.scenes.captions import describe
from cir_core.scenes.model import Scene, SceneObject, random_scene
from cir_core.scenes.queries import ComposedScene, compose_query
from cir_core.scenes.render import encode_image, render
from cir_core.scenes.write import write_benchmark, write_pairs

__all__ = [
    "ComposedScene",
    "Scene",
    "SceneObject",
    "compose_query",
    "describe",
    "encode_image",
    "random_scene",
    "render",
    "write_benchmark",
    "write_pairs",
]
