"""Curves over the steps of a run, as SVG that takes its colours from the page around it.

The page sets the classes: ``axis``, ``grid``, ``tick``, ``label``, ``phase`` and ``s0`` ... ``s5`` for the series, each
with ``raw`` and ``mean`` lines.
"""

import html
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dream_fast.engine.text import escape_controls

WIDTH, HEIGHT = 560, 250  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 18, 42  # margins around the axes
MOST_POINTS = 500  # of a line: more than the drawing has pixels would only make the file large
MEAN_OF = 20  # a smooth line is the mean over a twentieth of the rows, where there are as many
SERIES = 6  # that have a colour of their own
LOGARITHMIC_FROM = 50.0  # ratio of the largest to the smallest value from which the axis is logarithmic


class Series(NamedTuple):
    """Values by step; None where there was no finite one."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]


class Axis(NamedTuple):
    """From values to the drawing, with ticks; values are log10 where ``logarithmic``."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool

    def fraction(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return (place - self.low) / (self.high - self.low)


def charts(title: str, label: str, series: Sequence[Series], marks: Sequence[tuple[int, str]] = ()) -> str:
    """The ``series`` in one <svg>, steps to the right and ``label`` upwards; ``marks`` are steps with a word.

    The vertical axis is logarithmic when all values are positive and LOGARITHMIC_FROM times apart. An empty drawing
    says that there is nothing.
    """
    finite = [value for line in series for value in line.values if value is not None]
    steps = [step for line in series for step in line.steps]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f"<title>{html.escape(title)}</title>",
    ]
    if not finite:
        parts.append(_text(WIDTH / 2, HEIGHT / 2, "nothing was recorded", "label", "middle"))
        return "".join([*parts, "</svg>"])
    logarithmic = min(finite) > 0 and max(finite) / min(finite) >= LOGARITHMIC_FROM
    y = _logarithmic_axis(min(finite), max(finite)) if logarithmic else linear_axis(min(finite), max(finite))
    x = _step_axis(min(steps), max(steps))
    parts += _axes(x, y, label, marks)
    for index, line in enumerate(series):
        parts += _line(line, x, y, index % SERIES)
    return "".join([*parts, "</svg>"])


def linear_axis(low: float, high: float, ticks: int = 5) -> Axis:
    """An axis that holds [low, high], with about ``ticks`` ticks at multiples of 1, 2 or 5 times a power of ten."""
    if low == high:
        reach = abs(low) / 2 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [index * step for index in range(first, last + 1)], False)


def _logarithmic_axis(low: float, high: float) -> Axis:
    """Whole decades around [low, high], every so many of them with a tick."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    return Axis(first, last, [10.0**power for power in range(first, last + 1, every)], True)


def _step_axis(first: int, last: int) -> Axis:
    """From step ``first`` to ``last``, with the ticks that lie between."""
    if first == last:
        first, last = first - 1, last + 1
    ticks = [tick for tick in linear_axis(first, last).ticks if first <= tick <= last and tick == int(tick)]
    return Axis(first, last, ticks, False)


def _place(x: Axis, y: Axis, step: float, value: float) -> tuple[float, float]:
    across = LEFT + x.fraction(step) * (WIDTH - LEFT - RIGHT)
    return across, HEIGHT - BOTTOM - y.fraction(value) * (HEIGHT - TOP - BOTTOM)


def _axes(x: Axis, y: Axis, label: str, marks: Sequence[tuple[int, str]]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        _, at = _place(x, y, x.low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 7, at + 3.5, short(tick, _digits(y.ticks)), "tick", "end"))
    for tick in x.ticks:
        across = LEFT + x.fraction(tick) * (right - LEFT)
        parts.append(f'<line class="axis" x1="{across:.1f}" y1="{bottom}" x2="{across:.1f}" y2="{bottom + 4}"/>')
        parts.append(_text(across, bottom + 16, short(tick, _digits(x.ticks)), "tick", "middle"))
    for step, word in marks:
        across = LEFT + x.fraction(max(step, x.low)) * (right - LEFT)
        parts.append(f'<line class="phase" x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{bottom}"/>')
        parts.append(_text(across + 3, TOP - 6, word, "tick", "start"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, "step", "label", "middle"))
    middle = (TOP + bottom) / 2
    turned = f'<g transform="translate(13 {middle}) rotate(-90)">{_text(0, 0, label, "label", "middle")}</g>'
    return [*parts, turned]


def _line(line: Series, x: Axis, y: Axis, index: int) -> list[str]:
    points = [
        (step, value)
        for step, value in zip(line.steps, line.values, strict=True)
        if value is None or not y.logarithmic or value > 0
    ]
    every = math.ceil(len(points) / MOST_POINTS)
    smooth = len(points) >= MEAN_OF
    parts = [_path(points[::every], x, y, f"s{index} {'raw' if smooth else 'mean'}")]
    if smooth:
        parts.append(_path(running_mean(points, len(points) // MEAN_OF)[::every], x, y, f"s{index} mean"))
    return parts


def _path(points: Sequence[tuple[int, float | None]], x: Axis, y: Axis, kind: str) -> str:
    """One path through ``points``, broken where a value is missing; a lone point is a dot."""
    words, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        across, up = _place(x, y, step, value)
        words.append(f"{pen}{across:.1f} {up:.1f}")
        pen = "L"
    if len(words) == 1:
        words.append("h0")  # round line caps make it a dot
    return f'<path class="{kind}" d="{"".join(words)}"/>'


def running_mean(points: Sequence[tuple[int, float | None]], width: int) -> list[tuple[int, float | None]]:
    """Means over the finite ones of up to ``width`` points, each at the last of them."""
    found: list[tuple[int, float | None]] = []
    window: deque[float | None] = deque()
    for step, value in points:
        window.append(value)
        if len(window) > width:
            window.popleft()
        finite = [one for one in window if one is not None]
        found.append((step, math.fsum(finite) / len(finite) if finite else None))
    return found


def _digits(ticks: Sequence[float]) -> int:
    """Significant digits by which neighbouring ``ticks`` differ."""
    largest, gap = max(map(abs, ticks)), ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    return max(4, math.ceil(math.log10(largest / gap)) + 1) if gap and largest else 4


def short(value: float, digits: int = 4) -> str:
    """A number in few characters: 12000 is 12k, 0.0000001 is 1e-07."""
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.{digits}g}M"
    if 1e4 <= abs(value) < 1e6:
        return f"{value / 1e3:.{digits}g}k"
    return f"{value:.{digits}g}"


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    words = html.escape(escape_controls(words))
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
