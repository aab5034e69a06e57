"""Passwords and tokens that stand in texts: found, so that they can be refused, and masked, so that no log has them."""

from __future__ import annotations

import re

_MASK = "***"
# user:password@ or token@ of an address; of one that a Path has taken a slash from, too.
_USER = re.compile(r"(?:(?<=://)|(?<=\w\w:/)(?!/))[^/\s@]+(?=@)")
# Parameters of an address, those of signed ones too.
_NAMES = r"(?:access[_-]?|auth[_-]?|api[_-]?|x-amz-)?(?:token|key|password|passwd|secret|sig|signature|credential)"
_PARAMETER = re.compile(rf"(?<=[?&;])(x-amz-security-token|awsaccesskeyid|{_NAMES})=[^&;#\s'\"]+", re.IGNORECASE)
# Tokens that are known by their form: of Hugging Face, GitHub, OpenAI and its like, and keys of AWS.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})"
)
# The same names outside of an address, as in `--set token=…`; eos_token=… and its like are no secrets, and neither are
# the {fields} of a template.
_ALONE = r"(?:hf[_-]?)?(?:access[_-]?|auth[_-]?|api[_-]?)?(?:token|password|passwd|secret)|api[_-]?key"
_ASSIGNED = re.compile(rf"(?<![\w-])({_ALONE})=(?!{{)[^\s'\",;&]+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** in the place of everything in it that looks like a password or a token."""
    for pattern in (_USER, _TOKEN):
        text = pattern.sub(_MASK, text)
    for pattern in (_PARAMETER, _ASSIGNED):
        text = pattern.sub(rf"\1={_MASK}", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether the text holds an address with a password or token, or a token that is known by its form."""
    return any(pattern.search(text) for pattern in (_USER, _TOKEN)) or (
        "://" in text and _PARAMETER.search(text) is not None
    )
