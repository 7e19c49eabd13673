"""What an approximate index is made with, and its learnt arrays on disk.

    <name>.safetensors    ivf: centroids float32[nlist, D], lists int32[n] (the inverted list of each row)
                          hnsw: levels int32[n], neighbors int32[...], entry_point int32[1] (the graph)
    <name>.json           written last: what it was made of, with what, and the SHA-256 of the other

The gallery's rows are not in it: they are read from the store and added again (a copy in memory, no arithmetic). So a file
has 4 bytes a row (ivf) or about 8 hnsw_m bytes (hnsw), a score always comes from the store's own embedding, and FAISS's
readers, which trust what they parse, never see a file. What is read back is checked in full: an array that would send FAISS
outside its memory is refused, as is one made of another store, with other settings, or by another version of FAISS. The
checksum is against damage. It is no signature: whoever can write to the folder can also make the search find less (the
measured recall would show that), and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cir_core import files
from cir_core.schema import CirError

KINDS = ("ivf", "hnsw")
_FORMAT, _VERSION = "cir-approximate-index", 1
_ROWS_PER_LIST = 39  # below this many rows a centroid, FAISS's k-means calls itself unreliable
_TRAIN_ROWS_PER_LIST = 64

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """What decides a structure, given the rows; `IndexSettings.derived` fills in what is not said.

    nlist: inverted lists. train_rows: rows of the sample that k-means sees. hnsw_m: links of a node, twice as many on the
    ground level. ef_construction: candidates held when a row is linked. Those of the other kind are 0.
    """

    kind: str
    nlist: int = 0
    train_rows: int = 0
    hnsw_m: int = 0
    ef_construction: int = 0
    seed: int = 0

    @classmethod
    def derived(
        cls,
        kind: str,
        num_rows: int,
        *,
        nlist: int | None = None,
        train_rows: int | None = None,
        hnsw_m: int | None = None,
        ef_construction: int | None = None,
        seed: int = 0,
    ) -> IndexSettings:
        """Return settings for a shard of `num_rows` rows.

        By default nlist is 4 sqrt(n), at most n / 39; train_rows 64 a list; hnsw_m 32; ef_construction 200.
        Raises CirError for an unknown kind, a setting of the other kind, and numbers that the shard cannot have.
        """
        if kind not in KINDS:
            raise CirError(f"approximate search: unknown kind {kind!r}; known: {', '.join(KINDS)}")
        _only_of(kind, ivf={"nlist": nlist, "train_rows": train_rows},
                 hnsw={"hnsw_m": hnsw_m, "ef_construction": ef_construction})  # fmt: skip
        in_range("seed", seed, 0, 2**31 - 1)
        if num_rows < 1:
            raise CirError("approximate search: the shard has no rows; there is nothing to index")
        if kind == "hnsw":
            links = 32 if hnsw_m is None else in_range("hnsw_m", hnsw_m, 2, 512)
            construction = 200 if ef_construction is None else in_range("ef_construction", ef_construction, 1, 2**20)
            return cls(kind=kind, hnsw_m=links, ef_construction=construction, seed=seed)
        if nlist is None:
            nlist = max(1, min(round(4 * num_rows**0.5), num_rows // _ROWS_PER_LIST))
        in_range("nlist", nlist, 1, num_rows, "the rows of a shard")
        if train_rows is None:
            train_rows = min(num_rows, _TRAIN_ROWS_PER_LIST * nlist)
        in_range("train_rows", train_rows, nlist, num_rows, "from nlist to the rows of a shard")
        return cls(kind=kind, nlist=nlist, train_rows=train_rows, seed=seed)


def _only_of(kind: str, **settings: Mapping[str, int | None]) -> None:
    for other, values in settings.items():
        given = [name for name, value in values.items() if value is not None]
        if other != kind and given:
            raise CirError(
                f"approximate search: {given[0]} is a setting of {other}, and the kind is {kind}; leave it out"
            )


def in_range(name: str, value: int, low: int, high: int, reason: str = "") -> int:
    """Return `value`; CirError unless it is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        because = f" ({reason})" if reason else ""
        raise CirError(
            f"approximate search: {name} must be a whole number from {low} to {high}{because}, not {value!r}"
        )
    return value


