"""Hostile templates: conversations become text within the limits of their process, or one error names the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqaware.data.chat import ChatRenderer
from seqaware.data.chat_process import ChatProcess
from seqaware.data.templates import Format, Renderer, fields_of
from tests.fuzz import hostile
from tests.fuzz.bounds import corpus, fuzzed, refuses_clearly
from tests.fuzz.test_rows import MESSAGE_LISTS, ROWS
from tests.small_tokenizers import CHATML, byte_level

MARKED = CHATML.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
LOOP = "{% for a in range(99999) %}"
PIECES = [
    *("{{", "}}", "{%", "%}", "{#", "#}", "-%}", "{% raw %}", "{% endfor %}", "{% endif %}", "\0", "\ud800", "\ufeff"),
    *("{% generation %}", "{% endgeneration %}", "{% generation %}{% generation %}", "{% else %}", "{% break %}"),
    *("{% set x = namespace(s='x') %}", "{% set x.s = x.s ~ x.s %}", "{% for a in messages %}", "{% if 1 %}" * 90),
    *("{{ 1 / 0 }}", "{{ 10 ** 400 }}", "{{ 'x' * 10**7 }}", "{{ 'x' * 10**12 }}", "{{ range(10**9) | list }}"),
    *("{{ messages | tojson(indent=10**9) }}", "{{ '%9999999d' % 1 }}", "{{ 'x' | center(10**11) }}", "{{ (" * 3000),
    *("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "{{ m(1) }}", "{% call(a) m() %}{% endcall %}"),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self }}",
        "{{ self._TemplateReference__context }}",
    ),
    *(
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[9].role }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{{ raise_exception(1) }}",
        "{{ raise_exception('x' * 10**7) }}",
        "{{ strftime_now('%') }}",
    ),
    *("{{ strftime_now('%Y' * 9999) }}", "{{ strftime_now(1) }}", "{% include '/etc/passwd' %}", "{% extends 'x' %}"),
    *(
        "{% import 'x' as y %}",
        "{{ lipsum(n=2000) }}",
        "{{ dict(a=joiner()) }}",
        "{{ none.x.y }}",
        "{{ messages.x.y }}",
    ),
    *(
        "{{ message['content'] | truncate(-5) }}",
        "{{ 'a' | indent(10**8) }}",
        "{{ 'a' | wordwrap(0) }}",
        "{{ [] | batch(0) | list }}",
    ),
    *(
        "{{ [] | slice(0) | list }}",
        "{{ 'x' | random }}",
        "{{ messages | map('x') | list }}",
        "{{ 1 | foo }}",
        "{% foo %}",
    ),
    *("{{ 'x'.format(1) }}", "{{ '{0.__class__}'.format(1) }}", "{{ '{:>99999999}'.format(1) }}", "{{ 'a' is foo }}"),
    *("{{ messages | sort | list }}", "{{ messages | groupby('x') | list }}", "{{ namespace(1) }}", "{{ loop.index }}"),
    *(
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% filter upper %}",
        "{% set messages = [] %}",
    ),
    *("{% autoescape true %}", "{% do x %}", "{% trans %}x{% endtrans %}", "{{ bos_token * 9 }}", "{{ tools[0] }}"),
]
ENDLESS = [LOOP * depth + body + "{% endfor %}" * depth for depth, body in ((2, "x"), (9, ""), (30, "{{ a }}"))]
PROMPTS = [
    *("{question}", "{question}{question}", "{", "}", "{}", "{0}", "{question.x}", "{question[0]}", "{question!r}"),
    *(
        "{question:>99999999999}",
        "{question:{question}}",
        "{{{{",
        "{a}" * 3000,
        "{messages}",
        "{choices} {final}",
        "\0{text}",
    ),
]
TALKS: list[Any] = [ROWS[3]["messages"], *MESSAGE_LISTS]


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A chat template with hostile pieces in it, or one that ends late or never."""
    if not draw(st.integers(0, 60)):
        return draw(st.sampled_from(ENDLESS))
    text = draw(st.sampled_from([CHATML, MARKED, "{% for message in messages %}{{ message.content }}{% endfor %}"]))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(hostile.damaged(text, PIECES))
        text = content.decode("utf-8", draw(st.sampled_from(["replace", "surrogateescape"])))
    return text


def render(template: str, talks: list[Any]) -> list[Any]:
    renderer = ChatRenderer(TOKENIZER, chat_template=template, train_on=None)
    rows = [({"messages": talk}, f"rows.jsonl:{number}") for number, talk in enumerate(talks, 1)]
    return [example for row in rows for example in ChatProcess(renderer).examples([row])]


TOKENIZER = byte_level()


@fuzzed("templates")
@given(template=templates(), talk=st.sampled_from(TALKS[:1] * 4 + TALKS))
def test_a_hostile_chat_template_renders_or_is_refused(template: str, talk: Any) -> None:
    refuses_clearly(lambda: render(template, [talk]))


@fuzzed("prompts")
@given(
    prompt=st.one_of(st.sampled_from(PROMPTS), st.text(max_size=20)),
    answer=st.one_of(st.sampled_from(PROMPTS), st.just(" {answer}")),
    columns=st.dictionaries(
        st.sampled_from(["question", "answer", "choices"]), st.sampled_from(["text", "x", ""]), max_size=1
    ),
    row=st.sampled_from(ROWS),
    changes=st.lists(st.tuples(st.sampled_from(["question", "answer", "choices", "text"]), hostile.values), max_size=2),
)
def test_hostile_prompt_templates_render_or_are_refused(
    prompt: str, answer: str, columns: dict[str, str], row: dict[str, Any], changes: list[tuple[str, Any]]
) -> None:
    fields = hostile.mutated(row, changes)
    form = Format(prompt, answer, None, columns)
    refuses_clearly(lambda: Renderer(form).example(fields_of(fields, columns, "rows:1"), "rows:1"))


@pytest.mark.parametrize("path", corpus("templates"), ids=lambda path: path.stem)
def test_templates_that_once_failed(path: Path) -> None:
    assert not refuses_clearly(lambda: render(path.read_text(encoding="utf-8"), TALKS[:1]))
