"""Where the image's files are, and its Dockerfile read once."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `dockerfile`: what these tests share

import dockerfile

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def image_folder() -> Path:
    return ROOT / "cluster" / "image"


@pytest.fixture(scope="session")
def stages(image_folder) -> dict[str, dockerfile.Stage]:
    return dockerfile.parse((image_folder / "Dockerfile").read_text())


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """[project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def pins(image_folder) -> dict[str, str]:
    """Package -> version in the image."""
    return read_pins(image_folder / "requirements.txt")


@pytest.fixture(scope="session")
def all_pins() -> dict[str, str]:
    """Package -> version for people and tests."""
    return read_pins(ROOT / "requirements.txt")


def read_pins(path: Path) -> dict[str, str]:
    """Return the pins of a requirements file; a line that is no pin is an error."""
    return dict(line.split("==") for line in path.read_text().split())  # type: ignore[misc]
