"""Braces as a shell expands them: {00000..00099} and {train,val}."""

from __future__ import annotations

import re

from cir_core import files
from cir_core.schema import CirError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MAX_NAMES = 10_000_000


def expand_braces(uri: str) -> list[str]:
    """Return every name that a URI with braces stands for, in order; a URI without any as it is.

    A range counts with the width of its first number. Raises CirError for a range that is empty or too long.

    >>> expand_braces("{train,val}/{08..10}.tar")[2:5]
    ['train/10.tar', 'val/08.tar', 'val/09.tar']
    """
    names = [uri]
    while any(_BRACES.search(name) for name in names):
        names = [expanded for name in names for expanded in _first_braces(name)]
        if len(names) > _MAX_NAMES:
            raise CirError(f"{files.redact(uri)}: the braces stand for more than {_MAX_NAMES} names")
    return list(dict.fromkeys(names))


def _first_braces(name: str) -> list[str]:
    match = _BRACES.search(name)
    if match is None:
        return [name]
    head, tail = name[: match.start()], name[match.end() :]
    low, high, words = match.groups()
    if words is not None:
        return [f"{head}{word}{tail}" for word in words.split(",")]
    if not int(low) <= int(high) < int(low) + _MAX_NAMES:
        raise CirError(f"{files.redact(name)}: the range {match.group()} is empty or too long")
    return [f"{head}{number:0{len(low)}d}{tail}" for number in range(int(low), int(high) + 1)]
