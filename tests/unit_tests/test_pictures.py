import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from langchain_latentmas import LatentService
from langchain_latentmas.cli import app
from langchain_latentmas.errors import InvalidRequest, MissingExtra
from langchain_latentmas.evaluation.cloud import Cloud, coverage, overlap
from langchain_latentmas.evaluation.lens_page import lens_page
from langchain_latentmas.evaluation.pictures import check_path, draw_bars, draw_bench, draw_steps, draw_thoughts
from langchain_latentmas.evaluation.run import Evaluation
from langchain_latentmas.evaluation.steps import Point
from langchain_latentmas.evaluation.task import Relay

from .test_worth import audit, edge

SUMMARY: dict[str, Any] = {
    "task": "relay",
    "model": {"name": "bundled"},
    "n": 100,
    "rows": [
        {"arrangement": "single", "mode": "single", "accuracy": 67, "output_tokens": 55, "seconds": 2.3},
        {"arrangement": "sequential", "mode": "text", "accuracy": 71, "output_tokens": 163, "seconds": 9.51},
        {"arrangement": "sequential", "mode": "latent", "accuracy": 89, "output_tokens": 9, "seconds": 4.24},
    ],
    "comparisons": {"sequential": {"points": 18, "low": 9, "high": 27, "output_tokens": 18.1, "seconds": 2.24}},
}
CURVES = {"sequential": [Point(0, 0, 0, 4), Point(8, 40, 31, 50), Point(24, 89, 81, 94)]}


def cloud() -> Cloud:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 64))  # noise lies off their plane
    return Cloud.of(embeddings, [*range(40), 0, 0, 1], embeddings[:40].repeat(3, 0) + 0.01)


