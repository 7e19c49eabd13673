"""URIs as text: their parts, how they are joined, and how they are shown without credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from cir_core.schema import CirError

_QUERY = re.compile(r"\?[\w.-]+=[^?]*$")  # name=value, so that the ? of a glob stays in the path
_USERINFO = re.compile(r"^[^/@]+:.*@")  # a secret may hold an unquoted "/"
_USERINFO_OR_PORT = re.compile(r"^[^/@]+:(?!\d+(?:/|$)).*@")
_WEB_USERINFO = re.compile(r"^[^/@]+:(?!\d+(?:/|$))[^@]*@")
# Each at its default: behind it, the end of a key such as "photo?id=3.jpg" is not taken for an option.
_NO_OPTION = {
    "s3": "?allow_bucket_creation=false",
    "gs": "?endpoint_override=",
    "gcs": "?endpoint_override=",
    "abfs": "?background_writes=true",
    "abfss": "?background_writes=true",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """A URI taken apart. scheme: "" for a plain local path; path: without the leading "/" of a remote URI."""

    scheme: str
    netloc: str
    path: str
    query: str  # "?..." or ""


def split(uri: str) -> Parts:
    """Take a URI apart."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Parts("", "", uri, "")
    scheme = scheme.lower()
    if scheme == "file":
        return Parts("file", "", unquote(rest[rest.find("/") :] if "/" in rest else rest), "")
    found = _QUERY.search(rest)
    query = found.group() if found else ""
    rest = rest[: len(rest) - len(query)]
    patterns = {"hdfs": _USERINFO_OR_PORT, "viewfs": _USERINFO_OR_PORT, "http": _WEB_USERINFO, "https": _WEB_USERINFO}
    userinfo = patterns.get(scheme, _USERINFO).match(rest)  # a bucket has no port
    start = userinfo.end() if userinfo else 0
    slash = rest.find("/", start)
    slash = len(rest) if slash < 0 else slash
    return Parts(scheme, rest[:slash], rest[slash + 1 :], query)


def redact(uri: str) -> str:
    """Return the URI without user names, passwords and query strings: safe to print and to store."""
    parts = split(uri)
    if parts.scheme in ("", "file"):
        return uri
    host = parts.netloc if parts.scheme.startswith("abfs") else parts.netloc.rpartition("@")[2]
    path = parts.path.partition("?")[0] if parts.scheme in ("http", "https") else parts.path
    return f"{parts.scheme}://{host}" + (f"/{path}" if path else "")


def query_of(uri: str) -> str:
    """Return the `?name=value` part of a remote URI, or ""."""
    return split(uri).query


def scrub(text: str, uri: str) -> str:
    """Return a message without what is secret in `uri`."""
    parts = split(uri)
    text = text.replace(uri, redact(uri))
    userinfo = parts.netloc.rpartition("@")[0]
    secrets = {userinfo, parts.query.lstrip("?"), *userinfo.split(":")}
    for secret in sorted(secrets | {unquote(secret) for secret in secrets}, key=len, reverse=True):
        text = text.replace(secret, "***") if secret else text
    return text


def is_local(uri: str) -> bool:
    """Whether `uri` is a file of this machine."""
    return split(uri).scheme in ("", "file")


def is_web(uri: str) -> bool:
    """Whether `uri` is the address of a web server's file."""
    return split(uri).scheme in ("http", "https")


def local_path(uri: str) -> Path:
    """Return the absolute path of a local URI; CirError for any other."""
    parts = split(uri)
    if parts.scheme not in ("", "file"):
        raise CirError(f"{redact(uri)}: expected a local path")
    if not parts.path or "\0" in parts.path:
        raise CirError(f"{uri!r} is not a path")
    return Path(parts.path).absolute()


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, before its query string. Parts are literal, with all that looks like a query.

    >>> join("s3://bucket/a?region=eu-west-1", "b", "c.parquet")
    's3://bucket/a/b/c.parquet?region=eu-west-1'
    >>> join("s3://bucket/a", "photo?id=3.jpg")
    's3://bucket/a/photo?id=3.jpg?allow_bucket_creation=false'
    """
    base = split(uri)
    if not base.netloc and base.scheme not in ("", "file"):
        raise CirError(f"{redact(uri)!r} names no bucket or host; expected {base.scheme}://<bucket>/<folder>")
    start = uri[: len(uri) - len(base.query)] if base.query else uri
    cleaned = [part.strip("/") for part in parts]
    if any(not part for part in cleaned):
        raise CirError(f"join({redact(uri)!r}, ...): empty path part in {parts!r}")
    if base.scheme == "file":
        cleaned = [quote(part) for part in cleaned]
    joined = "/".join([start.rstrip("/"), *cleaned]) + base.query
    return joined + _NO_OPTION.get(base.scheme, "") if not base.query and split(joined).query else joined
