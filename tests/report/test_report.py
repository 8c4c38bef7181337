"""The page: nothing in it runs or is fetched, and it stands with any part left out."""

import re
import resource
import signal
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from logra_kernels.report import Answer, Arm, Proof, Provider, Report, Row, render
from logra_kernels.report.chart import Axis, diverging, number, with_spread

HOSTILE = "</p><script>alert('1')</script><img src=x onerror=alert(2)>\" onload=\"x {{ 7*7 }} {% raw %} & \0 \ud800"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; notes tags that are closed out of order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.misplaced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misplaced.append(tag)

    def handle_data(self, data):
        self.text += data


def _rows(text: str = "text", count: int = 3) -> list[Row]:
    return [Row(f"row {i}", f"source {i}", text, 10.0 / (i + 1)) for i in range(count)]


def _answer(name: str, text: str = "text") -> Answer:
    return Answer(name, f"prompt {text}", f"completion {text}", "its own words", 12.0, 8, _rows(text), _rows(text, 1))


def _proof(queries: list[str], seeds: int, top: float = 0.3) -> Proof:
    def arm(name: str, removed: int, raise_: float) -> Arm:
        losses = [[1.0 + q + raise_ + 0.01 * seed for q in range(len(queries))] for seed in range(seeds)]
        return Arm(name, [removed + seed for seed in range(seeds)], losses)

    return Proof(queries, arm("all", 0, 0.0), arm("random", 9, 0.02), arm("top", 9, top))


def _full(text: str = "text") -> Report:
    answers = [_answer("q1", text), _answer("q2", text)]
    providers = [Provider(f"{text} {i}", i + 1, 5.0 - i) for i in range(20)]
    facts = [(text, [(text, text)])]
    return Report(text, text, answers, text, providers, "source", _proof(["q1", "q2"], 3), facts)


def _page(report: Report, folder) -> Page:
    return Page(render(report, folder / "report.html").read_text(encoding="utf-8"))


def test_hostile_text_stays_text(tmp_path):
    page = _page(_full(HOSTILE), tmp_path)
    assert not page.misplaced
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "base"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert('1')</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_nothing_is_fetched(tmp_path):
    report = replace(_full(), summary="see http://example.com")
    html = render(report, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link and link.startswith("#") for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize(
    "report",
    [
        Report("title", "summary"),
        Report("title", "summary", [_answer("q1")]),
        Report("title", "summary", [replace(_answer("q1"), prompt="", top=[], opposing=(), tokens=0, loss=0.0)]),
        Report("title", "summary", [_answer("q1")], proof=_proof(["q1"], 1)),
        Report("title", "summary", providers=[Provider("a", 1, -1.0)], facts=[("Model", [])]),
        Report("title", "summary", [replace(_answer("q1"), top=[Row("r", "s", "", 0.0)])]),
    ],
)
def test_any_part_may_be_missing(report, tmp_path):
    page = _page(report, tmp_path)
    assert not page.misplaced
    assert page.open == []


def test_queries_providers_and_facts_are_shown(tmp_path):
    page = _page(_full("words"), tmp_path)
    for expected in ("prompt words", "completion words", "source 2", "1.500 nats a token over 8 tokens", "words 14"):
        assert expected in page.text
    assert "5 other sources" in page.text
    assert "words 15" not in page.text


def test_links_lead_somewhere(tmp_path):
    page = _page(_full(), tmp_path)
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"} <= places


def test_proof_compares_with_the_spread():
    assert _proof(["q1"], 3).holds()
    assert not _proof(["q1"], 3, top=0.0).holds()
    proof = _proof(["q1"], 3)
    assert proof.raises(proof.top) == pytest.approx([0.3] * 3)
    noisy = replace(proof, random=Arm("random", [9] * 3, [[1.0], [1.0], [1.5]]))
    assert not noisy.holds()


def test_proof_says_when_it_fails(tmp_path):
    page = _page(Report("t", "s", proof=_proof(["q1"], 1, top=-0.1)), tmp_path)
    assert "did not find" in page.text


def test_spread_is_shown_for_several_values_only():
    assert with_spread([1.0]) == "1.000"
    assert with_spread([1.0, 2.0, 3.0], signed=True) == "+2.000 ± 1.000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (12.345, "12.3"), (-4900.2, "−4,900"), (0.0123, "0.0123"), (3e-7, "3.00e−07"), (2.5e9, "2.50e+09")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize("values", [[0.0], [1.5, 1.5], [-3.2, 0.01, 7.7], [1e-9, 2e-9], [1e6, 3e6]])
def test_axis_holds_its_values(values):
    axis = Axis.around(values)
    assert axis.low <= min(values)
    assert max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    for value in values:
        assert re.fullmatch(r"-?\d+\.\d+%", axis.at(value))
        assert -1e-6 <= float(axis.at(value)[:-1]) <= 100 + 1e-6


def test_bars_share_a_zero():
    zero, bars = diverging([3.0, -1.0])
    assert zero == "25.000%"
    assert bars == [("25.000%", "75.000%"), ("0.000%", "25.000%")]
    assert diverging([]) == ("0.000%", [])


def test_a_file_system_that_fills_up_keeps_the_page_it_had(tmp_path):
    """The limit on a file's size stands for it: a part is written, the rest is refused."""
    path = render(Report("first", "s"), tmp_path / "report.html")
    kept, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            render(Report("second", "s"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_render_replaces_the_file(tmp_path):
    render(Report("first", "s"), tmp_path / "new" / "report.html")
    path = render(Report("second", "s"), tmp_path / "new" / "report.html")
    assert "second" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
