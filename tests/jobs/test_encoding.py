"""The same bits on any number of threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from cir_core.encoders import load_encoder
from jobs.encoding import PIECE_ROWS, EncoderCalls

NUM_ROWS = 5 * PIECE_ROWS + 3
WORDS = ["red", "a small green circle above", "two", "blue square, and a triangle on the left of a star", ""]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("scenes-tiny", device="cpu")


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("num_rows", [1, PIECE_ROWS, NUM_ROWS])
def test_the_bits_do_not_depend_on_threads(encoder, threads, kind, num_rows):
    if kind == "images":
        pixels = np.random.default_rng(0).integers(0, 256, (num_rows, 3, 64, 64), np.uint8)
        encode, rows = encoder.encode_images, torch.from_numpy(pixels)
    else:
        encode, rows = encoder.encode_texts, [WORDS[row % len(WORDS)] for row in range(num_rows)]
    found = [EncoderCalls(use_gpu=False, threads=count)(encode, rows) for count in (1, 2, 5)]
    assert found[0].shape == (num_rows, encoder.dim)
    assert found[0].dtype == np.float32
    for other in found[1:]:
        assert (other == found[0]).all()
    torch.set_num_threads(2)
    assert np.allclose(found[0], encode(rows).numpy(), atol=1e-6)


def test_an_error_of_a_piece_is_the_call_s(threads):
    def encode(rows):
        raise ValueError("row 7")

    with pytest.raises(ValueError, match="row 7"):
        EncoderCalls(use_gpu=False, threads=2)(encode, torch.zeros(NUM_ROWS, 1))


def test_on_a_gpu_calls_wait_for_one_another():
    calls, inside = EncoderCalls(use_gpu=True, threads=9), []

    def encode(rows):
        inside.append(rows)
        assert len(inside) == 1
        inside.remove(rows)
        return torch.ones(len(rows), 2)

    runs = [threading.Thread(target=calls, args=(encode, [number] * 40)) for number in range(8)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert (calls(encode, [1, 2]) == np.ones((2, 2))).all()