def words(path: Path) -> str:
    """What an SVG says; matplotlib draws letters as shapes, and leaves each text in a comment."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_picture_is_drawn_and_says_what_it_shows(tmp_path: Path, suffix: str) -> None:
    draw = {
        "audit": lambda path: audit(edge(intact=38, swapped=2, cut=2), edge("b->c", intact=38, swapped=9, cut=9)).plot(
            path
        ),
        "steps": lambda path: draw_steps(CURVES, path, levels={"text": 71}, about="relay"),
        "bars": lambda path: draw_bars(SUMMARY, path),
        "thoughts": lambda path: draw_thoughts(cloud(), path, about="relay"),
    }
    said = {
        "audit": [
            "intact",
            "swapped",
            "95 %",
            "right answers, % (relay, 40 questions; whiskers: 95 % Wilson interval)",
        ],
        "steps": ["latent steps of each thinker", "right answers, %", "sequential", "text"],
        "bars": [
            "output tokens per question",
            "seconds for 100 questions",
            "18× less",
            "2.2× less",
            "latent 89 % right",
        ],
        "thoughts": ["120 thoughts", "40 tokens that text agents said", "coverage 100 % (noise"],
    }
    for name, function in draw.items():
        path = tmp_path / "new" / f"{name}{suffix}"
        function(path)
        first = path.read_bytes()
        assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
        assert len(first) > 5000
        if suffix == ".svg":
            for phrase in said[name]:
                assert phrase in words(path)
            function(path)
            assert path.read_bytes() == first  # the same figures give the same file


def test_a_picture_of_steps_shows_what_text_reaches(
    bundled: LatentService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    picture = tmp_path / "steps.svg"
    few = ["--n", "4", "--at", "2", "--arrangements", "sequential", "--model", "bundled"]
    shown = CliRunner().invoke(app, ["picture", "steps", str(picture), *few])
    assert shown.exit_code == 0, shown.output
    reached = [
        Evaluation(bundled, Relay(), modes=[mode], arrangements=["sequential"], n=4, steps=2).run().rows[0].accuracy
        for mode in ("latent", "text")
    ]
    rows = [line.split()[:2] for line in shown.stdout.splitlines()]
    assert [row for row in rows if row[:1] in (["2"], ["text"])] == [
        [name, f"{accuracy:.1f}"] for name, accuracy in zip(("2", "text"), reached, strict=True)
    ]
    assert "sequential, text" in words(picture)


@pytest.mark.parametrize("name", ["audit.pdf", "audit", "audit.png.txt"])
def test_other_files_than_pictures_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\.png or \.svg"):
        check_path(name)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"pip install -e .*viz"):
        check_path("audit.png")


def test_bars_need_text_and_latent_of_one_arrangement(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="both as text and latent"):
        draw_bars({**SUMMARY, "rows": SUMMARY["rows"][:2]}, tmp_path / "bars.svg")


def test_bars_compare_no_seconds_that_the_evaluation_does_not(tmp_path: Path) -> None:
    compared = {"sequential": {**SUMMARY["comparisons"]["sequential"], "seconds": None}}
    draw_bars({**SUMMARY, "comparisons": compared}, tmp_path / "bars.svg")
    assert words(tmp_path / "bars.svg").count("× less") == 1


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {**SUMMARY, "model": "bundled"},
        {**SUMMARY, "rows": [{"arrangement": "sequential", "mode": "text"}]},
        {**SUMMARY, "rows": [{**SUMMARY["rows"][1], "seconds": None}]},
        {**SUMMARY, "rows": 3},
        {**SUMMARY, "comparisons": {}},
    ],
    ids=str,
)
def test_bars_of_another_document_are_refused(tmp_path: Path, document: Any) -> None:
    with pytest.raises(InvalidRequest, match="not what `latentmas eval"):
        draw_bars(document, tmp_path / "bars.svg")


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for path in (tmp_path / "file" / "a.svg", tmp_path / "folder.svg"):
        with pytest.raises(InvalidRequest, match="cannot be written"):
            check_path(path)
    check_path(tmp_path / "new" / "a.svg")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "b.svg").write_text("as it was")
    check_path(tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == "as it was"


def test_a_bench_draws_every_length_and_refuses_to_draw_nothing(tmp_path: Path) -> None:
    lengths = [128, 256, 512, 1024, 2048, 4096]
    rows = [
        {"what": "think", "rows": n, "positions": length, "ms": 1.0, "full_lm_ms": 2.0, "floor_ms": 0.5}
        for length in lengths
        for n in (1, 2)
    ]
    about = {"machine": {"device": "cpu", "processor": "CPU"}, "model": {"name": "m", "dtype": "float32"}}
    draw_bench({**about, "bandwidth_gb_s": 10.0, "rows": rows}, tmp_path / "bench.svg")
    for length in lengths:
        assert f"{length:,} positions" in words(tmp_path / "bench.svg")
    with pytest.raises(InvalidRequest, match="nothing to draw"):
        draw_bench({**about, "bandwidth_gb_s": 10.0, "rows": []}, tmp_path / "bench.svg")


def test_a_cloud_tells_thoughts_from_noise() -> None:
    ours = cloud()
    assert ours.coverage == 1
    assert ours.noise_coverage < 0.5
    assert ours.overlap > ours.noise_overlap
    assert ours.vocabulary.shape == (200, 2)
    assert ours.explained[0] >= ours.explained[1] > 0


def test_a_cloud_needs_tokens_and_thoughts() -> None:
    embeddings = np.eye(8)
    with pytest.raises(InvalidRequest, match="ask more questions"):
        Cloud.of(embeddings, [1, 2, 3, 4, 5, 5], embeddings)
    with pytest.raises(InvalidRequest, match="ask more questions"):
        Cloud.of(embeddings, list(range(8)), embeddings[:0])


points = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=7, max_size=30).map(np.array)


@given(points)
def test_what_covers_itself_overlaps_itself(ones: Any) -> None:
    assert coverage(ones, ones) == 1
    assert overlap(ones, ones) == pytest.approx(1)


@given(points, points)
def test_far_apart_is_neither_covered_nor_overlapping(ones: Any, others: Any) -> None:
    away = others + 1000
    assert coverage(ones, away) == 0
    assert overlap(ones, away) == 0
    assert 0 <= overlap(ones, others) <= 1 + 1e-9
    assert overlap(ones, others) == pytest.approx(overlap(others, ones))


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\" onmouseover='x' & \x1b[31m"


def test_nothing_of_a_model_becomes_markup() -> None:
    html = lens_page(EVIL, {EVIL: [[(EVIL, 0.9), (EVIL, 0.1)]]}, EVIL, about=EVIL, texts={EVIL: EVIL})
    page = Page(html)
    allowed = "html head meta title style body h1 p b div table thead tbody tr th td code small".split()
    assert {tag for tag, _ in page.tags} <= set(allowed)
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags for name in attrs)
    assert "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>") == 9
    assert "http" not in html.replace("http-equiv", "")


@given(st.text(max_size=30), st.lists(st.tuples(st.text(max_size=5), st.floats(0, 1)), min_size=1, max_size=3))
def test_any_text_leaves_the_page_whole(text: str, tokens: list[tuple[str, float]]) -> None:
    page = Page(lens_page(text, {"a": [tokens, tokens], "b": [tokens]}, text, about=text))
    plain = Page(
        lens_page("q", {"a": [[("t", p) for _, p in tokens]] * 2, "b": [[("t", p) for _, p in tokens]]}, "", about="")
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]


def test_a_page_has_a_row_for_each_step_and_a_column_for_each_agent() -> None:
    lens = [[("12", 0.9), ("14", 0.1)], [(" ", 0.5), ("\n", 0.2)]]
    page = Page(lens_page("What?", {"planner": lens, "critic": lens[:1]}, "12", about="bundled"))
    assert [tag for tag, _ in page.tags].count("tr") == 3
    assert [tag for tag, _ in page.tags].count("th") == 3
    for shown in ("planner", "critic", "12", "90", "␣", "⏎"):
        assert shown in page.text
    json.dumps(page.text)
