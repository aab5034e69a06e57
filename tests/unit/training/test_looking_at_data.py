"""`seqaware weights` and `seqaware preview`, against the rows tokenised by hand and the oracle's weights."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from seqaware.config.loading import load_config
from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.report.preview import Preview, ShownDocument, ShownRow, ShownToken, marks, show_preview, visible
from seqaware.report.preview_html import preview_html
from seqaware.report.weight_text import draw_weights, show_weights, weight_lines
from seqaware.tools.inspect_rows import training_rows
from seqaware.tools.preview_rows import PreviewRequest, preview
from seqaware.tools.weight_distribution import WeightsView, weights_view
from tests import tiny
from tests.oracles import question_rows, suffix_weights

GAMMA = 0.9
ANSWERS = (1, 40, 3, 90, 7)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("looking"), answers=ANSWERS)


def config_of(workshop: tiny.Workshop, **changes: Any) -> Config:
    return load_config(workshop.write("looking", workshop.config(**{"training__sft__gamma": GAMMA, **changes})))


def view_of(config: Config) -> WeightsView:
    return weights_view(config, training_rows(config), documents=None, find_lost=True)


def lengths_with_loss(workshop: tiny.Workshop) -> list[int]:
    return [
        sum(each.supervised) for each in question_rows(workshop.rows, AutoTokenizer.from_pretrained(workshop.model))
    ]


def test_the_view_sums_the_weights_of_the_oracle(workshop: tiny.Workshop) -> None:
    view = view_of(config_of(workshop))
    weights = [suffix_weights(length, GAMMA) for length in lengths_with_loss(workshop)]
    flat = [w for each in weights for w in each]
    assert (view.documents, view.tokens, view.lost) == (len(ANSWERS), len(flat), 0.0)
    assert view.weight_sum == pytest.approx(sum(flat), rel=1e-6)
    assert view.effective_tokens == pytest.approx(sum(flat) ** 2 / sum(w * w for w in flat), rel=1e-6)
    late = sum(w for each in weights for w in each[64:]) / sum(flat)
    assert next(band.weight for band in view.by_position if band.first == 65) == pytest.approx(late, rel=1e-6)
    for bands in (view.by_position, view.by_length):
        assert sum(band.weight for band in bands) == pytest.approx(1.0) == sum(band.tokens for band in bands)
    assert sum(band.documents or 0 for band in view.by_length) == pytest.approx(1.0)
    longest = max(lengths_with_loss(workshop))
    assert view.curve[0] == (1, 1.0)
    assert view.curve[-1] == (longest, pytest.approx(suffix_weights(longest, GAMMA)[-1], rel=1e-6))


@pytest.mark.parametrize(("normalize_by", "per"), [("tokens", 1.0), ("weight", None), ("sequences", len(ANSWERS))])
def test_the_gradient_grows_with_the_weights_as_the_normaliser_has_it(
    workshop: tiny.Workshop, normalize_by: str, per: float | None
) -> None:
    view = view_of(config_of(workshop, training__sft__normalize_by=normalize_by))
    lengths = lengths_with_loss(workshop)
    mean = sum(sum(suffix_weights(length, GAMMA)) for length in lengths) / sum(lengths)
    expected = {"tokens": mean, "weight": 1.0, "sequences": mean * sum(lengths) / len(lengths)}[normalize_by]
    assert view.factor_aligned == pytest.approx(expected, rel=1e-6)
    assert view.factor_independent / view.factor_aligned == pytest.approx(view.rms / view.mean)


def test_what_truncation_loses_is_found_by_tokenising_again(workshop: tiny.Workshop) -> None:
    config = config_of(workshop, training__parameters__max_seq_length=32)
    view = view_of(config)
    documents = question_rows(workshop.rows, AutoTokenizer.from_pretrained(workshop.model))
    whole = sum(sum(suffix_weights(sum(each.supervised), GAMMA)) for each in documents)
    assert view.overlong == sum(len(each.tokens) > 32 for each in documents) > 0
    assert view.lost == pytest.approx(1 - view.weight_sum / whole, rel=1e-6)
    assert "of the loss weight is lost" in "\n".join(weight_lines(view, config))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_weights_fit_a_narrow_terminal_without_colours(workshop: tiny.Workshop, encoding: str) -> None:
    config = config_of(workshop)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    show_weights(view_of(config), list(weight_lines(view_of(config), config)), console=Console(file=out, width=60))
    out.seek(0)
    text = out.read()
    assert "\x1b" not in text and "effective" in text
    assert any(mark in text for mark in ("█", "#"))
    assert max(map(len, text.splitlines())) <= 60


def test_a_picture_is_drawn(workshop: tiny.Workshop, tmp_path: Path) -> None:
    draw_weights(view_of(config_of(workshop)), tmp_path / "weights.png", title="γ")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def looked_at(workshop: tiny.Workshop, request: PreviewRequest | None = None, **changes: Any) -> Preview:
    config = config_of(workshop, **changes)
    return preview(config, training_rows(config), request or PreviewRequest(rows=9))


@pytest.mark.parametrize("packed", [True, False])
def test_a_preview_holds_every_token_with_its_position_and_weight(workshop: tiny.Workshop, packed: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    found = looked_at(workshop, packing__enabled=packed, training__schedule__micro_batch_tokens=256)
    shown = {document.name: document.tokens for row in found.rows for document in row.documents}
    documents = question_rows(workshop.rows, tokenizer)
    assert len(shown) == len(documents) and found.left_out == 0
    for number, expected in enumerate(documents):
        tokens = shown[f"rows.jsonl:{number + 1}"]
        assert [token.text for token in tokens] == [tokenizer.decode([each]) for each in expected.tokens]
        assert [token.k > 0 for token in tokens] == list(expected.supervised)
        with_loss = [token for token in tokens if token.k]
        assert [token.k for token in with_loss] == list(range(1, len(with_loss) + 1))
        weights = suffix_weights(len(with_loss), GAMMA)
        assert [token.weight for token in with_loss] == pytest.approx(weights, rel=1e-6)
    assert (sum(row.padding for row in found.rows) == 0) == packed


def test_a_config_for_gpus_that_share_sequences_is_looked_at_without_them(workshop: tiny.Workshop) -> None:
    found = looked_at(workshop, parallel__sequence=2, training__optimizer__type="fused_adam", model__dtype="bfloat16")
    assert found.title == f"step 1: {len(ANSWERS)} documents in 2 row(s) for 2 rank(s) in groups of 2 that share each"


def test_a_preview_is_read_without_colours_at_60_columns(workshop: tiny.Workshop) -> None:
    out = io.StringIO()
    found = looked_at(workshop, PreviewRequest(rows=1, ranks=2))
    show_preview(found, console=Console(file=out, width=60, color_system=None, force_terminal=True), documents=2)
    text = out.getvalue()
    assert "\x1b" not in text and "⟦" in text and "(1·1)" in text and "… and" in text
    assert max(map(len, text.splitlines())) <= 60


def test_a_terminal_without_unicode_shows_what_it_can(workshop: tiny.Workshop) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    document = ShownDocument("rows.jsonl:1", (ShownToken("né", 0, 0.0), ShownToken("e\n", 1, 1.0)))
    found = Preview("step 1", "γ = 0.9", 8, (ShownRow(0, (document,), 6),), 0)
    show_preview(found, console=Console(file=out, width=60), documents=1)
    out.seek(0)
    assert "n?[(1-1)e\\" in out.read()


class Checker(HTMLParser):
    """Every tag is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_needs_nothing_else_and_holds_the_text(workshop: tiny.Workshop) -> None:
    found = looked_at(workshop)
    page = preview_html(found)
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not re.search(r"https?://|url\(|@import", page)
    assert 'name="viewport"' in page
    assert all(visible(t.text) in checker.words for row in found.rows for d in row.documents for t in d.tokens)


def test_positions_are_written_where_turns_begin_and_every_sixteenth_token() -> None:
    counts = [0, 0, *range(1, 21), 0, *range(1, 3), *range(1, 4), 0, 4]
    document = ShownDocument("a", tuple(ShownToken("t", k, 1.0) for k in counts))
    marked = [place for place, mark in enumerate(marks(document)) if mark]
    assert marked == [2, 18, 23, 25, 29]


def test_what_would_move_the_cursor_is_shown_instead() -> None:
    assert visible("a\x1b[2Jb\r\n") == "a\\x1b[2Jb\\r⏎\n"


def test_a_step_that_the_run_does_not_have_is_refused(workshop: tiny.Workshop) -> None:
    with pytest.raises(ConfigError, match="no such step"):
        looked_at(workshop, PreviewRequest(step=4))