def save_arrays(name: str, arrays: Arrays, made: Mapping[str, Any]) -> None:
    """Write `name`.safetensors and then `name`.json. made: JSON values that say what decided the arrays."""
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    files.write_bytes(f"{name}.safetensors", data)
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    files.write_json(f"{name}.json", {"format": _FORMAT, "version": _VERSION, "made": dict(made), **digest})


def load_arrays(name: str, made: Mapping[str, Any]) -> Arrays | None:
    """Return what `save_arrays` wrote, None if it was not finished.

    Raises CirError if it was made of something else, by another version of this code, or is damaged.
    """
    if not files.exists(f"{name}.json"):
        return None
    where, way_out = files.redact(f"{name}.json"), "remove it, so that the index is made again"
    found = files.read_json(f"{name}.json")
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (_FORMAT, _VERSION):
        raise CirError(f"{where}: not an approximate index of this version ({_FORMAT} {_VERSION}); {way_out}")
    there = found["made"] if isinstance(found.get("made"), dict) else {}
    different = [f"{key}: {there.get(key)!r} there, {made.get(key)!r} here" for key in sorted({*there, *made})
                 if there.get(key) != made.get(key)]  # fmt: skip
    if different:
        raise CirError(
            f"{where}: this approximate index was made of something else ({'; '.join(different)}); {way_out}"
        )
    data = files.read_bytes(f"{name}.safetensors")
    if (hashlib.sha256(data).hexdigest(), len(data)) != (found.get("sha256"), found.get("size_bytes")):
        raise CirError(f"{files.redact(name)}.safetensors: not the file that was written (checksum); {way_out}")
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise CirError(f"{files.redact(name)}.safetensors: unreadable ({error}); {way_out}") from None


def check_lists(arrays: Arrays, settings: IndexSettings, num_rows: int, dim: int) -> None:
    """Raise CirError unless these are the arrays of an ivf index of this shape."""
    _check_shapes(arrays, {"centroids": ("float32", (settings.nlist, dim)), "lists": ("int32", (num_rows,))})
    lists = arrays["lists"]
    if not np.isfinite(arrays["centroids"]).all() or lists.min() < 0 or lists.max() >= settings.nlist:
        raise CirError("approximate index: a centroid is not finite, or a row is in a list that does not exist")


def check_graph(arrays: Arrays, settings: IndexSettings, num_rows: int) -> npt.NDArray[np.uint64]:
    """Return where each row's links begin, uint64[n + 1]; CirError unless the arrays are a graph over n rows.

    A row on levels 0 to l has 2 hnsw_m links on level 0 and hnsw_m on each above, -1 where there is none. A link on a level
    must lead to a row that is on this level too, or FAISS would read the links of another row, or past the end.
    """
    links = settings.hnsw_m
    _check_shapes(
        arrays, {"levels": ("int32", (num_rows,)), "neighbors": ("int32", None), "entry_point": ("int32", (1,))}
    )
    levels, neighbors, entry = arrays["levels"].astype(np.int64), arrays["neighbors"], int(arrays["entry_point"][0])
    widths = links * (levels + 1)
    broken = levels.min() < 1 or widths.sum() != neighbors.size or not 0 <= entry < num_rows
    if not broken:
        broken = levels[entry] != levels.max() or neighbors.min() < -1 or neighbors.max() >= num_rows
    ends = np.cumsum(widths)
    if not broken:
        within = np.arange(neighbors.size) - np.repeat(ends - widths, widths)
        linked = neighbors >= 0
        level = np.maximum(within[linked] // links - 1, 0)
        broken = bool((levels[neighbors[linked]] <= level).any())
    if broken:
        raise CirError("approximate index: the links are not those of a graph over this shard's rows")
    return np.concatenate([[0], ends]).astype(np.uint64)


def _check_shapes(arrays: Arrays, expected: Mapping[str, tuple[str, tuple[int, ...] | None]]) -> None:
    found = {key: (str(value.dtype), value.shape) for key, value in arrays.items()}
    fits = found.keys() == expected.keys() and all(
        found[key][0] == dtype and (found[key][1] == shape or (shape is None and len(found[key][1]) == 1))
        for key, (dtype, shape) in expected.items()
    )
    if not fits:
        raise CirError(f"approximate index: expected arrays {dict(expected)}, found {found}")
