"""Reporting: what the plots and the page show is read back from them, not assumed."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cir_core.benchmarks import Benchmark
from cir_core.reporting import (
    alpha_curve,
    contact_sheet_rows,
    image_ids_of,
    training_curves,
    write_contact_sheet,
)
from cir_core.reporting.contact_sheet import SheetColumn, SheetResult, SheetRow
from cir_core.schema import CirError, Query, Ranking

RESULTS = {"before TAT": {0.0: 0.1, 0.5: 0.4, 1.0: 0.2}, "after TAT": {1.0: 0.3, 0.0: 0.2, 0.5: 0.35}}
STRAY = {"after TAT": {0.7: (0.0, 1.0)}}


def test_alpha_curve_draws_the_values_with_distinct_styles():
    figure = alpha_curve(RESULTS, "recall@10", title="scenes val", note="generated data", rivals={"sum": 0.25})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for label, curve in RESULTS.items():
        assert list(lines[label].get_xdata()) == sorted(curve)
        assert list(lines[label].get_ydata()) == [curve[alpha] for alpha in sorted(curve)]
    styles = {(lines[label].get_linestyle(), lines[label].get_marker(), lines[label].get_color()) for label in RESULTS}
    assert all(len(set(parts)) == 2 for parts in zip(*styles, strict=True))  # each differs, not the colour alone
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["40.0", "35.0", "sum 25.0"]  # the best of each curve, in percent
    assert (axes.get_ylabel(), axes.get_title()) == ("recall@10 (%)", "generated data")
    assert "alpha" in axes.get_xlabel()
    assert figure.get_suptitle() == "scenes val"


def test_rival_names_never_touch():
    rivals = {"image only": 0.30, "text only": 0.301, "sum": 0.302, "nlerp": 0.31, "far": 0.9}
    figure = alpha_curve(RESULTS, "recall@10", title="t", rivals=rivals)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if " " in text.get_text()]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == len(rivals)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_intervals_are_a_band_around_the_curve():
    band = {"after TAT": {alpha: (value - 0.05, value + 0.05) for alpha, value in RESULTS["after TAT"].items()}}
    figure = alpha_curve(RESULTS, "map@10", title="t", intervals=band)
    (area,) = figure.axes[0].collections
    corners = area.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.15)
    assert corners[:, 1].max() == pytest.approx(0.40)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plots_are_written_and_equal_results_give_equal_files(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        alpha_curve(RESULTS, "recall@10", title="t", path=str(path))
    data = [path.read_bytes() for path in paths]
    assert data[0].startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix != ".svg":  # matplotlib salts the ids inside an SVG
        assert data[0] == data[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alpha_curve({}, "m", title="t"), "no results"),
        (lambda: alpha_curve({"a": {}}, "m", title="t"), "'a' has no values"),
        (lambda: alpha_curve({"a": {0.5: 34.0}}, "m", title="t"), "alpha 0.5 is 34.0"),
        (lambda: alpha_curve({"a": {0.5: 0.1}}, "m", title="t", rivals={"r": 7.0}), "rival r is 7.0"),
        (lambda: alpha_curve(RESULTS, "m", title="t", intervals={"x": {}}), "intervals for 'x'"),
        (lambda: alpha_curve(RESULTS, "m", title="t", intervals=STRAY), "without a value"),
        (lambda: alpha_curve(RESULTS, "m", title="t", path="plot.gif"), "not '.gif'"),
        (lambda: training_curves({"loss": {}}, title="t"), "no values"),
        (lambda: training_curves({}, title="t"), "no values"),
    ],
)  # fmt: skip
def test_plots_refuse_what_they_cannot_show(call, message):
    with pytest.raises(CirError, match=message):
        call()


def test_training_curves_have_a_panel_a_quantity(tmp_path):
    series = {
        "loss/train": {2: 1.0, 1: 2.0},
        "loss/validation": {2: 1.5},
        "learning rate": {1: 1e-4, 2: 5e-5},
    }
    figure = training_curves(series, title="t", path=str(tmp_path / "curves.png"))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate"]
    train, validation = figure.axes[0].get_lines()
    assert list(zip(train.get_xdata(), train.get_ydata(), strict=True)) == [(1, 2.0), (2, 1.0)]
    assert validation.get_marker() == "o"  # one point would be invisible as a line
    with Image.open(tmp_path / "curves.png") as written:
        assert written.width > 500


# --- contact sheets ---

GALLERY = tuple(f"g{number}" for number in range(8))


def picture(colour, size=(300, 200), **save):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, **{"format": "PNG", **save})
    return buffer.getvalue()


IMAGES = {name: picture((30 * number, 255 - 30 * number, 90)) for number, name in enumerate(GALLERY)}


@pytest.fixture
def benchmark():
    queries = tuple(Query(f"q{n}", GALLERY[n], f"<b>&\"'{n}</b>", (GALLERY[7 - n],)) for n in range(3))
    return Benchmark(
        name="hand", split="val", queries=queries, gallery_ids=GALLERY, protocol={"reference": "removed"},
        metrics=("recall@5",), headline="recall@5", query_kinds={"q0": "change"},
    )  # fmt: skip


@pytest.fixture
def rankings(benchmark):
    names = tuple(query.query_id for query in benchmark.queries)
    scores = np.tile(np.linspace(0.9, 0.2, 8, dtype=np.float32), (3, 1))
    forward = Ranking(names, np.tile(np.array(GALLERY), (3, 1)), scores)
    return {"before TAT": forward, "after TAT": Ranking(names, forward.image_ids[:, ::-1], scores)}


class Page(HTMLParser):
    """Collects the tags, the sources of pictures and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "src":
                self.sources.append(value)
            if name in ("href", "action", "srcset") or name.startswith("on"):
                self.links.append((name, value))

    def handle_data(self, data):
        self.words.append(data)


