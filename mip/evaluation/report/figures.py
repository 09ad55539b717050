"""Charts of the report: small, quiet, drawn twice (for a light and a dark page), the same bytes every time.

Each chart is narrow enough for a phone at its own size, so that its text stays at 9 points or more. A method has one
colour and one marker everywhere; no chart says anything by colour alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mip.tables import atomic

DPI = 192  # two device pixels per CSS pixel
_WIDTH = 3.72  # inches: 357 CSS pixels

# Okabe and Ito's colours, told apart with any colour vision; vermilion and blue for the two that are compared.
_STYLES = {
    "base": ("#8a8a8a", "s"),
    "ip_adapter_concat": ("#d55e00", "^"),
    "ip_adapter_mean": ("#e69f00", "v"),
    "training_free": ("#56b4e9", "D"),
    "mip": ("#0072b2", "o"),
}
_SPARE = (("#009e73", "P"), ("#cc79a7", "X"), ("#b8a800", "*"), ("#9467bd", "h"))


@dataclass(frozen=True)
class Theme:
    """Colours of a page: text, quiet text, ground, rules."""

    suffix: str
    ink: str
    quiet: str
    ground: str
    rule: str


LIGHT = Theme(suffix="", ink="#1d2126", quiet="#565e68", ground="#ffffff", rule="#dfe3e8")
DARK = Theme(suffix="-dark", ink="#e6e9ed", quiet="#a9b1bb", ground="#1b1f25", rule="#39414b")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; None throughout where there was nothing to average."""

    label: str
    method: str
    value: float | None
    low: float | None
    high: float | None


def style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a method; a user's own methods take the spare ones in their order."""
    if method in _STYLES:
        return _STYLES[method]
    own = [name for name in methods if name not in _STYLES]
    return _SPARE[own.index(method) % len(_SPARE)]


def save(draw: Callable[[Theme], Figure], path: Path) -> tuple[Path, Path]:
    """Draw a chart for the light page at `path` and for the dark page beside it; returns both files."""
    files = []
    for theme in (LIGHT, DARK):
        file = path.with_name(f"{path.stem}{theme.suffix}.png")
        with matplotlib.rc_context(_settings(theme)), atomic(file) as temporary:
            # No "Software" entry: the bytes should change with the picture only.
            draw(theme).savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        files.append(file)
    return files[0], files[1]


def intervals(estimates: Sequence[Estimate], *, methods: Sequence[str]) -> Callable[[Theme], Figure]:
    """One metric: a point and its interval for each method, the first on top."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _chart(0.62 + 0.3 * len(estimates))
        for row, estimate in enumerate(estimates):
            _estimate(axes, estimate, row=row, style=style(estimate.method, methods), theme=theme)
        axes.set_yticks(range(len(estimates)), [estimate.label for estimate in estimates])
        axes.set_ylim(len(estimates) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.grid(axis="x", color=theme.rule, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3))
        axes.margins(x=0.12)
        return figure

    return draw


def _estimate(axes: Axes, estimate: Estimate, *, row: int, style: tuple[str, str], theme: Theme) -> None:
    colour, marker = style
    if estimate.value is None:
        axes.text(0.02, row, "no cases", transform=axes.get_yaxis_transform(), va="center", color=theme.quiet)
        return
    if estimate.low is not None and estimate.high is not None:
        axes.plot(
            [estimate.low, estimate.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt", zorder=2
        )
    axes.plot(
        [estimate.value], [row], color=colour, marker=marker, markersize=7, zorder=3, markeredgecolor=theme.ground
    )


def curve(
    steps: Sequence[int], losses: Sequence[float], validation: Sequence[tuple[int, float]]
) -> Callable[[Theme], Figure]:
    """Training loss (each step and smoothed) and validation loss over optimizer steps."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _chart(2.7)
        axes.plot(steps, losses, color=theme.rule, linewidth=0.8, label="training, each step")
        axes.plot(steps, smoothed(losses), color="#0072b2", linewidth=1.8, label="training, smoothed")
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color="#d55e00",
                marker="o",
                markersize=5,
                linewidth=1.2,
                label="validation",
            )
        _frame(axes, losses, extra=[loss for _, loss in validation])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.grid(axis="y", color=theme.rule, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.4, columnspacing=1.2)
        return figure

    return draw


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window of a thirtieth of the run, centred; shorter at both ends."""
    half = max(1, len(losses) // 60)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    starts, ends = (
        np.maximum(np.arange(len(losses)) - half, 0),
        np.minimum(np.arange(len(losses)) + half + 1, len(losses)),
    )
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _frame(axes: Axes, losses: Sequence[float], *, extra: Sequence[float]) -> None:
    """Limits that a single spike at the start cannot flatten the curve with."""
    shown = np.concatenate([np.percentile(losses, [1, 99]), np.asarray(extra, float)])
    low, high = float(shown.min()), float(shown.max())
    room = max((high - low) * 0.08, 1e-6)
    axes.set_ylim(low - room, high + room)


def histogram(
    accepted: Sequence[float], rejected: Sequence[float], *, threshold: float, name: str
) -> Callable[[Theme], Figure]:
    """Scores of accepted and rejected samples on common bins, with a line at the threshold called `name`."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _chart(2.7)
        both = np.concatenate([np.asarray(accepted, float), np.asarray(rejected, float)])
        edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-6), 33)
        axes.hist(rejected, bins=edges.tolist(), color="#d55e00", alpha=0.55, label=f"rejected ({len(rejected):,})")
        axes.hist(accepted, bins=edges.tolist(), color="#0072b2", alpha=0.7, label=f"accepted ({len(accepted):,})")
        axes.axvline(threshold, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 2)), label=f"{name} {threshold:.3f}")
        axes.set_xlabel("object quality score")
        axes.set_ylabel("samples")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.4, columnspacing=1.2)
        return figure

    return draw


def _chart(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "text.color": theme.ink,
        "axes.labelcolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "axes.edgecolor": theme.rule,
        "axes.facecolor": theme.ground,
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
    }
