"""What a person did wrong, or what broke under them, in one message: what, got, do.

`assert` is for our own invariants. These errors are for people: a command prints `error: …` and exits with 2.
"""

from __future__ import annotations

from seqaware.masking import escaped, escaped_lines, masked

USER_ERROR = 2
"""Exit code of every command after such an error."""


class SeqawareError(Exception):
    """Base of every error that is meant to be read by a person.

    Args:
        what: what is wrong, as a statement (`training.sft.gamma must lie in [0, 1]`).
        got: the value that was found, shown as it was written.
        do: what the reader can do about it.
    """

    def __init__(self, what: str, *, got: object | None = None, do: str | None = None) -> None:
        # Messages repeat what a person or a library wrote, and end on terminals and in logs that others read.
        self.what = escaped_lines(masked(what))
        self.got = None if got is None else escaped(masked(str(got)))
        self.do = None if do is None else escaped_lines(masked(do))
        message = self.what
        if self.got is not None:
            message += f"; got {self.got}"
        if self.do is not None:
            message += f"; {self.do}"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process pools.
        return (_rebuild, (type(self), self.what, self.got, self.do))


def _rebuild(kind: type[SeqawareError], what: str, got: object | None, do: str | None) -> SeqawareError:
    return kind(what, got=got, do=do)


class ConfigError(SeqawareError):
    """The configuration contradicts itself, the ranks, the model or the library."""


class DataError(SeqawareError):
    """A source, a template, a record or a token store cannot be used."""


class CheckpointError(SeqawareError):
    """A checkpoint is torn, foreign, or belongs to another run."""


class StorageError(SeqawareError):
    """A disk refuses what a run has to write: it is full, or may only be read."""

    def __init__(self, what: str, *, got: object | None = None, do: str | None = None) -> None:
        super().__init__(what, got=got, do=do or "see to the disk's space and rights, and give the same command again")
