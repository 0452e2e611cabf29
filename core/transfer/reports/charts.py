"""Charts as SVG, drawn without a plotting library: they follow the colors of the page and cost no import."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from transfer.reports.metrics import Calibration
from transfer.system.formatting import format_value
from transfer.system.templates import escape

STYLE = (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")
"""Style sheet of the charts: included once in the page, and in each SVG file."""

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 290, 58, 58, 14, 42
NUM_COLORS = 6
LEGEND_CHARACTER_WIDTH = 6.6
MAX_POINTS = 2000
"""Number of points drawn in a scatter plot; of more, every n-th is drawn."""
MAX_DOTTED_POINTS = 60
"""Lines with more points than this are drawn without a dot at each point."""
MAX_NAME_CHARACTERS = 16
"""Length of a class name at a confusion matrix; longer names are cut."""
MIN_LABELED_CELL = 26
"""Smallest size of a confusion matrix's cell, in pixels, that has room for its count."""

Point = tuple[float, float]


class _Axes:
    """The two axes of a chart: they map values to pixels.

    Args:
        x, y: Lowest and highest value on each axis.
        log_x, log_y: Whether each axis is logarithmic.
    """

    def __init__(self, x: Point, y: Point, *, log_x: bool = False, log_y: bool = False) -> None:
        self.log_x, self.log_y = log_x, log_y
        self.x, self.y = _extent(x, log=log_x), _extent(y, log=log_y)

    def to_x(self, value: float) -> float:
        value = math.log10(value) if self.log_x else value
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x[0]) / (self.x[1] - self.x[0])

    def to_y(self, value: float) -> float:
        value = math.log10(value) if self.log_y else value
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.y[0]) / (self.y[1] - self.y[0])

    def to_point(self, point: Point) -> str:
        return f"{self.to_x(point[0]):.1f},{self.to_y(point[1]):.1f}"

    def draw(self, x_label: str, *, integers: bool = False) -> Iterator[Markup]:
        """Yield grid lines, numbers at round values, and the label of the x axis."""
        for value in _log_ticks(*self.y) if self.log_y else _ticks(*self.y):
            y = self.to_y(value)
            yield _tag("path", class_="grid", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
            yield _text(LEFT - 6, y + 4, f"{value:g}", "end")
        for value in _log_ticks(*self.x) if self.log_x else _ticks(*self.x, integers=integers):
            yield _text(self.to_x(value), HEIGHT - BOTTOM + 17, f"{value:g}", "middle")
        yield _tag("path", class_="axis", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}")
        yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle")


def lines(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str = "epoch",
    marks: Mapping[float, str] = {},
    log_x: bool = False,
    log_y: bool = False,
) -> Markup:
    """Return a line chart.

    Args:
        title: Title of the chart.
        series: Points (x, y) of each line, by the line's name.
        x_label: Label of the x axis.
        marks: Labels of vertical lines, by their x.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is logarithmic.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes = _Axes((min(xs), max(xs)), (min(ys), max(ys)), log_x=log_x, log_y=log_y)
    parts = [*axes.draw(x_label, integers=not log_x)]
    occupied: list[Point] = []
    for x, label in marks.items():
        middle, width = axes.to_x(x), LEGEND_CHARACTER_WIDTH * len(label)
        on_the_left = middle + width > WIDTH - RIGHT  # a label near the right edge would leave the chart
        offset, anchor = (-4, "end") if on_the_left else (4, "start")
        start = middle + offset - (width if on_the_left else 0)
        parts.append(_tag("path", _tag("title", label), class_="mark", d=f"M{middle:.1f} {TOP}V{HEIGHT - BOTTOM}"))
        # A label that would overlap an earlier one is only a tooltip.
        if all(start + width < left or start > right for left, right in occupied):
            occupied.append((start, start + width))
            parts.append(_text(middle + offset, TOP - 3, label, anchor, "label"))
    for number, (name, values) in enumerate(series.items()):
        # More lines than colors repeat the colors, dashed.
        line_style = f"line c{number % NUM_COLORS}" + (" dashed" if number >= NUM_COLORS else "")
        parts.append(_tag("polyline", class_=line_style, points=" ".join(map(axes.to_point, values))))
        for x, y in values if len(values) <= MAX_DOTTED_POINTS else ():
            tooltip = _tag("title", f"{name}, {x_label} {x:g}: {y:.5g}")
            style = f"dot c{number % NUM_COLORS}"
            parts.append(_tag("circle", tooltip, class_=style, cx=axes.to_x(x), cy=axes.to_y(y), r="2.6"))
    return _svg(title, WIDTH, HEIGHT, [*_legend(list(series)), *parts])


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> Markup:
    """Return a scatter plot of predicted over true values, with the diagonal on which both are equal."""
    # A browser becomes slow with tens of thousands of circles.
    shown = points[:: math.ceil(len(points) / MAX_POINTS)]
    values = [value for point in shown for value in point]
    axes = _Axes((min(values), max(values)), (min(values), max(values)))
    diagonal = f"M{axes.to_point((axes.x[0], axes.x[0]))}L{axes.to_point((axes.x[1], axes.x[1]))}"
    parts = [*axes.draw(x_label), _tag("path", class_="mark", d=diagonal)]
    parts += [_tag("circle", class_="cloud", cx=axes.to_x(x), cy=axes.to_y(y), r="3") for x, y in shown]
    return _svg(title, WIDTH, HEIGHT, [_text(LEFT, 42, y_label, "start"), *parts])


def reliability(title: str, calibration: Calibration, y_label: str = "accuracy") -> Markup:
    """Return a reliability diagram: accuracy over confidence, with one standard error and the count of each bin."""
    axes = _Axes((0, 1), (0, 1))
    largest = max(one.count for one in calibration.bins)
    parts = [
        *axes.draw("predicted probability"),
        _tag("path", class_="mark", d=f"M{axes.to_point((0, 0))}L{axes.to_point((1, 1))}"),
    ]
    for one in calibration.bins:
        # One pixel on each side separates neighboring bars.
        left, right = axes.to_x(one.low) + 1, axes.to_x(one.high) - 1
        top, ground = axes.to_y(one.accuracy), HEIGHT - BOTTOM
        tooltip = (
            f"{one.low:.2f} to {one.high:.2f}: {one.count:,} predictions, "
            f"mean probability {one.confidence:.3f}, {y_label} {one.accuracy:.3f}"
        )
        opacity = f"{0.25 + 0.65 * one.count / largest:.2f}"
        box = {"x": left, "y": top, "width": right - left, "height": ground - top}
        parts.append(_tag("rect", _tag("title", tooltip), class_="bar", fill_opacity=opacity, **box))
        low, high = max(0, one.accuracy - one.standard_error), min(1, one.accuracy + one.standard_error)
        middle = axes.to_x(one.confidence)
        parts.append(_tag("path", class_="whisker", d=f"M{middle:.1f} {axes.to_y(low):.1f}V{axes.to_y(high):.1f}"))
        parts.append(_tag("circle", class_="point", cx=middle, cy=top, r="3"))
        parts.append(_text((left + right) / 2, ground - 5, f"{one.count:,}", "middle", "small"))
    return _svg(title, WIDTH, HEIGHT, [_text(LEFT, 42, y_label, "start"), *parts])


def stacked_bar(title: str, parts: Mapping[str, float], unit: str) -> Markup:
    """Return one bar that is divided into the parts of a total, with a legend."""
    total, left = sum(parts.values()), float(RIGHT)
    shapes = []
    for number, (name, value) in enumerate(parts.items()):
        style, percentage = f"segment c{number % NUM_COLORS}", f"{value / total:.1%}"
        width, y = (WIDTH - 2 * RIGHT) * value / total, 90 + 20 * number
        tooltip = _tag("title", f"{name}: {value:.3g} {unit}, {percentage}")
        shapes.append(_tag("rect", tooltip, class_=style, x=left, y="36", width=width, height="30"))
        shapes.append(_tag("rect", class_=style, x=str(RIGHT), y=str(y - 10), width="11", height="11"))
        shapes.append(_text(RIGHT + 18, y, name, "start"))
        shapes.append(_text(WIDTH - 90, y, f"{_amount(value)} {unit}", "end"))
        shapes.append(_text(WIDTH - RIGHT, y, percentage, "end"))
        left += width
    return _svg(title, WIDTH, 90 + 20 * len(parts), shapes)


def confusion_matrix(title: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Return a confusion matrix: a row for every true class, a column for every predicted class."""
    # Forty classes, the most that the page draws, fit into its width.
    size = max(18, min(64, 620 // len(names)))
    short = [name if len(name) <= MAX_NAME_CHARACTERS else f"{name[: MAX_NAME_CHARACTERS - 1]}…" for name in names]
    name_width = int(7 * max(map(len, short)))
    upright = name_width > size - 4  # names wider than a column are turned by 90 degrees
    left, top = 34 + name_width, 48 + (name_width if upright else 18)
    side = size * len(names)
    center = top + side / 2
    turned = {"transform": f"rotate(-90 12 {center:.1f})"}
    parts = [
        _text(left + side / 2, 42, "predicted", "middle", "label"),
        _tag("text", "true", class_="label", x="12", y=center + 4, text_anchor="middle", **turned),
    ]
    for row, line in enumerate(counts):
        y, x = top + row * size, left + row * size + size / 2
        parts.append(_text(left - 7, y + size / 2 + 4, short[row], "end"))
        if upright:
            parts.append(_tag("text", short[row], x=x, y=str(top - 3), transform=f"rotate(-90 {x:.1f} {top - 7})"))
        else:
            parts.append(_text(x, top - 8, short[row], "middle"))
        for column, count in enumerate(line):
            # The fraction of the true class, not of all examples: small classes are as visible as large ones.
            fraction = count / (sum(line) or 1)
            tooltip = f"{names[row]} predicted as {names[column]}: {count:,} ({fraction:.1%} of the class)"
            cell = {
                "class_": f"cell {'correct' if row == column else 'wrong'}",
                "x": str(left + column * size + 1),
                "y": str(y + 1),
                "width": str(size - 2),
                "height": str(size - 2),
                "rx": "2",
                "fill_opacity": f"{0.06 + 0.94 * fraction:.2f}" if count else "0.04",
            }
            parts.append(_tag("rect", _tag("title", tooltip), **cell))
            if count and size >= MIN_LABELED_CELL:
                style = "on-cell" if fraction > 0.5 else "in-cell"
                middle = left + column * size + size / 2
                parts.append(_text(middle, y + size / 2 + 4, f"{count:,}", "middle", style))
    return _svg(title, max(left + side + 10, 12 + int(7.5 * len(title))), top + side + 10, parts)


def standalone(svg: str) -> str:
    """Return a chart as the content of an SVG file, which includes the style sheet."""
    # In the page, the style sheet and the background are those of the page.
    start = svg.index(">") + 1
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return f"{svg[:start]}<style>{STYLE}</style>{paper}{svg[start:]}\n"


def _tag(tag: str, content: str = "", /, **attributes: str | float) -> Markup:
    """Return an SVG element. Text and attributes are escaped; nested elements are markup already.

    An underscore in the name of an attribute becomes a hyphen, and one at its end is dropped (``class_``). Floats are
    pixels, which are rounded to a tenth.
    """
    pairs = [
        f' {name.rstrip("_").replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else value)}"'
        for name, value in attributes.items()
    ]
    return Markup(f"<{tag}{''.join(pairs)}>{escape(content)}</{tag}>")  # noqa: S704  # every part is escaped


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> Markup:
    styled = {"class_": style} if style else {}
    return _tag("text", text, **styled, x=float(x), y=float(y), text_anchor=anchor)


def _svg(title: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    content = Markup("\n").join([_text(14, 20, title, "start", "title"), *parts])
    return _tag(
        "svg",
        Markup("\n{}\n").format(content),
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=f"0 0 {width} {height}",
        role="img",
        style=f"max-width:{width}px",
        aria_label=title,
    )


def _legend(names: Sequence[str]) -> Iterator[Markup]:
    x, y = float(LEFT), 42
    for number, name in enumerate(names):
        if x + LEGEND_CHARACTER_WIDTH * len(name) > WIDTH and number:
            yield _text(x, y, "…", "start")  # the tooltips of the points name the other lines
            return
        dashed = " dashed" if number >= NUM_COLORS else ""
        yield _tag("path", class_=f"line c{number % NUM_COLORS}{dashed}", d=f"M{x:.1f} {y - 4}h18")
        yield _text(x + 23, y, name, "start")
        x += 23 + LEGEND_CHARACTER_WIDTH * len(name) + 18


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else format_value(float(value), digits=3)


def _extent(bounds: Point, *, log: bool) -> Point:
    """Return the ends of an axis, as decimal logarithms if it is logarithmic; they differ also for equal bounds."""
    low, high = bounds
    if log:
        # A twentieth of a power of ten keeps the lowest and the highest point off the edges of the chart.
        return math.log10(low) - 0.05, math.log10(high) + 0.05
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)


def _ticks(low: float, high: float, *, integers: bool = False) -> list[float]:
    """Return about five round values between two bounds."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    step = max(1.0, math.ceil(step)) if integers else step
    first = math.ceil(low / step - 1e-9)
    # Multiples of a step such as 0.1 are not exact: ten digits are, and print without a tail.
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values between two decimal logarithms: powers of ten, and 2 and 5 times them on a short axis."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    values = (f * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for f in factors)
    return [value for value in values if low <= math.log10(value) <= high]