def test_rows_follow_the_protocol_and_mark_hits(benchmark, rankings):
    rows = contact_sheet_rows(rankings, benchmark, k=3)
    assert [row.query_id for row in rows] == ["q0", "q1", "q2"]
    before, after = rows[0].columns
    assert [result.image_id for result in before.results] == ["g1", "g2", "g3"]  # the reference g0 is removed
    assert (before.first_hit, before.list_length) == (7, 7)
    assert [(result.image_id, result.hit) for result in after.results] == [
        ("g7", True),
        ("g6", False),
        ("g5", False),
    ]
    assert after.results[0].score == pytest.approx(0.9)
    assert (rows[0].kind, rows[1].kind) == ("change", "")
    assert image_ids_of(rows[:1]) == {"g0", "g1", "g2", "g3", "g5", "g6", "g7"}
    assert [row.query_id for row in contact_sheet_rows(rankings, benchmark, num_rows=2)] == ["q0", "q2"]
    assert [row.query_id for row in contact_sheet_rows(rankings, benchmark, query_ids=["q2", "q1"])] == [
        "q2",
        "q1",
    ]


def test_the_page_is_self_contained_escaped_and_complete(tmp_path, benchmark, rankings):
    rows = contact_sheet_rows(rankings, benchmark, k=4)
    path = tmp_path / "sheet.html"
    write_contact_sheet(
        str(path),
        "A <title> & more",
        rows,
        IMAGES,
        note="generated <data>",
        protocol={"reference": "removed"},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "b", "base"} & set(page.tags)
    assert not page.links
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert not re.search(r"https?://|url\(|@import", text)
    words = "".join(page.words)
    for row in rows:
        assert row.relative_caption in words
    for part in (
        "A <title> & more",
        "generated <data>",
        "before TAT",
        "after TAT",
        "first target at rank 1",
        "removed",
    ):
        assert part in words
    assert len(page.sources) == 3 * (1 + 1 + 4 + 4)
    shown = [result for row in rows for column in row.columns for result in column.results]
    hits = sum(result.hit for result in shown)
    assert 0 < hits < len(shown)
    assert words.count("✓ target") == hits + 1  # and once in the legend
    assert text.count('<figure class="hit">') == hits


