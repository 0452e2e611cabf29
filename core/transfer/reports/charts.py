"""Charts as SVG, drawn by hand: nothing is imported for them, and they follow the page's colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transfer.reports.html import escape
from transfer.reports.metrics import Calibration

STYLE = (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")
"""Of the charts: in the page once, and in each file."""

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 290, 58, 58, 14, 42
COLOURS = 6
CHARACTER = 6.6
"""Width of a character of a legend, about."""
MAX_POINTS = 2000
"""Of a scatter plot; of more, every so many are drawn."""
MAX_NAME = 16
"""Characters of a class's name beside a matrix."""

Point = tuple[float, float]


class _Plane:
    """The two axes of a chart: from values to places.

    Args:
        x, y: Lowest and highest value on each axis.
        log: The y axis is logarithmic.
    """

    def __init__(self, x: Point, y: Point, *, log: bool = False) -> None:
        self.x, self.log = _wide(x), log
        self.y = _wide(y) if not log else (math.log10(y[0]) - 0.05, math.log10(y[1]) + 0.05)

    def across(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.y[0]) / (self.y[1] - self.y[0])

    def at(self, point: Point) -> str:
        return f"{self.across(point[0]):.1f},{self.up(point[1]):.1f}"

    def grid(self, x_label: str, y_label: str, *, whole: bool = False) -> Iterator[str]:
        """Yield lines and numbers at round values, and what the axes are."""
        ticks = _powers(*self.y) if self.log else _round_values(*self.y)
        for value in ticks:
            y = self.up(value)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield _words(LEFT - 6, y + 4, f"{value:g}", "end")
        for value in _round_values(*self.x, whole=whole):
            yield _words(self.across(value), HEIGHT - BOTTOM + 17, f"{value:g}", "middle")
        yield f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        yield _words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle")
        yield _words(LEFT - 6, TOP - 10, y_label, "end") if y_label else ""


def lines(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str = "epoch",
    marks: Mapping[float, str] = {},
    log: bool = False,
) -> str:
    """Draw series of points over epochs as lines.

    Args:
        title: What is drawn.
        series: Points by name; the first is drawn dashed where there are two.
        x_label: What the x axis is.
        marks: Words at values of x, each with a line from top to bottom.
        log: The y axis is logarithmic.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    plane = _Plane((min(xs), max(xs)), (min(ys), max(ys)), log=log)
    parts = [*plane.grid(x_label, "", whole=True)]
    for x, words in marks.items():
        middle = plane.across(x)
        left = middle > WIDTH - 90
        parts.append(f'<path class="mark" d="M{middle:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_words(middle + (-4 if left else 4), TOP - 3, words, "end" if left else "start", "mark-words"))
    for number, (name, values) in enumerate(series.items()):
        style = f"line c{number % COLOURS}" + (" dashed" if number >= COLOURS else "")
        parts.append(f'<polyline class="{style}" points="{" ".join(map(plane.at, values))}"/>')
        for x, y in values if len(values) <= 60 else ():
            place = f'cx="{plane.across(x):.1f}" cy="{plane.up(y):.1f}"'
            said = f"{escape(name)}, {escape(x_label)} {x:g}: {y:.5g}"
            parts.append(f'<circle class="dot c{number % COLOURS}" {place} r="2.6"><title>{said}</title></circle>')
    return _svg(title, WIDTH, HEIGHT, [*_legend(list(series)), *parts])


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw predicted over true values, with the line on which both are the same."""
    every = math.ceil(len(points) / MAX_POINTS)
    shown = points[::every]
    values = [value for point in shown for value in point]
    plane = _Plane((min(values), max(values)), (min(values), max(values)))
    ends = f"M{plane.at((plane.x[0], plane.x[0]))}L{plane.at((plane.x[1], plane.x[1]))}"
    parts = [*plane.grid(x_label, ""), f'<path class="mark" d="{ends}"/>']
    for point in shown:
        place = f'cx="{plane.across(point[0]):.1f}" cy="{plane.up(point[1]):.1f}"'
        parts.append(f'<circle class="cloud" {place} r="3"/>')
    return _svg(title, WIDTH, HEIGHT, [_words(LEFT, 42, y_label, "start"), *parts])


def reliability(title: str, calibration: Calibration) -> str:
    """Draw how often predictions of like confidence are right, with one standard error, over how many there are."""
    plane = _Plane((0, 1), (0, 1))
    most = max(one.count for one in calibration.bins)
    parts = [
        *plane.grid("probability that was said", ""),
        f'<path class="mark" d="M{plane.at((0, 0))}L{plane.at((1, 1))}"/>',
    ]
    for one in calibration.bins:
        left, right = plane.across(one.low) + 1, plane.across(one.high) - 1
        top, ground = plane.up(one.right), HEIGHT - BOTTOM
        said = f"{one.low:.2f} to {one.high:.2f}: {one.count:,} predictions, mean probability {one.confidence:.3f}, "
        share = 0.25 + 0.65 * one.count / most
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{ground - top:.1f}"'
        parts.append(
            f'<rect class="bar" fill-opacity="{share:.2f}" {box}><title>{said}{one.right:.3f} right</title></rect>'
        )
        low, high = max(0, one.right - one.standard_error), min(1, one.right + one.standard_error)
        middle = plane.across(one.confidence)
        parts.append(f'<path class="whisker" d="M{middle:.1f} {plane.up(low):.1f}V{plane.up(high):.1f}"/>')
        parts.append(f'<circle class="point" cx="{middle:.1f}" cy="{top:.1f}" r="3"/>')
        parts.append(_words((left + right) / 2, ground - 5, f"{one.count:,}", "middle", "small"))
    return _svg(title, WIDTH, HEIGHT, [_words(LEFT, 42, "share that is right", "start"), *parts])


