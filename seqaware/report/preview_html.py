"""A preview of packed rows as one HTML file: no network, no script needed to read it, on a desk and on a phone."""

from __future__ import annotations

import html
from collections.abc import Iterator

from seqaware.masking import escaped
from seqaware.report.preview import Preview, ShownDocument, marks, row_title, shade, visible

_STYLE = """
:root { color-scheme: light dark; --line: #8888; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.6 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: center; font-size: .9rem; }
.scale { display: inline-flex; } .scale i { width: 1.4rem; height: 1rem; }
.fill { height: .4rem; background: var(--soft); } .fill i { display: block; height: 100%; background: #3a7ca5; }
section { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .5rem .75rem; }
header { font-size: .85rem; opacity: .8; overflow-wrap: anywhere; }
.text { font-family: ui-monospace, monospace; font-size: .92rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.text b { color: #111; font-weight: normal; border-bottom: 2px solid #3337; }
.text u { text-decoration: none; opacity: .6; }
sup { font-size: .65rem; opacity: .75; }
"""


def _text(text: str) -> str:
    """Text of any origin as HTML."""
    return html.escape(escaped(text, keep="\n"))


def preview_html(preview: Preview) -> str:
    """The page. Hovering over a token with loss tells its k and weight; marks tell those of every 16th."""
    steps = [preview.largest * (place + 0.5) / 8 for place in range(8)]
    scale = "".join(f'<i style="background:{shade(weight, preview.largest)}"></i>' for weight in steps)
    body = "".join(_rows(preview))
    rest = f"<p>… and {preview.left_out:,} more row(s) in this step.</p>" if preview.left_out else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(preview.title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(preview.title)}</h1><p>{_text(preview.objective)}</p>"
        f'<p class="legend"><span>weight 0 <span class="scale">{scale}</span> {preview.largest:.3g}</span>'
        "<span>underlined and coloured: with loss</span><span>pale: without</span>"
        "<span>raised: position k · weight</span></p>"
        f"{body}{rest}</body></html>\n"
    )


def _rows(preview: Preview) -> Iterator[str]:
    for number, row in enumerate(preview.rows, start=1):
        filled = row.tokens / (preview.capacity or row.tokens + row.padding)
        yield f"<h2>{_text(row_title(number, row, preview.capacity))}</h2>"
        yield f'<div class="fill" title="{filled:.0%} full"><i style="width:{filled:.1%}"></i></div>'
        yield from (_document(document, preview.largest) for document in row.documents)


def _document(document: ShownDocument, largest: float) -> str:
    head = f"{document.name}: {len(document.tokens)} tokens, {document.with_loss} with loss"
    parts = []
    for token, mark in zip(document.tokens, marks(document), strict=True):
        text = _text(visible(token.text))
        if not token.k:
            parts.append(f"<u>{text}</u>")
            continue
        raised = f"<sup>{_text(mark.strip('()'))}</sup>" if mark else ""
        told = f"k = {token.k}, w = {token.weight:.4g}"
        parts.append(f'{raised}<b style="background:{shade(token.weight, largest)}" title="{told}">{text}</b>')
    return f'<section><header>{_text(head)}</header><div class="text">{"".join(parts)}</div></section>'
