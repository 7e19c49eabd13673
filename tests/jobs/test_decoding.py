"""What a decoding task makes of pictures that cannot be had."""

import http.server
import threading

import pytest

from cir_core.preprocessing import Preprocessing
from cir_core.schema import AccessError
from jobs.decoding import Picture, decode_images, fetch_images


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
            with pytest.raises(AccessError, match=r"s3://bucket/\d+\.jpg: access refused"):
                fetch_images._function(uris, PREPROCESSING)
        finally:
            server.shutdown()
            thread.join()


def test_a_picture_that_is_gone_is_a_reject_that_names_it(tmp_path):
    uri = str(tmp_path / "gone.jpg")
    decoded = decode_images._function([Picture("a", uri)], PREPROCESSING)
    (reject,) = decoded.rejects
    assert (reject.shard, reject.key, reject.reason) == (uri, "a", "missing")
    assert decoded.readable == [False]
