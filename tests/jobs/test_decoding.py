"""What a decoding task makes of pictures that cannot be had, and of those that it dies of."""

import http.server
import io
import os
import signal
import threading
from unittest import mock

import numpy as np
import pytest
import ray
from PIL import Image

from cir_core.preprocessing import Preprocessing, preprocess_image
from cir_core.schema import AccessError
from cir_core.shards import Sample
from jobs import decoding
from jobs.decoding import Picture, decode_images, decoded_ahead


class Closed(http.server.BaseHTTPRequestHandler):
    """An S3 that does not accept the credentials; without a body, as to a HEAD, it cannot say so."""

    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *args):
        pass


PREPROCESSING = Preprocessing(size=32, mode="center_crop", interpolation="bilinear")


def test_a_store_that_is_closed_ends_the_job(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        query = f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        uris = [f"s3://bucket/{number}.jpg{query}" for number in range(64)]
        try:
            with pytest.raises(AccessError, match=r"s3://bucket/\d+\.jpg: access refused"):
                decode_images._function([Picture(uri, uri) for uri in uris], PREPROCESSING)
        finally:
            server.shutdown()
            thread.join()


def test_a_picture_that_is_gone_is_a_reject_that_names_it(tmp_path):
    uri = str(tmp_path / "gone.jpg")
    decoded = decode_images._function([Picture("a", uri)], PREPROCESSING)
    (reject,) = decoded.rejects
    assert (reject.shard, reject.key, reject.reason) == (uri, "a", "missing")
    assert decoded.readable == [False]


@pytest.mark.slow
def test_a_picture_that_its_decoder_dies_of_is_a_reject_that_names_it(servers, monkeypatch):
    @ray.remote(max_retries=1)
    def decode_with_a_faulty_library(rows, preprocessing):
        def decode(data, preprocessing, cut=None):
            if data == b"deadly":
                os.kill(os.getpid(), signal.SIGSEGV)
            return preprocess_image(data, preprocessing, cut=cut)

        from jobs import decoding  # that process's own

        with mock.patch.object(decoding, "preprocess_image", decode):
            return decoding.decode_images._function(rows, preprocessing)

    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")
    monkeypatch.setattr(decoding, "decode_images", decode_with_a_faulty_library)
    monkeypatch.setattr(decoding, "_DEATHS_ALONE", 1)
    good = io.BytesIO()
    Image.new("RGB", (40, 50), (200, 100, 0)).save(good, "PNG")
    files = {"a": good.getvalue(), "b": b"deadly", "c": b"no image", "d": good.getvalue(), "e": good.getvalue()}
    rows = [Sample("s.tar", key, place, data, "") for place, (key, data) in enumerate(files.items())]
    found = list(decoded_ahead([rows[:4], rows[1:2], rows[4:]], PREPROCESSING, 2))
    assert [[row.key for row in chunk] for chunk, _ in found] == [["a", "b", "c", "d"], ["b"], ["e"]]
    assert [one.readable for _, one in found] == [[True, False, False, True], [False], [True]]
    rejects = [(reject.shard, reject.key, reject.reason) for _, one in found for reject in one.rejects]
    assert rejects == [("s.tar", "b", "decoder_crash"), ("s.tar", "c", "unreadable"), ("s.tar", "b", "decoder_crash")]
    expected = preprocess_image(good.getvalue(), PREPROCESSING)
    assert all(np.array_equal(image, expected) for _, one in found for image in one.images)
    assert [len(one.images) for _, one in found] == [2, 0, 1]
