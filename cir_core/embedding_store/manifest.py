"""What a store is (its spec and identity) and what it holds (its manifest)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from operator import attrgetter, itemgetter
from typing import Any

from cir_core import files
from cir_core.schema import CirError, embedding_schema

FORMAT = "cir-embedding-store"
VERSION = 4


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Everything that decides the content of a store; two stores with one identity hold the same embeddings.

    weights: the weights tag; weights_digest, adapter_digest: hashes of their files ("" for no adapter);
    config_digest, tokenizer_digest: of what tensors do not tell (activation, heads; vocabulary and rules);
    preprocessing: its tag; dim: D; dtype: "float32" or "float16" on disk; input_digest: see `listing_digest`;
    precision: the encoder's arithmetic, "fp32" or "bf16", never "auto".
    """

    model: str
    weights: str
    weights_digest: str
    adapter_digest: str
    config_digest: str
    tokenizer_digest: str
    preprocessing: str
    dim: int
    dtype: str
    input_digest: str
    precision: str

    def __post_init__(self) -> None:
        embedding_schema(self.dim, self.dtype)  # refuses an unknown dtype
        if self.dim < 1:
            raise CirError(f"embedding dim must be at least 1, not {self.dim}")

    @property
    def identity(self) -> str:
        """SHA-256 of the canonical JSON of the fields and of the format's version, in hexadecimal."""
        return hashlib.sha256(json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True).encode()).hexdigest()

    def differences(self, other: StoreSpec) -> str:
        """Describe the fields in which `other`, found on disk, differs from this one."""
        mine, theirs = asdict(self), asdict(other)
        changed = [name for name in mine if mine[name] != theirs[name]]
        return "; ".join(f"{name}: {theirs[name]!r} there, {mine[name]!r} here" for name in changed)


def listing_digest(entries: Iterable[tuple[str, int, int]]) -> str:
    """SHA-256 of an input listing: (URI, size in bytes, time of the last change) of each file, in order.

    Credentials do not count. A file that is moved or written again is another input, even of the same size.
    """
    digest = hashlib.sha256()
    for uri, size_bytes, modified_ns in entries:
        digest.update(json.dumps([files.redact(uri), size_bytes, modified_ns]).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One finished part; travels as JSON or pickle. sha256, size_bytes: of the Parquet file; rejects_sha256: of its rejects."""

    index: int
    name: str
    num_rows: int
    num_rejects: int
    sha256: str
    rejects_sha256: str
    size_bytes: int
    columns: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields; asdict takes five times as long, and a store may have 100,000 parts."""
        return dict(zip(_PART_FIELDS, _part_values(self), strict=True))


_PART_FIELDS = tuple(field.name for field in fields(PartInfo))
_part_values = attrgetter(*_PART_FIELDS)
_json_values = itemgetter(*_PART_FIELDS)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The committed content of a store. columns: what parts hold besides id and embedding."""

    spec: StoreSpec
    num_rows: int
    num_rejects: int
    columns: tuple[str, ...]
    parts: tuple[PartInfo, ...]

    @property
    def identity(self) -> str:
        """The identity of the spec."""
        return self.spec.identity

    def to_json(self) -> dict[str, Any]:
        """Return what manifest.json holds."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        about = {"format": FORMAT, "version": VERSION, "identity": self.identity}
        return {**about, **own, "spec": asdict(self.spec), "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, value: Any, name: str) -> Manifest:
        """Parse and check; `name` is for the message of the CirError."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CirError(f"{name}: not the manifest of an embedding store (format {FORMAT!r} expected)")
        if value.get("version") != VERSION:
            raise CirError(
                f"{name}: version {value.get('version')!r}; this code reads version {VERSION}: make the store again"
            )
        try:
            parts = tuple(part_info(part) for part in value["parts"])
            spec = StoreSpec(**value["spec"])
            manifest = cls(spec, value["num_rows"], value["num_rejects"], tuple(value["columns"]), parts)
        except (KeyError, TypeError) as error:
            raise CirError(f"{name}: incomplete manifest ({error})") from None
        if manifest.identity != value.get("identity"):
            raise CirError(f"{name}: the identity does not match the spec; the manifest was edited")
        if manifest.num_rows != sum(part.num_rows for part in parts):
            raise CirError(f"{name}: num_rows is not the sum of the parts; the manifest was edited")
        return manifest


def part_info(value: Mapping[str, Any]) -> PartInfo:
    """Parse a PartInfo from JSON."""
    return PartInfo(*_json_values({**value, "columns": tuple(value["columns"])}))


def part_name(index: int) -> str:
    """Return the file name of a part, without its suffix."""
    return f"part-{index:05d}"
