"""Conversations through a chat template, and the parts of the text that are the assistant's.

Where the template marks the assistant's text with {% generation %}, those marks decide. Otherwise a turn is what it
adds to the text: everything between the prompt for the turn (with which inference would begin) and the text up to its
end. That holds only if each of these texts begins the next one; a template that rewrites earlier turns is refused.
"""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from seqaware.data.readers import ROW_CHARACTERS
from seqaware.data.templates import Example, Segment, checked_weight
from seqaware.errors import ConfigError, DataError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
_RENDER: Any = render_jinja_template  # its annotation (a string) is not what it returns
CPU_SECONDS = 2.0
"""For one text of one conversation, of which most take a thousandth of a second."""
CPU_SECONDS_PER_TEXT = 0.05
"""On average: what texts take beyond it is missing from the limit of those that follow."""
_TEXT_CHARACTERS = 2 * ROW_CHARACTERS
_LONGEST_REASON = 300
_DO = "write format.chat_template, or format.prompt_template"
# What the code of a template may raise, beside jinja2's own errors.
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # recursion without end, too
    SyntaxError,  # more nested loops than Python compiles
    TypeError,
    ValueError,
)


class ChatRenderer:
    """Messages to examples. A template may not end, so only a `ChatProcess` calls `example`.

    Args:
        chat_template: Jinja template; None: the tokenizer's.
        train_on: `all`: every token carries loss, not the assistant's alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        train_on: Literal["completion", "all"] | None,
    ) -> None:
        self._special_tokens = tokenizer.special_tokens_map
        try:
            self._template = tokenizer.get_chat_template(chat_template)
        except ValueError as error:
            raise ConfigError("rows with messages need a chat template, and the tokenizer has none", do=_DO) from error
        if not isinstance(self._template, str):
            raise ConfigError("the tokenizer's chat template is no text", got=repr(self._template)[:80], do=_DO)
        self._marked = _GENERATION_TAG.search(self._template) is not None
        self._whole = train_on == "all"
        self._cpu_seconds = CPU_SECONDS
        specials = {str(token) for token in tokenizer.all_special_tokens}
        specials |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.specials = tuple(specials)

    def example(self, fields: Mapping[str, Any], name: str) -> Example:
        """The example of the record `name`.

        Raises:
            DataError: the messages are not such, or the template cannot tell the turns apart.
        """
        messages = _checked_messages(fields["messages"], name)
        weights = [
            checked_weight(message.get("weight", 1.0), name) for message in messages if message["role"] == "assistant"
        ]
        if fields.get("weight") is not None:
            factor = checked_weight(fields["weight"], name)
            weights = [weight * factor for weight in weights]
        text, marked = self._render(messages, name, prompt=False)
        spans = marked if self._marked else self._turns(messages, text, name)
        if len(spans) != len(weights):
            got = f"{len(spans)} for {len(weights)} turns"
            raise DataError(f"{name}: the chat template marks another number of turns than there are", got=got)
        segments: list[Segment] = []
        at = 0
        for (begin, end), weight in zip(spans, weights, strict=True):
            segments.append(Segment(text[at:begin], self._whole))
            segments.append(Segment(text[begin:end], weight > 0, True, weight))
            at = end
        segments.append(Segment(text[at:], self._whole))
        # A template that closes its turns with a special token has said where the answer ends: no EOS on top.
        closed = text.rstrip().endswith(self.specials)
        ends = messages[-1]["role"] == "assistant" and not closed
        return Example(tuple(segment for segment in segments if segment.text), "none", ends)

    def _turns(self, messages: Sequence[dict[str, Any]], text: str, name: str) -> list[Span]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:index], name, prompt=True)
            after, _ = self._render(messages[: index + 1], name, prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{name}: the chat template rewrites earlier turns, so the assistant's part cannot be told apart",
                    got=f"message {index + 1} of {len(messages)}",
                    do="mark the assistant's text with {% generation %} in format.chat_template, or use single turns",
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return spans

    def _end_of_turn(self, text: str, begin: int) -> int:
        """White space behind the token that closes the turn is the template's, not the assistant's."""
        said = text[begin:].rstrip()
        return begin + len(said) if said.endswith(self.specials) else len(text)

    def _render(self, messages: Sequence[dict[str, Any]], name: str, *, prompt: bool) -> tuple[str, list[Span]]:
        if not messages:
            return "", []
        bare = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            with self._limited_time():
                texts, marks = _RENDER(
                    conversations=[bare],
                    chat_template=self._template,
                    return_assistant_tokens_mask=self._marked,
                    add_generation_prompt=prompt,
                    **self._special_tokens,
                )
                text = str(texts[0])
                text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: the chat template writes a lone surrogate") from error
        except _FAILURES as error:
            reason = str(error)[:_LONGEST_REASON] or type(error).__name__
            raise DataError(f"{name}: the chat template refuses the messages", got=reason) from None
        if len(text) > _TEXT_CHARACTERS:
            what = f"{name}: the chat template writes more than {_TEXT_CHARACTERS // 2**20} Mi characters"
            raise DataError(what, got=f"{len(text):,}")
        return text, [(begin, end) for begin, end in marks[0]] if self._marked else []

    @contextmanager
    def _limited_time(self) -> Iterator[None]:
        """Inside, the kernel ends this process once its CPU time is used up: see chat_process.py."""
        signal.setitimer(signal.ITIMER_PROF, min(CPU_SECONDS, self._cpu_seconds + CPU_SECONDS_PER_TEXT))
        try:
            yield
        finally:
            self._cpu_seconds, _ = signal.setitimer(signal.ITIMER_PROF, 0.0)


@dataclass(frozen=True)
class InferenceTokenizer:
    """What inference needs in order to talk as a run was trained.

    Attributes:
        tokenizer: its chat template is the one that was used. answer_ends: ids of the tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    answer_ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> InferenceTokenizer:
        """Of a run's tokenizer, which stays as it is.

        Args:
            chat_template: `format.chat_template`; None: the tokenizer's own.
        """
        copied = copy.deepcopy(tokenizer)
        if chat_template is not None:
            used, own = tokenizer.get_chat_template(chat_template), tokenizer.chat_template
            # Of several templates, which have names, the one for plain conversations is replaced.
            copied.chat_template = {**own, "default": used} if isinstance(own, dict) else used
        return cls(copied, tuple(_answer_ends(copied)))


def _answer_ends(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """EOS, and the token with which the chat template closes the last assistant turn."""
    from seqaware.data.chat_process import ChatProcess

    yield int(tokenizer.eos_token_id)
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        renderer = ChatRenderer(tokenizer, chat_template=None, train_on=None)
        (example,) = ChatProcess(renderer).examples([({"messages": conversation}, "a conversation")])
    except (ConfigError, DataError):
        return  # no template, or one for other conversations
    behind = "".join(segment.text for segment in example.segments).rpartition("answer")[2].lstrip()
    closing = [token for token in renderer.specials if behind.startswith(token)]
    if closing and (longest := max(closing, key=len)) != tokenizer.eos_token:
        closing_id: Any = tokenizer.convert_tokens_to_ids(longest)
        yield closing_id


def _checked_messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{name}: messages must be a list of messages", got=repr(value)[:80])
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{name}: a message needs role and content", got=repr(message)[:80])
        if not isinstance(message["content"], str):
            raise DataError(f"{name}: a message's content must be text", got=repr(message["content"])[:80])
    # A dataset with a weight on some messages has it as null on the others.
    return [{key: part for key, part in message.items() if part is not None} for message in value]
