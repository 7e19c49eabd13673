"""Whether a store refused one picture or us: an object store words both alike, S3 mostly as a bare 403 or 400."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cir_core import files
from cir_core.files.uris import Parts, split
from cir_core.schema import AccessError, RefusedError

MAX_REFUSED = 64
"""So many refusals of a store before a process has read anything of it say that it is closed to us."""
_last_read: dict[Parts, str] = {}  # in this process, by store
_refused: Counter[Parts] = Counter()


@contextmanager
def judge_refusals(uri: str) -> Iterator[None]:
    """Let what reads `uri` inside the block fail as it does, but for a refusal that is not about `uri` alone.

    To tell, what was read last of the same store is asked for again.

    Raises:
        AccessError: that is refused now too, as where credentials end; or MAX_REFUSED were refused and none was ever read.
    """
    if files.is_local(uri) or files.is_web(uri):  # what a stranger's host refuses is no matter of our credentials
        yield
        return
    parts = split(uri)
    store = Parts(parts.scheme, parts.netloc, "", parts.query)
    try:
        yield
    except RefusedError as error:
        before = _last_read.get(store)
        if before is not None:
            _check_still_open(before, error)
            raise
        _refused[store] += 1
        if _refused[store] < MAX_REFUSED:
            raise
        raise AccessError(
            f"{error}. {_refused[store]} pictures of this store were refused and none could be read; give access to "
            "them, or leave them out"
        ) from None
    _last_read[store] = uri


def _check_still_open(before: str, refusal: RefusedError) -> None:
    try:
        files.size_bytes(before)
    except RefusedError:
        raise AccessError(
            f"{refusal}. {files.redact(before)} could be read before and is refused now as well: renew the credentials "
            "and give the same command again"
        ) from None
