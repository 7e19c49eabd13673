"""From what a user writes (a file, a folder, a glob, braces, a list in a file, or several) to a list of shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from fnmatch import fnmatchcase

from cir_core import files
from cir_core.schema import CirError
from cir_core.shards.braces import expand_braces
from cir_core.shards.fetch import resolve
from cir_core.shards.images import is_image_name
from cir_core.shards.local_folders import odd_entries
from cir_core.shards.model import UnusableError

_SUFFIXES = (".tar", ".parquet")
_NAMED_SUFFIXES = (*_SUFFIXES, ".csv")  # a CSV is a list of images only where someone says so
_LIST_SUFFIX = ".txt"
_PROBES = 8  # more files than this in one folder are looked up in its listing, not one by one
_THREADS = 16


def list_shards(uri: str | Sequence[str], *, suffixes: Sequence[str] | None = None) -> list[str]:
    """Return the URIs of shards, each once; what is given first comes first.

    uri is one of these, or a list of them:
    - a .tar or .parquet file of samples, or a .csv or .parquet list of image URIs (see `uri_list`);
    - a folder or prefix: all .tar and .parquet files in it, sorted by name; if it has none, those below it at any
      depth, unless images lie there too (such a folder is one of images). A .parquet beside a .tar of the same name
      is img2dataset's record of the download, not a shard, and is left out;
    - a glob: `*`, `?` and `[...]` match inside one name, `**` any number of folders;
    - braces: ranges `{00000..00099}`, both ends included, and words `{train,val}`, also in globs;
    - a .txt file with one of the above a line, relative ones counting from its folder. Blank lines and lines that
      begin with # are skipped. Where its lines may point says `fetch.resolve`.

    suffixes: what the names end in, for other files than shards. Raises CirError if any of them finds nothing (for
    a line of a .txt file naming file and line), or if a shard of a range is missing.
    """
    given = [uri] if isinstance(uri, str) else list(uri)
    if not given:
        raise CirError("no shards given; expected files, folders, globs or ranges such as {00000..00099}.tar")
    named, inside = (_NAMED_SUFFIXES, _SUFFIXES) if suffixes is None else (tuple(suffixes),) * 2
    found: list[str] = []
    for one in given:
        if files.redact(one).lower().endswith(_LIST_SUFFIX) and _LIST_SUFFIX not in named:
            found += _expand_list_file(one, named, inside)
        else:
            found += _expand(one, named, inside)
    return list(dict.fromkeys(found))


def shard_versions(shards: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (shard, size in bytes, time of its last change in ns) of existing shards, in the order given.

    One listing per folder. Names and sizes alone do not tell shards apart: tars are padded to whole blocks, so two splits
    of a data set may well agree in both. Of a web server's file only the size is known.
    """
    listings = {
        folder: {file.name: (file.size_bytes, file.modified_ns) for file in files.list_files(folder, recursive=False)}
        for folder in {_folder(shard) for shard in shards if not files.is_web(shard)}
    }
    return [
        (shard, files.size_bytes(shard), 0) if files.is_web(shard) else (shard, *listings[_folder(shard)][_name(shard)])
        for shard in shards
    ]


def _expand_list_file(uri: str, named: tuple[str, ...], inside: tuple[str, ...]) -> list[str]:
    name = files.redact(uri)
    try:
        lines = files.read_bytes(uri).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CirError(f"{name}: not UTF-8 ({error}); expected one file, folder, glob or range a line") from None
    places: list[tuple[int, str]] = []
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if line and not line.startswith("#"):
            try:
                places.append((number, resolve(uri, line)))
            except UnusableError as fault:
                raise CirError(f"{name} line {number}: {line!r}: {fault.detail}") from None
    if not places:
        raise CirError(f"{name}: names no shards; expected one file, folder, glob or range a line")
    single = [place for _, place in places if _is_plain(place, named)]
    missing = set(_missing(single, check_web=True))
    found: list[str] = []
    for number, place in places:
        try:
            if place in missing:
                raise CirError(f"{files.redact(place)}: no such file; check the path")
            found += [place] if _is_plain(place, named) else _expand(place, named, inside)
        except CirError as error:
            raise CirError(f"{name} line {number}: {error}") from None
    return found


def _is_plain(uri: str, suffixes: tuple[str, ...]) -> bool:
    """Whether this names one file and nothing has to be expanded."""
    name = files.redact(uri)
    return name.endswith(suffixes) and not any(mark in name for mark in "*?[{")


def _expand(uri: str, named: tuple[str, ...], inside: tuple[str, ...]) -> list[str]:
    names = expand_braces(uri)
    if names == [uri]:
        return _expand_one(uri, named, inside)
    single = [name for name in names if _is_plain(name, named)]
    missing = _missing(single, check_web=False)
    if missing:
        shown = ", ".join(files.redact(name) for name in missing[:3])
        raise CirError(f"{files.redact(uri)}: {len(missing)} of {len(names)} shards are missing: {shown} ...")
    known = set(single)
    return [shard for name in names for shard in ([name] if name in known else _expand_one(name, named, inside))]


