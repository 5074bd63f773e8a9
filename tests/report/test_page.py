"""The page: safe, self-contained, the same for the same report, and small."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given

from tests.report.example import odd_report, training_report
from tests.report.strategies import LARGE, reports
from tunesmith import report
from tunesmith.core.report import Figure, Listing, Plot, Report, Sample, Table

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = (
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onload=alert(3) {{ 7*7 }} &amp; \u202eabc\x1b[1m\x00"
)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("td", "th"):
            self.text.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def shown(self) -> str:
        return " ".join("".join(self.text).split())


def check(page: str) -> Page:
    """What holds for every page, whatever is in it."""
    read = Page(page)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "a"}
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "srcset", "action")]
        for value in attributes.get("style", ""), attributes.get("fill", ""):
            assert not re.search(r"url\((?!#)", value), tag
        for name in attributes.get("aria-labelledby", "").split():
            assert name in ids
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert "url(" not in style
    assert "@import" not in style
    invisible = set(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", page))
    assert not invisible
    page.encode("utf-8")
    return read


@pytest.mark.parametrize("make", [training_report, odd_report, lambda: Report("")])
def test_pages(make: object) -> None:
    page = report.to_html(make())
    check(page)
    assert page == report.to_html(make())
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "http" not in page.replace("http-equiv", "")


@LARGE
@given(reports)
def test_any_page(made: Report) -> None:
    check(report.to_html(made))


def hostile_report(text: str) -> Report:
    """`text` wherever a report takes text."""
    figure = Figure(text, text, text, None, None, text, text)
    numbered = Figure(1.0, 2.0, text, "lower", 3.0, text, text)
    line = {text: ([1, 2], [1.0, 2.0]), text + "b": ([1], [math.nan])}
    return Report(
        title=text,
        summary=text,
        figures={text: figure, text + "2": numbered, text + "3": text},
        tables=[
            Table(text, [text, text], [[text, numbered], [figure, 1]], text, [text, text]),
            Table(text, [text], [[text]], text, collapsed=True),
        ],
        plots=[
            Plot(text, "line", text, text, line, unit=text, note=text, styles={text: "points"}),
            Plot(text, "line", text, text, {text: ([text, "b"], [1, 2])}),
            Plot(text, "line", text, text, line, below=Plot(text, "line", text, text, line)),
            Plot(text, "bar", text, text, {text: ([text], [1]), text + "b": ([text], [-2])}, unit=text),
            Plot(
                text, "heatmap", text, text, matrix=[[1, 2]], row_labels=[text], column_labels=[text, text], unit=text
            ),
        ],
        samples=[
            Sample(text, text, {text: text + " more", "b": "other"}, {text: True}, text),
            Sample(text, "", {"a": ""}),
        ],
        notes=[text],
        warnings=[text],
        listings=[Listing(text, text)],
    )


def test_text_is_text_wherever_it_stands() -> None:
    page = report.to_html(hostile_report(HOSTILE))
    read = check(page)
    assert "<script" not in page
    assert "<img" not in page
    assert read.shown().count('"><script>alert(1)</script><img src=x onerror=alert(2)>') >= 30
    assert read.shown().count("{{ 7*7 }} &amp; <U+202E>abc<U+001B>[1m<U+0000>") >= 30
    # The text brings no tag and no attribute that a page of harmless text has not.
    harmless = check(report.to_html(hostile_report("x" * len(HOSTILE))))
    kinds = [{(tag, *sorted(attributes)) for tag, attributes in page.tags} for page in (read, harmless)]
    assert kinds[0] == kinds[1]


def test_a_typical_page_is_small() -> None:
    assert len(report.to_html(training_report(1000)).encode()) < 150_000


def test_ten_thousand_points_are_drawn_with_few() -> None:
    xs = list(range(10_000))
    ys = [math.sin(x * 7919) for x in xs]
    ys[4321] = 17.0
    page = report.to_html(Report("t", plots=[Plot("p", "line", series={"s": (xs, ys)}, styles={"s": "smooth"})]))
    assert len(page.encode()) < 120_000
    # The spike is in the picture: the axis holds it and the thinned curve reaches it.
    drawn = re.search(r'<svg class="wide".*?</svg>', page, re.S)[0]
    raw = re.search(r'class="line raw s0" d="M([^"]+)"', drawn)[1]
    heights = [float(point.split()[1]) for point in raw.split("L")]
    assert min(heights) < 60
    assert sorted(heights)[1] > 200


def test_a_long_prompt_is_clipped_and_can_be_opened() -> None:
    long = "word " * 500
    page = report.to_html(Report("t", samples=[Sample(long, "short", {"after": "x" * 30_000})]))
    read = check(page)
    assert [tag for tag, _ in read.tags].count("details") == 2
    assert "Show all 2,500 characters" in read.shown()
    assert "Show all 30,000 characters" in read.shown()
    assert "10,000 more characters are in report.json" in read.shown()
    assert page.count("x" * 20_000) == 1
    assert "x" * 20_001 not in page


def test_blank_ends_are_told_and_not_shown() -> None:
    sample = Sample("p", "e", {"a": "\n" * 96, "b": "e" + "\n" * 9, "c": "", "d": "x\n", "e": "\n" * 40 + "late"})
    page = report.to_html(Report("t", samples=[sample]))
    shown = check(page).shown()
    assert "(96 line breaks)" in shown
    assert ">e</div>" in page
    assert "and 9 line breaks" in shown
    assert "(empty)" in shown
    assert "\n" * 12 not in page.replace("\n" * 40 + "late", "")
    assert "Show all 44 characters" in shown


def test_answers_are_marked_in_words_and_by_sign() -> None:
    sample = Sample(
        "p", "the cat sat", {"before": "the dog sat", "after": "the cat sat"}, {"before": False, "after": True}
    )
    page = report.to_html(Report("t", samples=[sample]))
    assert 'the <span class="missing">cat </span><span class="extra">dog </span>sat' in page
    shown = check(page).shown()
    assert "Before ✗ incorrect" in shown
    assert "After ✓ correct" in shown
    spaced = report.to_html(Report("t", samples=[Sample("p", "a  b", {"after": "a b"})]))
    assert "Only white space differs." in spaced


def test_changes_are_told_in_words_and_by_sign() -> None:
    figures = {
        "loss": Figure(1.4, 3.2, "nats/token", "lower"),
        "retained": Figure(0.828, 0.849, "share", "higher"),
        "steps": Figure(20, 10),
        "memory": Figure(5, unit="bytes", better="lower"),
    }
    shown = check(report.to_html(Report("t", figures))).shown()
    assert "loss nats/token before 3.200 → after 1.400 ▼ −56.2 % better" in shown
    assert "retained before 84.9 % → after 82.8 % ▼ −2.1 points worse" in shown
    assert "steps before 10 → after 20 ▲ +100.0 % memory 5 B Lower is better." in shown


def test_a_column_with_a_before_becomes_three() -> None:
    table = Table("t", ["family", "exact match"], [["copy", Figure(0.7, 0.5, "share", "higher")], ["sort", None]])
    shown = check(report.to_html(Report("r", tables=[table]))).shown()
    assert "family exact match before after change copy 50.0 % 70.0 % ▲ +20.0 points better sort – – –" in shown


def test_numbers_are_set_flush_right_also_with_gaps_between() -> None:
    table = Table("t", ["a", "b", "c"], [["x", 1, "u"], ["y", None, 2]])
    read = check(report.to_html(Report("r", tables=[table])))
    assert [a.get("class", "") for tag, a in read.tags if tag == "th"] == ["", "number", ""]
    assert [a.get("class", "") for tag, a in read.tags if tag == "td"] == ["", "number", ""] * 2


def test_pictures_do_not_share_names() -> None:
    bars = Plot("p", "bar", series={"a": (["x"], [1]), "b": (["x"], [2])})
    page = report.to_html(Report("r", plots=[bars, bars, Plot("q", "heatmap", matrix=[[1.0] * 20])]))
    check(page)
    used = set(re.findall(r"url\(#([^)]+)\)", page))
    assert len(used) == 4
    assert used <= set(re.findall(r'<pattern id="([^"]+)"', page))


def test_whitespace_is_kept() -> None:
    page = report.to_html(Report("t", samples=[Sample("a\n\tb  c\n", "", {"after": "  d"})]))
    assert ">a\n\tb  c\n</div>" in page
    assert ">  d</div>" in page


def test_numbers_that_are_not_finite_are_shown_and_marked() -> None:
    plot = Plot("p", "line", series={"s": ([1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0])})
    page = report.to_html(Report("t", {"loss": Figure(math.nan, 3.0, better="lower"), "x": -math.inf}, plots=[plot]))
    shown = check(page).shown()
    assert "before 3.000 → after NaN ! now NaN worse" in shown
    assert "−inf" in shown
    assert "not a finite number" in shown
    assert "from 1.000 at 1 to 2.000 at 4, lowest 1.000 at 1, highest 2.000 at 4, 2 not finite." in shown
    for coordinates in re.findall(r' d="([^"]*)"', page):
        assert "nan" not in coordinates
        assert "inf" not in coordinates


def test_a_long_table_is_cut() -> None:
    shown = check(report.to_html(Report("t", tables=[Table("t", ["n"], [[i] for i in range(1234)])]))).shown()
    assert "498 499 The first 500 of 1,234 rows; all are in report.json." in shown


def test_every_series_has_its_own_dash_or_mark() -> None:
    css = report.to_html(Report("t"))
    dashes = re.findall(r"\.line\.s[1-7] \{ stroke-dasharray: ([^;]+);", css)
    assert len(dashes) == 7
    assert len(set(dashes)) == 7
