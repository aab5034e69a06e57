"""The page of a report: one file, no script, nothing loaded from elsewhere."""

from typing import Any

from seqaware.masking import escaped


def as_shown(value: Any) -> Any:
    """A template's value as a page may show it; jinja2 escapes it for HTML afterwards."""
    return escaped(value, keep="\n\t") if isinstance(value, str) else value


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1c1e21; --soft: #5c6370; --line: #dfe2e6; --back: #fff; --box: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.finding { font-size: 1.05rem; }
.caution { background: #fff6e0; border-left: 4px solid #e69f00; padding: .5rem .8rem; margin: .5rem 0; }
.alert { background: #fdecea; border-left: 4px solid #d55e00; padding: .5rem .8rem; margin: .5rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: 26rem; }
th { font-weight: 600; background: var(--box); }
@media (max-width: 40rem) { body { font-size: 15px; padding: 1rem .75rem 3rem; } th, td { padding: .25rem .45rem; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% for text in findings %}<p class="finding">{{ text }}</p>
{% endfor %}
{% for text in cautions %}<p class="caution">{{ text }}</p>
{% endfor %}
{% for text in alerts %}<p class="alert">{{ text }}</p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.text %}<p>{{ text }}</p>
{% endfor %}
{% if section.rows %}
<div class="wide"><table>
<thead><tr>{% for cell in section.head %}<th{% if section.prose %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}<tr>{% for cell in row %}<td{% if section.prose %} class="text"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if section.figures %}
<div class="plots">
{% for figure in section.figures %}<figure>
<img alt="{{ figure.caption }}" src="data:image/svg+xml;base64,{{ figure.svg }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% endfor %}
<p class="soft">{{ foot }}</p>
</body>
</html>
"""
