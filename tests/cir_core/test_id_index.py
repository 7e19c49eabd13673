"""Ids that are held: the same answers as reading the store, for any parts of it, also where hashes agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, IdIndex, StoreSpec, ids

SIZES = [5, 0, 3, 70, 1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store") / "store")
    writer = EmbeddingWriter(
        uri, StoreSpec("m", "w", "d", "", "c", "t", "crop", 2, "float32", "i", "fp32"), row_group_rows=16
    )
    for index, num_rows in enumerate(SIZES):
        vectors = np.tile(np.array([1, 0], np.float32), (num_rows, 1))
        writer.write_part(index, [f"{index}/ü{row}" for row in range(num_rows)], vectors)
    writer.commit(rows_in=sum(SIZES))
    return EmbeddingStore.open(uri)


parts_of = st.one_of(st.none(), st.lists(st.integers(0, len(SIZES) - 1), max_size=6))


@settings(max_examples=60, deadline=None)
@given(parts=parts_of, rows=st.lists(st.integers(0, sum(SIZES) - 1), max_size=40))
def test_ids_of_rows(store, parts, rows):
    here, names = IdIndex(store, parts).ids_of(np.array(rows, np.int64))
    held = {offset + place for offset, block in store.iter_ids(parts) for place in range(len(block))}
    assert here.tolist() == [row in held for row in rows]
    everything = store.read_ids()
    assert names.to_pylist() == [everything[row] for row in rows if row in held]


@settings(max_examples=60, deadline=None)
@given(parts=parts_of, wanted=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 80)), max_size=30))
@pytest.mark.parametrize("colliding", [False, True])
def test_rows_of_ids(store, parts, wanted, colliding):
    asked = [f"{part}/ü{row}" for part, row in wanted]
    everything = [
        (one, offset + place) for offset, found in store.iter_ids(parts) for place, one in enumerate(found.to_pylist())
    ]
    held = [(one, row) for one, row in everything if one in asked]
    with pytest.MonkeyPatch.context() as patch:
        if colliding:  # a hash of two values
            patch.setattr(
                ids, "hash_ids", lambda found: np.array([len(one) % 2 for one in found.to_pylist()], np.uint64)
            )
        found, places = IdIndex(store, parts).rows_of(asked)
    assert list(zip(found, places.tolist(), strict=True)) == held
    assert places.dtype == np.int64
