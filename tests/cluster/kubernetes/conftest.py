"""Every overlay, rendered once."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `manifests`: what these tests share

from manifests.render import Object, render

ROOT = Path(__file__).resolve().parents[3]
OVERLAYS = ROOT / "cluster" / "kubernetes" / "overlays"


@cache
def _rendered(name: str) -> list[Object]:
    return render(OVERLAYS / name)


@pytest.fixture
def rendered():
    """The objects of an overlay, by its path below overlays/; not to be changed."""
    return _rendered
