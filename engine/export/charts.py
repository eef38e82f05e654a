"""Line charts over the steps of a run, as SVG.

The page around a chart styles the classes `axis`, `grid`, `tick`, `label`, `phase` and `s0` ... `s5` for the series,
with `raw` and `mean` lines.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from dream_fast.engine.text import escape_controls

WIDTH, HEIGHT = 560, 250  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 18, 42  # margins around the axes
MAX_POINTS = 500  # of a line, about the width of a drawing in pixels
MEAN_WINDOWS = 20  # in a line: the smooth line is the mean over a twentieth of the rows
COLOURS = 6  # classes s0 ... s5
MIN_LOG_RATIO = 50.0  # of the largest to the smallest value, for a logarithmic axis


class Series(NamedTuple):
    """Values by step; None where the value was not finite."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]


class Axis(NamedTuple):
    """Maps values to the drawing; `low` and `high` are log10 where `logarithmic`."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool

    def fraction(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return (place - self.low) / (self.high - self.low)


def draw_chart(title: str, label: str, series: Sequence[Series], marks: Sequence[tuple[int, str]] = ()) -> str:
    """Draw the series in one <svg>, steps to the right and `label` upwards; `marks` are steps with a word.

    The vertical axis is logarithmic if all values are positive and MIN_LOG_RATIO apart. Without values the drawing has
    a note.
    """
    finite = [value for line in series for value in line.values if value is not None]
    steps = [step for line in series for step in line.steps]
    elements = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f"<title>{html.escape(title)}</title>",
    ]
    if not finite:
        elements.append(_text(WIDTH / 2, HEIGHT / 2, "nothing was recorded", "label", "middle"))
        return "".join([*elements, "</svg>"])
    logarithmic = min(finite) > 0 and max(finite) / min(finite) >= MIN_LOG_RATIO
    y = _logarithmic_axis(min(finite), max(finite)) if logarithmic else linear_axis(min(finite), max(finite))
    x = _step_axis(min(steps), max(steps))
    elements += _axes(x, y, label, marks)
    for index, line in enumerate(series):
        elements += _line(line, x, y, index % COLOURS)
    return "".join([*elements, "</svg>"])


def linear_axis(low: float, high: float, ticks: int = 5) -> Axis:
    """An axis that includes [low, high], with about `ticks` ticks at multiples of 1, 2 or 5 times a power of ten."""
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [index * step for index in range(first, last + 1)], False)


def _logarithmic_axis(low: float, high: float) -> Axis:
    """An axis of whole decades around [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    return Axis(first, last, [10.0**power for power in range(first, last + 1, every)], True)


def _step_axis(first: int, last: int) -> Axis:
    """An axis from step `first` to `last`, with the ticks in between."""
    if first == last:
        first, last = first - 1, last + 1
    ticks = [tick for tick in linear_axis(first, last).ticks if first <= tick <= last and tick == int(tick)]
    return Axis(first, last, ticks, False)


def _place(x: Axis, y: Axis, step: float, value: float) -> tuple[float, float]:
    across = LEFT + x.fraction(step) * (WIDTH - LEFT - RIGHT)
    return across, HEIGHT - BOTTOM - y.fraction(value) * (HEIGHT - TOP - BOTTOM)


def _axes(x: Axis, y: Axis, label: str, marks: Sequence[tuple[int, str]]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    elements = []
    for tick in y.ticks:
        _, at = _place(x, y, x.low, tick)
        elements.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        elements.append(_text(LEFT - 7, at + 3.5, format_number(tick, _digits(y.ticks)), "tick", "end"))
    for tick in x.ticks:
        across = LEFT + x.fraction(tick) * (right - LEFT)
        elements.append(f'<line class="axis" x1="{across:.1f}" y1="{bottom}" x2="{across:.1f}" y2="{bottom + 4}"/>')
        elements.append(_text(across, bottom + 16, format_number(tick, _digits(x.ticks)), "tick", "middle"))
    for step, word in marks:
        across = LEFT + x.fraction(max(step, x.low)) * (right - LEFT)
        elements.append(f'<line class="phase" x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{bottom}"/>')
        elements.append(_text(across + 3, TOP - 6, word, "tick", "start"))
    elements.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>')
    elements.append(_text((LEFT + right) / 2, HEIGHT - 8, "step", "label", "middle"))
    middle = (TOP + bottom) / 2
    turned = f'<g transform="translate(13 {middle}) rotate(-90)">{_text(0, 0, label, "label", "middle")}</g>'
    return [*elements, turned]


def _line(line: Series, x: Axis, y: Axis, index: int) -> list[str]:
    points = [
        (step, value)
        for step, value in zip(line.steps, line.values, strict=True)
        if value is None or not y.logarithmic or value > 0
    ]
    every = math.ceil(len(points) / MAX_POINTS)
    smooth = len(points) >= MEAN_WINDOWS
    elements = [_path(points[::every], x, y, f"s{index} {'raw' if smooth else 'mean'}")]
    if smooth:
        elements.append(_path(running_mean(points, len(points) // MEAN_WINDOWS, every), x, y, f"s{index} mean"))
    return elements


def _path(points: Sequence[tuple[int, float | None]], x: Axis, y: Axis, kind: str) -> str:
    """A path through the points, interrupted where a value is missing; a single point is a dot."""
    commands, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        across, up = _place(x, y, step, value)
        commands.append(f"{pen}{across:.1f} {up:.1f}")
        pen = "L"
    if len(commands) == 1:
        commands.append("h0")  # round line caps make it a dot
    return f'<path class="{kind}" d="{"".join(commands)}"/>'


def running_mean(
    points: Sequence[tuple[int, float | None]], width: int, every: int = 1
) -> list[tuple[int, float | None]]:
    """Means over the finite values of up to `width` points, at the step of the last, for each of `every` points."""
    means: list[tuple[int, float | None]] = []
    for end in range(0, len(points), every):
        finite = [value for _, value in points[max(0, end + 1 - width) : end + 1] if value is not None]
        means.append((points[end][0], math.fsum(finite) / len(finite) if finite else None))
    return means


def _digits(ticks: Sequence[float]) -> int:
    """The number of significant digits that tells neighbouring ticks apart."""
    largest, gap = max(map(abs, ticks)), ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    return max(4, math.ceil(math.log10(largest / gap)) + 1) if gap and largest else 4


def format_number(value: float, digits: int = 4) -> str:
    """Format a number in few characters: 12000 as 12k, 0.0000001 as 1e-07."""
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.{digits}g}M"
    if 1e4 <= abs(value) < 1e6:
        return f"{value / 1e3:.{digits}g}k"
    return f"{value:.{digits}g}"


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    words = html.escape(escape_controls(words))
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