def shares(title: str, parts: Mapping[str, float], unit: str) -> str:
    """Draw what a whole is made of as one bar with a legend."""
    whole, left = sum(parts.values()), 0.0
    drawn = []
    for number, (name, value) in enumerate(parts.items()):
        width = (WIDTH - 2 * RIGHT) * value / whole
        said = f"{name}: {value:.3g} {unit}, {value / whole:.1%}"
        box = f'x="{RIGHT + left:.1f}" y="36" width="{width:.1f}" height="30"'
        drawn.append(f'<rect class="share c{number % COLOURS}" {box}><title>{escape(said)}</title></rect>')
        y = 90 + 20 * number
        drawn.append(f'<rect class="share c{number % COLOURS}" x="{RIGHT}" y="{y - 10}" width="11" height="11"/>')
        drawn.append(_words(RIGHT + 18, y, name, "start"))
        drawn.append(_words(WIDTH - 90, y, f"{_plain(value)} {unit}", "end"))
        drawn.append(_words(WIDTH - RIGHT, y, f"{value / whole:.1%}", "end"))
        left += width
    return _svg(title, WIDTH, 90 + 20 * len(parts), drawn)


def matrix(title: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Draw how often each class (a row) was taken for each (a column); what is right is of another colour."""
    size = max(18, min(64, 620 // len(names)))
    short = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in map(str, names)]
    left = 34 + int(7 * max(map(len, short)))
    upright = max(map(len, short)) * 7 > size - 4
    top = 48 + (int(7 * max(map(len, short))) if upright else 18)
    side = size * len(names)
    parts = [_words(left + side / 2, 42, "predicted", "middle", "mark-words")]
    turned = f'transform="rotate(-90 12 {top + side / 2:.1f})"'
    parts.append(
        f'<text class="mark-words" x="12" y="{top + side / 2 + 4:.1f}" text-anchor="middle" {turned}>true</text>'
    )
    for row, line in enumerate(counts):
        whole = sum(line) or 1
        y = top + row * size
        parts.append(_words(left - 7, y + size / 2 + 4, short[row], "end"))
        x = left + row * size + size / 2
        if upright:
            turn = f'transform="rotate(-90 {x:.1f} {top - 7})"'
            parts.append(f'<text x="{x:.1f}" y="{top - 3}" {turn}>{escape(short[row])}</text>')
        else:
            parts.append(_words(x, top - 8, short[row], "middle"))
        for column, count in enumerate(line):
            kind, share = "right" if row == column else "wrong", count / whole
            said = f"{names[row]} taken for {names[column]}: {count:,} ({share:.1%} of its examples)"
            box = f'x="{left + column * size + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}"'
            opacity = f"{0.06 + 0.94 * share:.2f}" if count else "0.04"
            parts.append(
                f'<rect class="cell {kind}" {box} rx="2" fill-opacity="{opacity}"><title>{escape(said)}</title></rect>'
            )
            if count and size >= 26:
                ink = "on-cell" if share > 0.5 else "in-cell"
                x_text, y_text = left + column * size + size / 2, y + size / 2 + 4
                parts.append(_words(x_text, y_text, f"{count:,}", "middle", ink))
    return _svg(title, max(left + side + 10, 12 + int(7.5 * len(title))), top + side + 10, parts)


def alone(svg: str) -> str:
    """Return a chart as a file of its own, which brings its style."""
    start = svg.index(">") + 1
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return f"{svg[:start]}<style>{STYLE}</style>{paper}{svg[start:]}\n"


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" role="img"'
    size = f'style="max-width:{width}px" aria-label="{escape(title)}"'
    return "\n".join([f"{head} {size}>", _words(14, 20, title, "start", "title"), *filter(None, parts), "</svg>"])


def _legend(names: Sequence[str]) -> Iterator[str]:
    x, y = float(LEFT), 42
    for number, name in enumerate(names):
        if x + CHARACTER * len(name) > WIDTH and number:
            yield _words(x, y, "…", "start")  # the points say what they are
            return
        dashed = " dashed" if number >= COLOURS else ""
        yield f'<path class="line c{number % COLOURS}{dashed}" d="M{x:.1f} {y - 4}h18"/>'
        yield _words(x + 23, y, name, "start")
        x += 23 + CHARACTER * len(name) + 18


def _words(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    of = f' class="{style}"' if style else ""
    return f'<text{of} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _wide(bounds: Point) -> Point:
    """Return bounds that are some way apart."""
    low, high = bounds
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)


def _round_values(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return some five values a person would choose between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    step = max(1.0, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return round values between two logarithms: powers of ten, and what lies between them where they are few."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    found = (f * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for f in factors)
    return [value for value in found if low <= math.log10(value) <= high]
