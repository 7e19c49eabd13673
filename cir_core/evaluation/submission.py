"""Files for a benchmark's test server, and a validator that names everything the server would refuse.

CIRR test1 takes two files, {"version": "rc2", "metric": "recall" | "recall_subset", "<pair id>": [names]},
with 50 and 3 names a query. CIRCO takes one, {"<query id>": [50 integers]}: test goes to its server, val to
its authors' own script. Rules: the CIRR and CIRCO repositories' pages on their evaluation servers, 2025.

CIRCO's gallery is COCO 2017 unlabeled, whose list of ids does not come with the annotations. With all 123,403
ids in the benchmark each listed id is looked up. A smaller gallery is a stand-in: where it holds at least
half of the images that a file lists, the file was made from it and each id is looked up as well; where not,
an absent id proves nothing, and only the range of COCO's ids (8 to 581931) is checked.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from reprlib import Repr

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.benchmarks.circo import COCO_IMAGES
from cir_core.evaluation.protocol import align, apply_protocol
from cir_core.schema import CirError, Query, Ranking

MAX_BYTES = 5_000_000  # CIRR's "5 MB"; CIRCO names no limit, and none of its files comes near
CIRR_VERSION = "rc2"
CIRR_LENGTHS = {"recall": 50, "recall_subset": 3}
CIRCO_LENGTH = 50
COCO_UNLABELED_RANGE = range(8, 581_931 + 1)

_SPLITS = {"cirr": ("test1",), "circo": ("test", "val")}
_NAMED = 10  # how many violations of one rule are named before the rest are counted
_SHOWN = 100  # characters of a strange value
_COCO_DIGITS = 12  # COCO's file names are ids padded with zeros to this length
_STRANGER = "lists an image that is not in the gallery"
_MISSING = object()


def write_submission(
    ranking: Ranking,
    benchmark: Benchmark,
    path: str | os.PathLike[str],
    *,
    subset_ranking: Ranking | None = None,
) -> list[str]:
    """Write the files that the benchmark's test server takes; return their URIs (CIRR: recall, recall_subset).

    path: a folder or its URI, which gets cirr_test1_recall.json and cirr_test1_recall_subset.json, or
    circo_<split>.json. A path that ends in .json names CIRCO's file itself, and x.json makes CIRR's
    x_recall.json and x_recall_subset.json. Equal rankings give equal bytes; each file appears whole.
    ranking: at least 50 images a query beside the reference; for CIRR also 3 other members of its group, unless
    subset_ranking holds them: the queries' groups alone, ranked.

    Raises CirError, with nothing written, for a benchmark without a test server, for every fault that
    `apply_protocol` finds in the ranking, and for whatever `validate_submission` would find in the files.
    """
    path = os.fspath(path)
    _check_server(benchmark)
    ranking = apply_protocol(ranking, benchmark)
    groups = ranking if subset_ranking is None else align(subset_ranking, benchmark)
    uris = _submission_uris(path, benchmark)
    if not _names_a_file(path) and _is_file(path):
        raise CirError(f"{files.redact(path)}: is a file; name a folder, or a file that ends in .json")
    made = {}
    for metric, uri in uris.items():
        lists = groups if metric == "recall_subset" else ranking
        made[uri] = json.dumps(_content(lists, benchmark, metric), separators=(",", ":")).encode()
        if violations := _violations(made[uri], benchmark):
            raise CirError(f"{files.redact(uri)}: not written, the server would refuse it: {'; '.join(violations)}")
    for uri, data in made.items():
        files.write_bytes(uri, data)
    return list(made)


def validate_submission(path: str | os.PathLike[str], benchmark: Benchmark) -> list[str]:
    """Return every violation of the test server's rules in a file, each with its query and value; [] is valid.

    path: one file; or what `write_submission` was given: then all files of its names that exist are checked,
    and each violation begins with the file's name. The first 10 violations of a rule are named, the rest
    counted. A file that is too large is not read, one that is not a JSON object is not looked into; a list
    of unknown metric has no length to check. With a benchmark of fewer than COCO's ids see this module's
    head. Raises CirError for a benchmark without a test server and for a file that is missing or cannot be
    opened.
    """
    path = os.fspath(path)
    _check_server(benchmark)
    if _is_file(path):
        return _file_violations(path, benchmark)
    uris = list(_submission_uris(path, benchmark).values())
    found = [uri for uri in uris if _is_file(uri)]
    if not found:
        names = " or ".join(map(files.redact, uris))
        raise CirError(f"{files.redact(path)}: no submission file here; expected {names}")
    faults = {files.redact(uri).rpartition("/")[2]: _file_violations(uri, benchmark) for uri in found}
    return [f"{name}: {fault}" for name, named in faults.items() for fault in named]


def has_test_server(benchmark: Benchmark) -> bool:
    """Whether `write_submission` knows a test server for this benchmark and split."""
    return benchmark.split in _SPLITS.get(benchmark.name, ())


def _check_server(benchmark: Benchmark) -> None:
    if not has_test_server(benchmark):
        known = ", ".join(f"{name} {split}" for name, splits in _SPLITS.items() for split in splits)
        raise CirError(f"{benchmark}: has no test server (known: {known}); score its rankings with evaluate()")


def _is_file(uri: str) -> bool:
    return files.exists(uri) and not files.is_folder(uri)


def _names_a_file(path: str) -> bool:
    return path.removesuffix(files.query_of(path)).lower().endswith(".json")


def _submission_uris(path: str, benchmark: Benchmark) -> dict[str, str]:
    """{metric: URI}; CIRCO's one file has the metric ""."""
    metrics = tuple(CIRR_LENGTHS) if benchmark.name == "cirr" else ("",)
    if _names_a_file(path):
        options = files.query_of(path)
        stem = path.removesuffix(options)[: -len(".json")]
        return {metric: f"{stem}_{metric}.json{options}" if metric else path for metric in metrics}
    name = f"{benchmark.name}_{benchmark.split}"
    return {metric: files.join(path, f"{name}_{metric}.json" if metric else f"{name}.json") for metric in metrics}


