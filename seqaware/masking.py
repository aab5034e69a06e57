"""Text of any origin, made safe to show and to keep: no passwords or tokens, no control characters.

Messages repeat what users, files and libraries wrote, and end on terminals, in pages and in logs that others read.
"""

from __future__ import annotations

import re

_MASK = "***"
# user:password@ or token@ of an address, up to its last @; also of an address that a Path has taken a slash from.
# A slash may stand in a password (user:pa/ss@), but user:8080/ is a host and its port.
_USER = re.compile(r"(?:(?<=://)|(?<=\w\w:/)(?!/))(?:[^/\s@:]{0,500}:(?!\d{0,5}/)[^\s'\"]{1,2000}|[^/\s]{1,2000})(?=@)")
# Parameters of an address, those of signed ones too.
_NAMES = r"(?:access[_-]?|auth[_-]?|api[_-]?|x-amz-)?(?:token|key|password|passwd|secret|sig|signature|credential)"
_PARAMETER = re.compile(rf"(?<=[?&;])(x-amz-security-token|awsaccesskeyid|{_NAMES})=[^&;#\s'\"]+", re.IGNORECASE)
# Tokens that are known by their form: of Hugging Face, GitHub, GitLab, W&B, Slack, OpenAI and its like, and AWS keys.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|wandb_v1_\w{20,}"
    r"|xox[abprs]-[\w-]{10,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})"
)
# A W&B key looks like a git revision. One in a path (snapshots/REVISION/) is a revision.
_HEX = re.compile(r"(?<![\w/.@-])[0-9a-f]{40}(?![\w/.@-])")
# The same names outside of an address, as in `--set token=…` and `password: …`. eos_token=… and its like are no
# secrets, and neither are the {fields} of a template or a file named secret. Before a colon a bare `token` is a word of
# a sentence.
_OWNERS = r"(?:hf|hub|hugging_?face(?:_hub)?|wandb|openai|anthropic|github|gitlab|mlflow_tracking)[_-]?"
_SECRET = rf"(?:{_OWNERS})?(?:(?:access|auth|api)[_-]?)?(?:token|password|passwd|secret)|(?:{_OWNERS})?api[_-]?key"
_ASSIGNED = re.compile(rf"(?<![\w-])({_SECRET})=(?!{{)[^\s'\",;&]+", re.IGNORECASE)
_MAPPED = re.compile(
    rf"(?<![\w/-])((?!token\b)(?:{_SECRET})['\"]?:[ \t]*['\"]?)(?![\s'\"{{])[^\s'\",;&]+", re.IGNORECASE
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)

# Control characters; marks that reorder or hide text (bidirectional, zero width); line separators; lone surrogates.
# The joiners of Indic and Persian scripts and of emoji (U+200C, U+200D) stay.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def masked(text: str) -> str:
    """The text with *** in the place of everything in it that looks like a password or a token."""
    for pattern in (_USER, _TOKEN):
        text = pattern.sub(_MASK, text)
    text = _MAPPED.sub(rf"\1{_MASK}", text)
    for pattern in (_PARAMETER, _ASSIGNED):
        text = pattern.sub(rf"\1={_MASK}", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether the text holds an address with a password or token, or a token that is known by its form."""
    return any(pattern.search(text) for pattern in (_USER, _TOKEN)) or (
        "://" in text and _PARAMETER.search(text) is not None
    )


def is_secret(value: str, key: str) -> bool:
    """Whether a value of a mapping is a secret, by its key or by itself.

    Args:
        key: the value's own key. A `revision` is 40 hexadecimal digits as well, and no key of W&B.
    """
    if holds_secret(value):
        return True
    if _SECRET_NAME.fullmatch(key) is not None:
        return value != ""
    return key != "revision" and _HEX.search(value) is not None


def escaped(text: str, *, keep: str = "") -> str:
    """The text with control characters and invisible marks written out (`\\x1b`), for terminals, pages and logs.

    Every text that comes from a user, a file, a model or another process passes through here before it is shown.

    Args:
        keep: characters that stay: a line break, where the text itself has several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _written(ord(found[0])), text)


def escaped_lines(text: str) -> str:
    """`escaped`, with line breaks only before indented lines: no name in a message can begin a line of its own."""
    return re.sub(r"\n(?!  )", r"\\n", escaped(text, keep="\n"))


def _written(code: int) -> str:
    named = {9: r"\t", 10: r"\n", 13: r"\r"}
    if code in named:
        return named[code]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
