"""A main thread that ends with an exception: is it the one to blame, or has it only lost another rank?"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable

from seqaware.errors import USER_ERROR, SeqawareError
from seqaware.watchdog import failure_messages
from seqaware.watchdog.monitor import FAILURE, Monitor
from seqaware.watchdog.own_rank import OwnRank
from seqaware.watchdog.peers import Peer, missed_now, silent_afar
from seqaware.watchdog.rank_card import code_of

# What gloo, NCCL and the store say when somebody at the other end is gone.
_LOST = re.compile(
    r"gloo|NCCL|closed by peer|[Cc]onnection (reset|refused|was broken|closed)|Broken pipe|socketPollConnect|TCPStore"
)
_LOST_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
# Longer than the other monitors take to find out, in seconds.
_UNTIL_TOLD = 4.0
_UNTIL_FAILED_TELLS = 10.0
_UNTIL_ENDED = 10.0
# An error of every rank is rank 0's to tell.
_AFTER_RANK_0, _AFTER_RANK_0_ELSEWHERE = 3.0, 5.0
# A card comes every `share_seconds`, if its monitor and the file system are not slow.
_SHARES_MISSED = 2.2
_SILENT_AT_LEAST = 3.0


def fail(own: OwnRank, monitor: Monitor, error: BaseException) -> int:
    """Tell of an exception that ends this rank, if it is the one to tell; returns the exit code.

    A rank that has only lost another one waits for whoever knows more. Its monitor may end the process meanwhile.
    """
    own.failing = True
    trace = "".join(traceback.format_exception(error))
    own.log.note(f"failed {own.dial.place().words()}\n{trace}")
    message = _message(error)
    if _is_victim(own, error, message):
        return _tell_of_a_loss(own, monitor, message)
    person = isinstance(error, SeqawareError)
    code = USER_ERROR if person else FAILURE
    card = own.update(status="failed", code=code, message=message)
    own.share()
    if person:
        _let_rank_0_speak(own)
    monitor.stop()
    if person:
        where = "" if own.address.rank == 0 else f" on {card.name()}"
        text = f"error{where}: {error}"
    else:
        text = failure_messages.failed_rank_message(card, trace, own.shared)
    own.tell(text)
    if person:
        # All that is to be known has been shown.
        own.update(status="ended")
        own.folder.remove_if_all_ended(own.address.local_size)
    return code


def _message(error: BaseException) -> str:
    if isinstance(error, SeqawareError):
        return str(error)
    text = failure_messages.first_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_victim(own: OwnRank, error: BaseException, message: str) -> bool:
    if own.address.size == 1:
        return False
    if type(error).__name__ in _LOST_TYPES or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        return True
    missed = missed_now(own)
    if isinstance(error, SeqawareError):
        # What a lost rank leads to may be dressed as an error for people; all ranks' own error is each one's own.
        return bool(missed and _LOST.search(message))
    return any(card.message != message for card in missed)


def _tell_of_a_loss(own: OwnRank, monitor: Monitor, message: str) -> int:
    if _wait(own.told, _UNTIL_FAILED_TELLS if missed_now(own) else _UNTIL_TOLD):
        monitor.join(_UNTIL_ENDED)  # it ends this process, unless the machine is too busy
        return _code_of_others(own)
    # Nobody of this host is to blame.
    silent: list[Peer] = []
    if own.address.nodes > 1 and own.shared is not None:
        seconds = max(_SILENT_AT_LEAST, _SHARES_MISSED * own.share_seconds)
        if monitor.leads():
            silent = silent_afar(own, seconds)
        elif _wait(own.told, seconds + _UNTIL_TOLD):
            # The rank that works for this host looks at the others, and has reported meanwhile.
            monitor.join(_UNTIL_ENDED)
            return _code_of_others(own)
    monitor.stop()
    code = _code_of_others(own)
    card = own.update(status="failed", code=code, message=message)
    text = failure_messages.lost_rank_message(card, silent=silent, shared=own.shared)
    own.tell(text)
    return code


def _code_of_others(own: OwnRank) -> int:
    """The launcher may pass on the code of whichever rank ends first: a victim's is that of the rank to blame."""
    return code_of(card for card in own.folder.cards() if card.rank != own.address.rank) or FAILURE


def _let_rank_0_speak(own: OwnRank) -> None:
    if own.address.rank == 0:
        return
    first = next((card for card in own.folder.cards() if card.rank == 0), None)
    if first is not None and first.status == "ended":
        return
    _wait(own.told, _AFTER_RANK_0_ELSEWHERE if first is None else _AFTER_RANK_0)


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
