"""Embeddings on disk: written part by part by any number of workers, committed once, then read in row order.

    <uri>/manifest.json               written last; without it the store does not open
    <uri>/part-00000.parquet          id, embedding[D], optional caption_embedding[D] and string columns
    <uri>/rejects/part-00000.parquet  the rows of that part's input that gave no embedding
    <uri>/_progress/spec.json         what the folder is for, from the first write on
    <uri>/_progress/part-00000.json   marks a part as finished, so that a second run does not repeat it

A part is one piece of the input, numbered from 0 by the caller; the rows of the store are those of its parts,
in order. The identity of a store is the hash of everything that made it: see `StoreSpec`.
"""

from cir_core.embedding_store.ids import IdIndex
from cir_core.embedding_store.manifest import Manifest, PartInfo, StoreSpec, listing_digest, part_info
from cir_core.embedding_store.part import PartWriter
from cir_core.embedding_store.read import Block, Embeddings, EmbeddingStore
from cir_core.embedding_store.unique import hash_ids, ids_with, later_ones, part_hashes, repeated
from cir_core.embedding_store.write import EmbeddingWriter

__all__ = [
    "Block",
    "EmbeddingStore",
    "EmbeddingWriter",
    "Embeddings",
    "IdIndex",
    "Manifest",
    "PartInfo",
    "PartWriter",
    "StoreSpec",
    "hash_ids",
    "ids_with",
    "later_ones",
    "listing_digest",
    "part_hashes",
    "part_info",
    "repeated",
]
