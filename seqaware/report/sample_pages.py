"""The samples of one prompt as a picture, and as one page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seqaware.report.page_template import as_shown

_BLUE, _ORANGE = "#0072B2", "#D55E00"
_TEXTS = 64

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ found.model }}: {{ found.samples }} samples</title>
<style>
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; }
pre { background: #f5f6f8; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 2rem 1rem 0; display: inline-table; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #dfe2e6; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ found.samples }} samples of {{ found.model }}</h1>
<pre>{{ found.prompt }}</pre>
<p>Temperature {{ found.temperature }}, top p {{ found.top_p }}, seed {{ found.seed }}; {{ found.tokens }} tokens,
{{ found.distinct_texts }} different texts, {{ found.at_the_limit }} of the samples cut at
{{ found.max_new_tokens }} tokens; mean entropy {{ "%.3f"|format(found.mean_entropy) }} nats a token, mean
probability of the taken token {{ "%.3f"|format(found.mean_probability) }}. Entropy and probability are the model's own,
before temperature and top p.</p>
<img alt="Entropy and probability by step, the first token's distribution, token frequencies"
 src="data:image/png;base64,{{ image }}">
<table><tr><th>first token</th><th>probability</th></tr>
{% for row in found.first_token %}<tr><td>{{ row.token|quoted }}</td><td>{{ "%.4f"|format(row.probability) }}</td></tr>
{% endfor %}</table>
<table><tr><th>token</th><th>count</th><th>share</th></tr>
{% for row in found.token_frequencies %}<tr><td>{{ row.token|quoted }}</td><td>{{ row.count }}</td>
<td>{{ "%.3f"|format(row.share) }}</td></tr>
{% endfor %}</table>
<table><tr><th>text</th><th>log p</th></tr>
{% for row in texts %}<tr><td>{{ row.text }}</td><td>{{ "%.2f"|format(row.log_probability) }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Four panels: entropy and probability by step, the first token's distribution, the commonest tokens."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 2)
    _by_step(above[0], found["steps"], "entropy", label="entropy, nats")
    _by_step(above[1], found["steps"], "probability", label="probability of the taken token", most=1.0)
    _bars(below[0], found["first_token"], "probability", title="the first token's distribution")
    _bars(below[1], found["token_frequencies"], "share", title="share of all tokens")
    figure.savefig(path, dpi=130)


def page(found: Mapping[str, Any], image: Path) -> str:
    """HTML that holds the picture and the texts; what the model wrote is shown, never run."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=as_shown)
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)
    shown = sorted(found["texts"], key=lambda each: -float(each["log_probability"]))[:_TEXTS]
    coded = base64.b64encode(image.read_bytes()).decode()
    return environment.from_string(_PAGE).render(found=found, image=coded, texts=shown)


def _by_step(
    axes: Axes, steps: Sequence[Mapping[str, float]], name: str, *, label: str, most: float = math.inf
) -> None:
    at = [each["step"] for each in steps]
    mean = [each[name] for each in steps]
    low = [max(0.0, each[name] - each[f"{name}_sd"]) for each in steps]
    high = [min(most, each[name] + each[f"{name}_sd"]) for each in steps]
    axes.fill_between(at, low, high, color=_BLUE, alpha=0.2, linewidth=0)
    axes.plot(at, mean, color=_BLUE)
    axes.set(xlabel="step", ylabel=label, ylim=(0, None))
    axes.set_title("mean over the samples, and one standard deviation to either side", fontsize=10)
    axes.grid(alpha=0.25)


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, *, title: str) -> None:
    shown = list(rows)[:12][::-1]
    axes.barh(range(len(shown)), [row[name] for row in shown], color=_ORANGE)
    # A dollar sign would begin mathematics.
    axes.set_yticks(range(len(shown)), [repr(row["token"]).replace("$", r"\$") for row in shown], fontsize=8)
    axes.set_title(title, fontsize=10)