def test_thumbnails_are_small_upright_and_show_the_picture(tmp_path, benchmark, rankings):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    images = dict(IMAGES)
    images["g0"] = picture("red", (400, 100), format="JPEG", exif=exif)
    ramp = io.BytesIO()
    Image.fromarray(np.full((40, 40), 0x4000, dtype=np.uint16)).save(ramp, format="PNG")  # 16-bit grey, a quarter
    images["g1"] = ramp.getvalue()
    transparent = io.BytesIO()
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(transparent, format="PNG")
    images["g7"] = transparent.getvalue()
    path = tmp_path / "sheet.html"
    rows = contact_sheet_rows(rankings, benchmark, k=2, query_ids=["q0"])
    write_contact_sheet(str(path), "t", rows, images, thumbnail_px=64)
    sources = Page(path.read_text()).sources
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    reference, target, first = pictures[:3]
    assert reference.size == (16, 64)
    red, green, blue = reference.convert("RGB").getpixel((8, 32))
    assert (red > 230, green < 25, blue < 25) == (True, True, True)
    assert abs(first.convert("L").getpixel((20, 20)) - 0x40) < 4
    assert target.size == (50, 50)  # never enlarged
    assert min(target.convert("RGB").getpixel((25, 25))) > 250  # transparency shows white


def test_an_unreadable_picture_is_shown_and_counted_a_missing_one_is_an_error(tmp_path, benchmark, rankings):
    rows = contact_sheet_rows(rankings, benchmark, k=2)
    path = tmp_path / "sheet.html"
    huge = picture("white", (9000, 8000))
    write_contact_sheet(str(path), "t", rows, {**IMAGES, "g1": b"not a picture", "g6": IMAGES["g6"][:60], "g7": huge})
    text = path.read_text()
    assert "Pictures that could not be decoded: 3 (g1, g6, g7)" in text
    assert text.count('class="unreadable"') == len(re.findall(r'title="(g1|g6|g7)"', text))
    missing = {name: data for name, data in IMAGES.items() if name != "g6"}
    before = path.read_bytes()
    with pytest.raises(CirError, match="no picture of 'g6'"):
        write_contact_sheet(str(path), "t", rows, missing)
    assert path.read_bytes() == before


def test_forty_rows_of_photos_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    gallery = tuple(f"g{number}" for number in range(60))
    coarse = [rng.integers(0, 255, (12, 16, 3), dtype=np.uint8) for _ in gallery]
    photos = {}
    for name, pixels in zip(gallery, coarse, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG")
        photos[name] = buffer.getvalue()
    queries = tuple(Query(f"q{n}", gallery[n], "more", (gallery[n + 1],)) for n in range(50))
    benchmark = Benchmark("hand", "val", queries, gallery, {"reference": "removed"}, ("recall@10",), "recall@10")
    names = tuple(query.query_id for query in queries)
    ids = np.array([rng.permutation(np.array(gallery))[:12] for _ in queries])
    ranking = Ranking(names, ids, np.tile(np.linspace(1, 0, 12, dtype=np.float32), (50, 1)))
    rows = contact_sheet_rows({"before": ranking, "after": ranking}, benchmark)
    assert len(rows) == 40
    path = tmp_path / "sheet.html"
    write_contact_sheet(str(path), "t", rows, photos)
    assert Path(path).stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_ids": ["q0", "nope"]}, "no such query: 'nope'"),
        ({"k": 0}, "k = 0"),
        ({"num_rows": 0}, "num_rows = 0"),
    ],
)
def test_rows_refuse_unknown_queries_and_empty_sheets(benchmark, rankings, arguments, message):
    with pytest.raises(CirError, match=message):
        contact_sheet_rows(rankings, benchmark, **arguments)


def test_a_page_needs_rows_and_a_sane_size(tmp_path, benchmark, rankings):
    with pytest.raises(CirError, match="no rows"):
        write_contact_sheet(str(tmp_path / "x.html"), "t", [], IMAGES)
    rows = contact_sheet_rows(rankings, benchmark)
    with pytest.raises(CirError, match="between 16 and 512"):
        write_contact_sheet(str(tmp_path / "x.html"), "t", rows, IMAGES, thumbnail_px=4000)
    assert not list(tmp_path.iterdir())


def test_an_image_whose_picture_nobody_has_is_shown_by_its_id(tmp_path):
    results = (SheetResult("no<where>", 0.5, False),)
    row = SheetRow("q", "here", "red", (), (SheetColumn("slerp", results, 0, 1),))
    pictures = {"here": picture("red"), "no<where>": None}
    write_contact_sheet(str(tmp_path / "sheet.html"), "t", [row], pictures)
    page = (tmp_path / "sheet.html").read_text()
    assert '<div class="unreadable" title="no&lt;where&gt;">no&lt;where&gt;</div>' in page
    assert "could not be decoded" not in page
    assert page.count("<img") == 1