def _content(ranking: Ranking, benchmark: Benchmark, metric: str) -> dict[str, object]:
    """Return the JSON object of one file. ranking: under the benchmark's protocol, queries in its order."""
    length = CIRR_LENGTHS.get(metric, CIRCO_LENGTH)
    content: dict[str, object] = {"version": CIRR_VERSION, "metric": metric} if metric else {}
    for query, row in zip(benchmark.queries, ranking.image_ids.tolist(), strict=True):
        group = _group(query, benchmark) if metric == "recall_subset" else None
        names = [name for name in row if name and (group is None or name in group)][:length]
        if len(names) < length:
            images = "images" if group is None else "members of its group beside the reference"
            where = f"{benchmark}: query {query.query_id!r}"
            raise CirError(f"{where}: needs {length} {images}, the ranking holds {len(names)}; rank more of them")
        content[query.query_id] = names if metric else [_coco_id(name, benchmark) for name in names]
    return content


def _group(query: Query, benchmark: Benchmark) -> frozenset[str]:
    """The members of a CIRR query's image group without its reference."""
    if not query.subset_ids:
        raise CirError(f"{benchmark}: query {query.query_id!r} has no subset_ids; recall_subset needs its image group")
    return frozenset(query.subset_ids) - {query.reference_id}


def _coco_id(name: str, benchmark: Benchmark) -> int:
    if not (name.isascii() and name.isdigit() and len(name) <= _COCO_DIGITS):
        raise CirError(f"{benchmark}: gallery id {name!r} is not a COCO image id; CIRCO's server takes integers")
    return int(name)


class _Faults:
    """Violations by rule: the first _NAMED of a rule in full, then how many more there are."""

    def __init__(self) -> None:
        self._named: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, subject: str, rule: str, value: object = _MISSING) -> None:
        """Record "<subject>: <rule>: <value>". Values come from a stranger's file: shown short and escaped."""
        self._counts[rule] += 1
        if self._counts[rule] <= _NAMED:
            shown = "" if value is _MISSING else f": {_show(value)}"
            self._named.setdefault(rule, []).append(f"{subject}: {rule}{shown}")

    def listed(self) -> list[str]:
        """Return all violations, rule by rule."""
        result = []
        for rule, named in self._named.items():
            more = self._counts[rule] - len(named)
            result += [*named, f"and {more} more: {rule}"] if more else named
        return result


@dataclass(frozen=True)
class _Rules:
    """What a file's lists may hold. header: its keys that are no queries. length None: unknown, not checked."""

    header: frozenset[str]
    entry: type
    length: int | None
    gallery: Container[object]
    groups: Mapping[str, frozenset[str]]  # query id -> the only images it may list; empty: any of the gallery


def _show(value: object) -> str:
    short = Repr()  # bounded in depth as well, where repr() would recurse
    short.maxstring = short.maxlong = 60
    text = short.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _file_violations(uri: str, benchmark: Benchmark) -> list[str]:
    size = files.size_bytes(uri)
    if size > MAX_BYTES:
        return [f"the file has {size:,} bytes, the limit is {MAX_BYTES:,} (5 MB)"]
    with files.open_stream(uri) as stream:
        data = stream.read(MAX_BYTES + 1)  # bounded: the file may be growing, or its size a lie
    return _violations(data, benchmark)


