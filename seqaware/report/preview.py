"""Packed rows as a person reads them, in a terminal. `preview_html` makes a page of the same.

A token that carries loss stands between ⟦ and ⟧, and its weight is a colour. Every few tokens its position k and weight
are written out, so that nothing is lost where there are no colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from seqaware.masking import escaped

# From pale to strong, dark text on all of them; the last of a scale is the largest weight that is shown.
_SHADES = ("#e8f1fa", "#cfe3f3", "#a9d0e8", "#7fbbdc", "#8fd18f", "#c5d86d", "#f2d13c", "#f5a742")
_TOKENS_BETWEEN_MARKS = 16
_OPEN, _CLOSE, _NEWLINE = "⟦", "⟧", "⏎"
_PLAIN = str.maketrans({_OPEN: "[", _CLOSE: "]", _NEWLINE: "\\", "·": "-", "…": ".", "─": "-", "γ": "g", "▁": "_"})


@dataclass(frozen=True)
class ShownToken:
    """k: position of the token among those that count, 0 where it carries no loss; weight: w."""

    text: str
    k: int
    weight: float


@dataclass(frozen=True)
class ShownDocument:
    """name: where it lies, for a person."""

    name: str
    tokens: tuple[ShownToken, ...]

    @property
    def with_loss(self) -> int:
        """Tokens that carry loss."""
        return sum(token.k > 0 for token in self.tokens)


@dataclass(frozen=True)
class ShownRow:
    """padding: places at the end without a document."""

    rank: int
    documents: tuple[ShownDocument, ...]
    padding: int

    @property
    def tokens(self) -> int:
        """Of all its documents."""
        return sum(len(document.tokens) for document in self.documents)


@dataclass(frozen=True)
class Preview:
    """capacity: tokens that a row may hold, None where rows hold one document. left_out: rows that are not shown."""

    title: str
    objective: str
    capacity: int | None
    rows: tuple[ShownRow, ...]
    left_out: int

    @property
    def largest(self) -> float:
        """The largest weight that is shown."""
        return max((t.weight for row in self.rows for d in row.documents for t in d.tokens), default=0.0)


def shade(weight: float, largest: float) -> str:
    """The colour of a weight, as #rrggbb."""
    share = weight / largest if largest else 0.0
    return _SHADES[min(len(_SHADES) - 1, int(share * len(_SHADES)))]


def row_title(number: int, row: ShownRow, capacity: int | None) -> str:
    """`row 1 (rank 0): 12 document(s), 1,020 of 1,024 tokens`."""
    of = f" of {capacity:,}" if capacity else ""
    padding = f", {row.padding:,} of padding" if row.padding else ""
    return f"row {number} (rank {row.rank}): {len(row.documents)} document(s), {row.tokens:,}{of} tokens{padding}"


def show_preview(preview: Preview, *, console: Console, documents: int) -> None:
    """Print the rows.

    Args:
        documents: show so many of a row.
    """
    plain = not console.encoding.lower().startswith("utf")

    def say(text: Text | str) -> None:
        text = text if isinstance(text, Text) else Text(escaped(text))
        if plain:
            # As many characters as before: the colours go by their places.
            text.plain = text.plain.translate(_PLAIN).encode(console.encoding, "replace").decode(console.encoding)
        console.print(text, overflow="fold")

    say(preview.title)
    say(preview.objective)
    say(_legend(preview.largest))
    for number, row in enumerate(preview.rows, start=1):
        say("")
        say(Text(row_title(number, row, preview.capacity), style="bold"))
        for document in row.documents[:documents]:
            say(_border(document, console.width))
            say(document_text(document, preview.largest))
        if len(row.documents) > documents:
            say(f"… and {len(row.documents) - documents} more documents in this row")
    if preview.left_out:
        say("")
        say(f"… and {preview.left_out:,} more row(s) in this step")


def _legend(largest: float) -> Text:
    legend = Text(f"{_OPEN}with loss{_CLOSE} (k·w: position and weight), the rest without; weight 0 ")
    for place, colour in enumerate(_SHADES, start=1):
        legend.append(" ▁▂▃▄▅▆▇█"[place], style=f"black on {colour}")
    return legend.append(f" {largest:.3g}")


def _border(document: ShownDocument, width: int) -> Text:
    name = escaped(document.name)
    line = f"── {name}: {len(document.tokens)} tokens, {document.with_loss} with loss "
    return Text(line + "─" * max(0, min(width, 100) - len(line)), style="dim")


def document_text(document: ShownDocument, largest: float) -> Text:
    """The tokens of a document with their colours, brackets and marks."""
    text, inside = Text(), False
    for token, mark in zip(document.tokens, marks(document), strict=True):
        has_loss = token.k > 0
        if has_loss != inside:
            text.append(_OPEN if has_loss else _CLOSE, style="bold")
            inside = has_loss
        if mark:
            text.append(mark, style="italic dim")
        style = f"black on {shade(token.weight, largest)}" if has_loss else "dim"
        text.append(visible(token.text), style=style)
    return text.append(_CLOSE, style="bold") if inside else text


def marks(document: ShownDocument) -> Iterator[str]:
    """`(5·4.71)` where a run of tokens with loss begins, where k begins anew, and every so many after; else nothing."""
    left = 0
    for token in document.tokens:
        if token.k == 0:
            left = 0
        if token.k == 0 or (left > 0 and token.k > 1):
            left -= 1
            yield ""
        else:
            left = _TOKENS_BETWEEN_MARKS - 1
            yield f"({token.k}·{token.weight:.3g})"


def visible(text: str) -> str:
    """A line's end is shown; what would control a terminal is written out."""
    return escaped(text.replace("\n", _NEWLINE + "\n"), keep="\n")
