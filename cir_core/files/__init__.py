"""Files on a local disk, in an object store, or anywhere else that fsspec can open.

A URI is a local path (relative ones count from the working directory), `file:///...`, an object store URI
(`s3://bucket/key`, `gs://`, `abfs://`, opened by pyarrow) or anything else fsspec knows (`memory://`,
`https://`). Keys of object stores are taken literally, never percent-decoded; `?name=value` at the end of
such a URI is an option of the file system, as in `s3://bucket/key?endpoint_override=127.0.0.1:9000`. A key that
itself ends like one needs an option behind it, which `join` and `list_files` give it:
`s3://bucket/photo?id=3.jpg?allow_bucket_creation=false`.

Every write is atomic: a reader sees the old file or the new one, whole. A file, folder or bucket that does not exist
and a refused access are `CirError`, at once. What may pass (throttling, resets, timeouts, short reads, a store that is
away) is tried again with growing, jittered pauses until the patience ends (`patience`), a long read from where it
broke; then it is an `OSError`. No message repeats the credentials of a URI.
"""

from cir_core.files.access import (
    StoredFile,
    exists,
    filesystem,
    is_folder,
    list_files,
    on_retry,
    patience,
    size_bytes,
)
from cir_core.files.reading import open_parquet, open_random, open_stream, read_bytes, read_json, read_range
from cir_core.files.uris import is_local, is_web, join, local_path, query_of, redact
from cir_core.files.writing import (
    create_json,
    open_atomic,
    parquet_bytes,
    write_bytes,
    write_json,
    write_parquet,
)

__all__ = [
    "StoredFile",
    "create_json",
    "exists",
    "filesystem",
    "is_folder",
    "is_local",
    "is_web",
    "join",
    "list_files",
    "local_path",
    "on_retry",
    "open_atomic",
    "open_parquet",
    "open_random",
    "open_stream",
    "parquet_bytes",
    "patience",
    "query_of",
    "read_bytes",
    "read_json",
    "read_range",
    "redact",
    "size_bytes",
    "write_bytes",
    "write_json",
    "write_parquet",
]