def _violations(data: bytes, benchmark: Benchmark) -> list[str]:
    if len(data) > MAX_BYTES:
        return [f"the file has more than {MAX_BYTES:,} bytes (5 MB)"]
    try:
        content, repeated = _parse(data)
    except RecursionError:
        return ["the file is not a submission: its JSON is nested too deeply"]
    except ValueError as error:
        return [f"the file is not JSON: {error}"]
    if not isinstance(content, dict):
        return [f"the file must hold a JSON object, holds {type(content).__name__}: {_show(content)}"]
    faults = _Faults()
    for key in repeated:
        faults.add(f"key {_show(key)}", "is in the file more than once")
    rules = _cirr_rules(content, benchmark, faults) if benchmark.name == "cirr" else _circo_rules(content, benchmark)
    known = {query.query_id for query in benchmark.queries} | rules.header
    for key in content:
        if key not in known:
            faults.add(f"query {_show(key)}", "is not a query of this split")
    for query in benchmark.queries:
        if query.query_id in content:
            _check_list(content[query.query_id], query, rules, faults)
        else:
            faults.add(f"query {query.query_id!r}", "is missing")
    return faults.listed()


def _parse(data: bytes) -> tuple[object, list[str]]:
    """Return the parsed JSON and the keys that its outermost object repeats; ValueError if it is not JSON."""
    outermost: list[tuple[str, object]] = []

    def keep(pairs: list[tuple[str, object]]) -> dict[str, object]:
        outermost[:] = pairs  # the outermost object ends last
        return dict(pairs)

    def refuse(name: str) -> object:
        raise ValueError(f"{name} is not a JSON value")

    content = json.loads(data.decode("utf-8"), object_pairs_hook=keep, parse_constant=refuse)
    return content, [key for key, count in Counter(key for key, _ in outermost).items() if count > 1]


def _cirr_rules(content: Mapping[str, object], benchmark: Benchmark, faults: _Faults) -> _Rules:
    for key, values in (("version", (CIRR_VERSION,)), ("metric", tuple(CIRR_LENGTHS))):
        expected = " or ".join(f'"{value}"' for value in values)
        if key not in content:
            faults.add(f'"{key}"', f"is missing, must be {expected}")
        elif content[key] not in values:
            faults.add(f'"{key}"', f"must be {expected}, is", content[key])
    metric = content.get("metric")
    length = CIRR_LENGTHS.get(metric) if isinstance(metric, str) else None
    subset = metric == "recall_subset"
    return _Rules(
        header=frozenset({"version", "metric"}),
        entry=str,
        length=length,
        gallery=frozenset(benchmark.gallery_ids),
        groups={query.query_id: _group(query, benchmark) for query in benchmark.queries} if subset else {},
    )


def _circo_rules(content: Mapping[str, object], benchmark: Benchmark) -> _Rules:
    own = frozenset(_coco_id(name, benchmark) for name in benchmark.gallery_ids)
    lists = (entries for entries in content.values() if isinstance(entries, list))
    listed = {entry for entries in lists for entry in entries if type(entry) is int and _hashable(entry)}
    known = len(own) == COCO_IMAGES or 2 * len(listed & own) >= len(listed)
    gallery: Container[object] = own if known else COCO_UNLABELED_RANGE
    return _Rules(header=frozenset(), entry=int, length=CIRCO_LENGTH, gallery=gallery, groups={})


def _check_list(entries: object, query: Query, rules: _Rules, faults: _Faults) -> None:
    where = f"query {query.query_id!r}"
    if not isinstance(entries, list):
        faults.add(where, "needs a list of images, has", entries)
        return
    if rules.length is not None and len(entries) != rules.length:
        faults.add(where, f"needs {rules.length} images, lists", len(entries))
    sound = []
    for entry in entries:
        if type(entry) is not rules.entry:  # a bool is no integer here
            faults.add(where, f"lists an entry that is not {'a string' if rules.entry is str else 'an integer'}", entry)
        elif not _hashable(entry):
            faults.add(where, _STRANGER, entry)
        else:
            sound.append(entry)
    for name, count in Counter(sound).items():
        if count > 1:
            faults.add(where, "lists an image more than once", name)
        if rule := _broken_rule(name, query, rules):
            faults.add(where, rule, name)


def _hashable(entry: object) -> bool:
    """Whether an entry may go into a set: huge integers can be made to share one hash, and stall the set."""
    return not isinstance(entry, int) or 0 <= entry < 10**_COCO_DIGITS


def _broken_rule(name: object, query: Query, rules: _Rules) -> str:
    if name not in rules.gallery:
        return _STRANGER
    if name == query.reference_id:  # never so in CIRCO, which allows it: its entries are integers
        return "lists its own reference"
    return "" if name in rules.groups.get(query.query_id, (name,)) else "lists an image outside its group"
