"""The nouns of the system and the Arrow schema of every file on disk. Imports nothing of ours.

Shape legend used all over cir_core: Q queries, G gallery images, D embedding dimensions, B batch, k results, A alphas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class CirError(ValueError):
    """A mistake in the input, found before work starts: the message names the thing, what was expected and the way out."""


class UnreadableError(CirError):
    """A file that is there and open to us is not what its name says: no tar, no Parquet, not the columns it needs."""


class RefusedError(CirError):
    """A request was refused. The answer does not tell whether it would be for one file alone, or for all of the store."""


class AccessError(CirError):
    """Not one file but a whole store is closed to us: the credentials are wrong, expired or no longer enough."""


class SchemeError(CirError):
    """Nothing that is installed opens URIs of this scheme."""


@dataclass(frozen=True, slots=True)
class Query:
    """A composed query: "find the image that looks like `reference_id`, changed as `relative_caption` says".

    target_ids: right answers; the first is the annotated one. Empty when nobody knows the answer (a catalogue search).
    subset_ids: a small gallery of this query's own (CIRR's six-image group, GeneCIS), empty where there is none.
    more_captions: other wordings of the same change. The query's text embedding is then the mean of all the
        captions' unit embeddings, brought back to unit length (`composition.mean_texts`).
    """

    query_id: str
    reference_id: str
    relative_caption: str
    target_ids: tuple[str, ...] = ()
    subset_ids: tuple[str, ...] = ()
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption to encode: one, unless the query averages several.

        >>> Query("q", "ref", "is red and long", more_captions=("is long and red",)).captions
        ('is red and long', 'is long and red')
        """
        return (self.relative_caption, *self.more_captions)


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that could not be used: where it is, a short machine-readable reason, and what a person needs to know."""

    shard: str
    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Ranking:
    """Result lists of Q queries, best first, ordered by (-score, gallery index).

    image_ids: str[Q, k]; "" marks a place that no image fills (a gallery smaller than k).
    scores: float32[Q, k], higher is better; -inf where image_ids is "".
    """

    query_ids: tuple[str, ...]
    image_ids: npt.NDArray[np.str_]
    scores: npt.NDArray[np.float32]
    protocol: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes against each other."""
        if self.image_ids.ndim != 2 or self.image_ids.shape != self.scores.shape:
            raise CirError(
                f"Ranking: image_ids {self.image_ids.shape} and scores {self.scores.shape} must both be [Q, k]"
            )
        if len(self.query_ids) != self.image_ids.shape[0]:
            raise CirError(f"Ranking: {len(self.query_ids)} query_ids for {self.image_ids.shape[0]} result lists")


IMAGE_TEXT_SCHEMA = pa.schema(
    [pa.field("key", pa.string()), pa.field("image", pa.binary()), pa.field("caption", pa.string())]
)
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "reason", "detail")])
RANKING_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("alpha", pa.float64()),
        ("rank", pa.int32()),
        ("image_id", pa.string()),
        ("score", pa.float32()),
    ]
)


def embedding_schema(dim: int, dtype: str = "float32", extra: Sequence[str] = ()) -> pa.Schema:
    """Arrow schema of an embedding store's parts: id, embedding[dim], and the named extra string columns."""
    if dtype not in ("float32", "float16"):
        raise CirError(f"embedding dtype must be float32 or float16, not {dtype!r}")
    value = pa.float32() if dtype == "float32" else pa.float16()
    columns = [pa.field("id", pa.string()), pa.field("embedding", pa.list_(value, dim))]
    return pa.schema(columns + [pa.field(name, pa.string()) for name in extra])
