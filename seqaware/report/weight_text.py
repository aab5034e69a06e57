"""The weights of an objective as text: a curve, bars, and what they mean. Colours are never needed to read it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from seqaware.masking import escaped

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ROWS = 6


class WeightCurve:
    """w over k, k on a logarithmic axis, as wide as the terminal.

    Args:
        points: (k, w), k rising.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self._points = points

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        import numpy as np

        ks, ws = zip(*self._points, strict=True)
        width = max(10, min(options.max_width - 10, 80))
        across = np.interp(np.linspace(0, np.log(ks[-1]), width), np.log(ks), ws)
        most = max(float(across.max()), 1e-12)
        blocks = _BLOCKS if _has_blocks(console) else " .:-=+*#@"
        eighths = np.round(across / most * _ROWS * 8).astype(int)
        for row in reversed(range(_ROWS)):
            label = f"{most:>8.3g} " if row == _ROWS - 1 else f"{0:>8} " if row == 0 else " " * 9
            yield Text(label + "".join(blocks[int(np.clip(each - 8 * row, 0, 8))] for each in eighths), style="cyan")
        end = f"k = {ks[-1]:,}"
        yield Text(" " * 9 + "k = 1" + end.rjust(width - 5))


def _has_blocks(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def bar(share: float, width: int, *, blocks: bool = True) -> str:
    """A bar, `width` at a share of 1; blocks: of whole and eighth blocks, else of #."""
    eighths = round(share * width * 8)
    if not blocks:
        return "#" * (eighths // 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def show_weights(view: Any, lines: Sequence[str], *, console: Console) -> None:
    """Print the curve, the shares and what follows.

    Args:
        view: a `training.weights.WeightsView`. lines: what to say about it, `label  text`.
    """
    for line in lines[:2]:
        console.print(Text(_wrapped(line, console.width)))
    console.print()
    console.print(WeightCurve(view.curve))
    for title, bands in (("position k", view.by_position), ("loss tokens a doc", view.by_length)):
        console.print()
        for row in _table(title, bands, console):
            console.print(row)
    console.print()
    for line in lines[2:]:
        console.print(Text(_wrapped(line, console.width)))


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(escaped(line), width, subsequent_indent=" " * 12, break_on_hyphens=False)


def _table(title: str, bands: Sequence[Any], console: Console) -> Iterator[Text]:
    with_documents = bands[0].documents is not None
    head = f"{title:<17}{'tokens':>8}{'loss':>8}" + (f"{'docs':>8}" if with_documents else "")
    yield Text(head, style="bold")
    room = max(4, min(console.width - len(head) - 2, 40))
    blocks = _has_blocks(console)
    most = max(band.weight for band in bands)
    for band in bands:
        name = f"{band.first:,}" if band.first == band.last else f"{band.first:,} – {band.last:,}"
        documents = f"{band.documents:>8.1%}" if with_documents else ""
        text = Text(f"{name:<17}{band.tokens:>8.1%}{band.weight:>8.1%}{documents}  ")
        yield text.append(bar(band.weight / most if most else 0.0, room, blocks=blocks), style="cyan")


def weight_lines(view: Any, config: Any) -> Iterator[str]:
    """What the figures mean: `label  text` of each."""
    sft, clip = config.training.sft, config.training.optimizer.max_grad_norm
    of = "" if view.documents == view.of_documents else f" of {view.of_documents:,}"
    yield _line("objective", _objective(sft))
    yield _line("weights", f"mean {view.mean:.4g}, largest {view.largest:.4g}; w over k (log axis):")
    yield _line("data", f"{view.documents:,} documents{of}, {view.tokens:,} tokens with loss")
    yield _line("assumed", "shares of the loss: weights alone, as if every token had the same loss")
    share = view.effective_tokens / view.tokens
    yield _line("effective", f"(Σ w)² / Σ w² = {view.effective_tokens:,.0f} tokens, {share:.0%} of all")
    yield from _lost_lines(view, config.format.on_overlong)
    yield from _clip_lines(view, sft.normalize_by, clip)


def _objective(sft: Any) -> str:
    return (
        f"{sft.weighting}, γ = {sft.discount:.6g}, positions {sft.positions}, scale {sft.scale}, "
        f"divided by {sft.normalize_by}"
    )


def _lost_lines(view: Any, on_overlong: str) -> Iterator[str]:
    if not view.overlong:
        yield _line("truncation", "no example is longer than max_seq_length: nothing is lost")
        return
    what = f"{view.overlong:,} examples are too long (on_overlong: {on_overlong})"
    if view.lost is None:
        yield _line("truncation", f"{what}; what that loses was not looked for")
    else:
        yield _line("truncation", f"{what}: {view.lost:.1%} of the loss weight is lost")


def _clip_lines(view: Any, normalize_by: str, clip: float) -> Iterator[str]:
    low, high = view.factor_aligned, view.factor_independent
    yield _line("gradient", f"{low:.3g} to {high:.3g} times that of plain cross-entropy over as many tokens:")
    yield _line("", "by the mean weight where tokens' gradients agree, by its root mean square where they do not")
    if not clip:
        yield _line("clip", "max_grad_norm is 0: nothing is clipped")
        return
    yield _line("clip", f"max_grad_norm {clip:g} here is as {clip / low:.3g} for plain cross-entropy")
    if low > 2:
        yield _line("", f"to clip as rarely: max_grad_norm: {clip * low:.3g}, or normalize_by: weight")
    if normalize_by == "weight":
        yield _line("", "normalize_by weight keeps the mean weight at 1, whatever γ is")


def _line(label: str, text: str) -> str:
    return f"{label:<12}{text}"


def draw_weights(view: Any, path: Any, *, title: str) -> None:
    """The curve and the shares by position and by length as a PNG, with matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    axes[0].plot(*zip(*view.curve, strict=True))
    axes[0].set(xscale="log", xlabel="position k", ylabel="weight w", title=title)
    for axis, bands, name in ((axes[1], view.by_position, "position k"), (axes[2], view.by_length, "document length")):
        places = range(len(bands))
        axis.bar([place - 0.2 for place in places], [band.tokens for band in bands], 0.4, label="of the tokens")
        axis.bar([place + 0.2 for place in places], [band.weight for band in bands], 0.4, label="of the loss")
        axis.set_xticks(list(places), [f"≤ {band.last:,}" for band in bands], rotation=60)
        axis.set(xlabel=name, ylabel="share (equal token losses)")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
