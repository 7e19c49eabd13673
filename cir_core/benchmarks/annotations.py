"""Read other people's annotation files: find them under the layouts in use, and name what is wrong with a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from cir_core import files
from cir_core.benchmarks.base import near_matches
from cir_core.schema import CirError


def find_file(what: str, root: str, places: Sequence[str], *, source: str) -> tuple[str, str]:
    """Return (folder, URI) of the first of `places` below `root` that exists.

    what: names the file in messages, such as "cirr captions". places: paths below the root, in order of
    preference, "{base}:{file}" where the part before the colon is the folder to return ("" is the root).
    Raises CirError naming the missing file in full, the other places, and `source`, where to get it.
    """
    candidates = []
    for place in places:
        base, _, name = place.partition(":")
        folder = files.join(root, base) if base else root
        inner = name.rpartition("/")[0]
        candidates.append((folder, files.join(folder, inner) if inner else folder, files.join(folder, name)))
    for folder, _, uri in candidates:
        if files.exists(uri):
            return folder, uri
    names = [files.redact(uri) for _, _, uri in candidates]
    if not files.is_folder(root):
        raise CirError(f"{what}: the folder {files.redact(root)} does not exist; expected {names[0]} or the like")
    likely = [place for place, (_, beside, _) in enumerate(candidates) if files.is_folder(beside)]
    likely += [place for place, (folder, _, _) in enumerate(candidates) if folder != root and files.is_folder(folder)]
    name = names.pop(likely[0] if likely else 0)  # the one whose neighbours are there
    also = f" (nor is there {', '.join(names)})" if names else ""
    raise CirError(f"{what}: {name} is missing{also}; get it from {source}")


@dataclass(frozen=True)
class Row:
    """One object of an annotation file; every accessor raises CirError naming the file, the row and the key."""

    where: str
    values: Mapping[str, Any]

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """Return a string as it stands; one of nothing but white space is "", where that is allowed."""
        value = self._get(key)
        if not isinstance(value, str) or not (value.strip() or may_be_empty):
            raise self.fault(key, "a string" if may_be_empty else "a non-empty string")
        return value if value.strip() else ""

    def name(self, key: str) -> str:
        """Return an id: a non-empty string, or a whole number as its decimal digits."""
        return self._id(self._get(key), key)

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of ids."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.fault(key, "a list of ids")
        return tuple(self._id(item, key) for item in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings, empty ones included."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(key, "a list of strings")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        value = self._get(key)
        if not isinstance(value, list) or not all(_is_number(item) for item in value):
            raise self.fault(key, "a list of numbers")
        return tuple(map(float, value))

    def weights(self, key: str) -> dict[str, float]:
        """Return an object of numbers."""
        value = self._get(key)
        if not isinstance(value, dict) or not all(_is_number(item) for item in value.values()):
            raise self.fault(key, "an object of numbers")
        return {name: float(weight) for name, weight in value.items()}

    def row(self, key: str) -> Row:
        """Return an inner object."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self.fault(key, "a JSON object")
        return Row(f"{self.where}: {key}", value)

    def rows(self, key: str) -> list[Row]:
        """Return a list of inner objects."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.fault(key, "a list of JSON objects")
        return [Row(f"{self.where}: {key}[{place}]", item) for place, item in enumerate(value)]

    def fault(self, key: str, expected: str) -> CirError:
        """Return the error that says what a key should hold and what it holds."""
        found = f"found {self.values[key]!r:.80}" if key in self.values else f"no such key among {sorted(self.values)}"
        return CirError(f"{self.where}: {key!r} must be {expected}, {found}")

    def _get(self, key: str) -> Any:
        return self.values.get(key)

    def _id(self, value: object, key: str) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise self.fault(key, "made of ids: non-empty strings or whole numbers")
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def read_rows(uri: str) -> list[Row]:
    """Return the objects of a JSON list; CirError for broken JSON, another type or an empty list."""
    value = files.read_json(uri)
    name = files.redact(uri)
    if not isinstance(value, list) or not value:
        raise CirError(f"{name}: expected a JSON list of at least one object, found {value!r:.80}")
    for place, item in enumerate(value):
        if not isinstance(item, dict):
            raise CirError(f"{name}, entry {place}: expected a JSON object, found {item!r:.80}")
    return [Row(f"{name}, entry {place}", item) for place, item in enumerate(value)]


def read_ids(uri: str) -> tuple[str, ...]:
    """Return the strings of a JSON list; CirError for broken JSON or anything else in it."""
    value = files.read_json(uri)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise CirError(f"{files.redact(uri)}: expected a JSON list of image ids, found {value!r:.80}")
    return tuple(value)


def choose(benchmark: str, option: str, value: object, known: Sequence[str]) -> str:
    """Return an option's value if it is a known one; CirError with near matches otherwise.

    >>> choose("fashioniq", "gallery", "vall", ["original", "val"])
    Traceback (most recent call last):
    ...
    cir_core.schema.CirError: fashioniq: gallery must not be 'vall'; did you mean 'val'? known: original, val
    """
    if not isinstance(value, str) or value not in known:
        missing = "is needed" if value == "" else f"must not be {value!r}"
        raise CirError(f"{benchmark}: {option} {missing}; {near_matches(str(value), known)}")
    return value


def explicit_gallery(benchmark: str, gallery_ids: object) -> tuple[str, ...]:
    """Return a caller's own gallery as strings; whole numbers become their digits.

    Raises CirError for anything but an ordered collection of non-empty ids: a set has no order to break ties.
    """
    if isinstance(gallery_ids, str | bytes | Set | Mapping) or not isinstance(gallery_ids, Iterable):
        raise CirError(f"{benchmark}: gallery_ids must be a list of image ids, found {gallery_ids!r:.80}")
    names = list(gallery_ids)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | Integral) or name == "":
            raise CirError(f"{benchmark}: gallery_ids must hold non-empty strings or whole numbers, found {name!r}")
    return tuple(map(str, names))