def _expand_one(uri: str, named: tuple[str, ...], inside: tuple[str, ...]) -> list[str]:
    name = files.redact(uri)
    if any(mark in name for mark in "*?[") and not files.exists(uri):
        return _expand_glob(uri, named if name.endswith(named) else inside)
    if files.is_folder(uri):
        return _expand_folder(uri, inside)
    if not name.endswith(named):
        absent = "" if files.exists(uri) else "no such file, folder or bucket; "
        raise CirError(f"{name}: {absent}expected a folder or a name that ends in {' or '.join(named)}")
    if not files.exists(uri):
        raise CirError(f"{name}: no such file; check the path")
    return [uri]


def _expand_folder(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    _check_links(uri, suffixes, recursive=False)
    found = _shards_of(files.list_files(uri, recursive=False), suffixes)
    if found:
        return found
    _check_links(uri, suffixes, recursive=True)
    below = files.list_files(uri)
    found = _shards_of(below, suffixes)
    if not found:
        raise CirError(f"{files.redact(uri)}: no {_wanted(suffixes)} file in this folder or below it")
    if any(is_image_name(file.name) for file in below):
        raise CirError(
            f"{files.redact(uri)}: no {_wanted(suffixes)} file in this folder, and below it images beside such files: "
            "name the folder that holds the shards"
        )
    return found


def _check_links(uri: str, suffixes: tuple[str, ...], *, recursive: bool) -> None:
    for name, what in odd_entries(uri, recursive=recursive):
        if name.endswith(suffixes):
            raise CirError(f"{files.redact(files.join(uri, name))}: {what}; remove it or restore the shard")


def _shards_of(
    listed: Sequence[files.StoredFile],
    suffixes: tuple[str, ...],
    matches: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """Return the shards of a listing, without the records that img2dataset writes beside its tars."""
    found = [file for file in listed if file.name.endswith(suffixes) and matches(file.name)]
    tars = {file.name.removesuffix(".tar") for file in found if file.name.endswith(".tar")}
    return [
        file.uri
        for file in found
        if not (file.name.endswith(".parquet") and file.name.removesuffix(".parquet") in tars)
    ]


def _expand_glob(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    query = files.query_of(uri)
    segments = uri[: len(uri) - len(query)].split("/")
    fixed = next(index for index, segment in enumerate(segments) if any(mark in segment for mark in "*?["))
    folder = "/".join(segments[:fixed]) or ("/" if fixed else ".")
    pattern = segments[fixed:]
    listed = files.list_files(folder + query, recursive=len(pattern) > 1 or pattern == ["**"])
    found = _shards_of(listed, suffixes, lambda name: _matches(name.split("/"), pattern))
    if not found:
        raise CirError(f"{files.redact(uri)}: no {_wanted(suffixes)} file matches")
    return found


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Match a path against a glob, part by part; ** stands for any number of parts, a last one for one at least."""
    reached = {0}  # how many parts of the pattern can have been used up so far
    for name in names:
        stay = {at for at in reached if at < len(pattern) and pattern[at] == "**"}
        ahead = {at for start in reached for at in _past_stars(start, pattern)}
        reached = stay | {at + 1 for at in ahead if at < len(pattern) and fnmatchcase(name, pattern[at])}
    return len(pattern) in reached


def _past_stars(at: int, pattern: list[str]) -> set[int]:
    found = {at}
    while at < len(pattern) and pattern[at] == "**":
        at += 1
        found.add(at)
    return found


def _missing(names: Sequence[str], *, check_web: bool) -> list[str]:
    """Return the files that are not there. check_web: also ask web servers, which list no folder, one by one."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    probes: list[str] = []
    for name in names:
        if not files.is_web(name):
            by_folder[_folder(name)].append(name)
        elif check_web:
            probes.append(name)
    absent: set[str] = set()
    for folder, inside in by_folder.items():
        if len(inside) <= _PROBES:
            probes += inside
            continue
        present = {file.name for file in files.list_files(folder, recursive=False)}
        absent |= {name for name in inside if _name(name) not in present}
    with ThreadPoolExecutor(_THREADS) as pool:
        absent |= {
            name
            for name, there in zip(
                probes, pool.map(lambda probe: copy_context().run(files.exists, probe), probes), strict=True
            )
            if not there
        }
    return [name for name in names if name in absent]


def _wanted(suffixes: Sequence[str]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)


def _name(uri: str) -> str:
    return uri[: len(uri) - len(files.query_of(uri))].rpartition("/")[2]


def _folder(uri: str) -> str:
    """Return the folder of a URI, its query string kept."""
    clean = uri if files.is_local(uri) else uri[: len(uri) - len(files.query_of(uri))]
    folder, slash, _ = clean.rpartition("/")
    if not slash:
        return "."
    return (folder or "/") + files.query_of(uri)
