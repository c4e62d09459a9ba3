"""Drawings of a report as SVG: lines, filled shares, and what is packed where."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from lorafusion_jax.report.markup import COLORS, el
from lorafusion_sched import Microbatch, Plan

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 34.0
_MOST_POINTS = 400


class Line(NamedTuple):
    """A curve.

    Attributes:
        points: (x, y) in order of x.
        color: class number.
        name: what it shows, for its tooltip.
        style: "thin" for measurements at every step, "bold" for few points, which are marked.
    """

    points: Sequence[tuple[float, float]]
    color: int
    name: str
    style: str = "bold"


class _Frame(NamedTuple):
    """Where data are drawn."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            _LEFT + across * (self.width - _LEFT - _RIGHT),
            self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM),
        )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns at most `most` + 1 round numbers (1, 2 or 5 times a power of ten) in a range.

    >>> ticks(0.9, 3.1)
    [1.0, 1.5, 2.0, 2.5, 3.0]
    """
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points, or where there are very many the means of equal groups of them."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def line_chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    marks: Sequence[float] = (),
    from_zero: bool = False,
    size: tuple[float, float] = (640, 300),
) -> Element:
    """Draws curves over one pair of axes.

    Args:
        lines: the curves; points that are not finite must have been left out.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        marks: places on the horizontal axis where something went wrong.
        from_zero: the vertical axis starts at zero.
        size: width and height in pixels.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return _nothing(size)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    frame = _Frame(*size, _span(min(xs), max(xs)), _span(0.0 if from_zero else min(ys), max(ys)))
    parts = _axes(frame, x, y)
    for line in lines:
        placed = [frame.place(*point) for point in thinned(line.points)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        last = f", {line.points[-1][1]:.4g} at the end" if line.points else ""
        title = el("title", line.name + last)
        parts.append(el("polyline", title, points=path, class_=f"s{line.color} {line.style}"))
        if line.style == "bold":
            dot = f"f{line.color}"
            parts += [el("circle", cx=px, cy=py, r=2.5, class_=dot) for px, py in placed]
    for mark in marks:
        px, py = frame.place(mark, frame.y[0])
        cross = f"M{px - 4:.1f},{py - 8:.1f}l8,8m0,-8l-8,8"
        parts.append(el("path", el("title", "rejected: not finite"), d=cross, class_="bad"))
    return _svg(size, parts, f"{y} over {x}")


def share_chart(plan: Plan, jobs: Sequence[str], *, size: tuple[float, float] = (1040, 220)):
    """Draws the share of each microbatch's rows that hold tokens, by job; blank is padding."""
    count = len(plan.microbatches)
    if not count:
        return _nothing(size)
    frame = _Frame(*size, (0.0, float(count)), (0.0, 1.0))
    parts = _axes(frame, "microbatch", "real tokens / rows", percent=True)
    group = -(-count // 200)
    colors = colors_of(jobs)
    for start in range(0, count, group):
        chunk = plan.microbatches[start : start + group]
        rows = sum(m.capacity for m in chunk)
        base = 0.0
        for job in jobs:
            tokens = sum(s.tokens() for m in chunk for s in m.stretches if s.job == job)
            if not tokens:
                continue
            left, low = frame.place(start, base)
            right, high = frame.place(start + len(chunk), base + tokens / rows)
            base += tokens / rows
            title = el("title", f"{job}: {tokens / rows:.1%} of microbatch {start}")
            parts.append(
                el(
                    "rect",
                    title,
                    x=left,
                    y=high,
                    width=max(0.4, right - left - (0.6 if right - left > 3 else 0)),
                    height=low - high,
                    class_=f"f{colors[job]}",
                )
            )
    return _svg(size, parts, "share of rows that hold tokens, by job")


def packing(plan: Plan, jobs: Sequence[str], *, rows: int = 24, width: float = 1040) -> Element:
    """Draws the first microbatches as bars of their samples; grey is padding.

    A white gap parts samples; a dark bar at the end of a stretch ends its job's global batch, after
    which that job's optimizer steps.

    Args:
        plan: the plan.
        jobs: names in the order of their colours.
        rows: microbatches to draw.
        width: of the drawing in pixels.
    """
    shown = plan.microbatches[:rows]
    if not shown:
        return _nothing((width, 60))
    most = max(m.capacity for m in shown)
    scale = (width - _LEFT - _RIGHT) / most
    colors = colors_of(jobs)
    parts = []
    for i, microbatch in enumerate(shown):
        top = 4.0 + 18 * i
        parts.append(el("text", str(i), x=_LEFT - 8, y=top + 11, text_anchor="end"))
        parts.append(
            el("rect", x=_LEFT, y=top, width=microbatch.capacity * scale, height=14, class_="pad")
        )
        parts += _bar(microbatch, plan.tile, top, scale, colors)
    height = 4.0 + 18 * len(shown) + 20
    parts += [
        el("text", "0", x=_LEFT, y=height - 6),
        el("text", f"{most:,} rows", x=width - _RIGHT, y=height - 6, text_anchor="end"),
    ]
    return _svg((width, height), parts, f"contents of the first {len(shown)} microbatches")


def _bar(
    microbatch: Microbatch, tile: int, top: float, scale: float, colors: Mapping[str, int]
) -> list[Element]:
    parts, start = [], 0
    for stretch in microbatch.stretches:
        place = start
        for sample in stretch.samples:
            title = f"{stretch.job}, batch {stretch.batch}, sample {sample.index}: "
            parts.append(
                el(
                    "rect",
                    el("title", f"{title}{sample.length} tokens"),
                    x=_LEFT + place * scale,
                    y=top,
                    width=max(0.3, sample.length * scale),
                    height=14,
                    class_=f"f{colors.get(stretch.job, 0)} edge",
                )
            )
            place += sample.length
        if stretch.ends:
            x = _LEFT + place * scale - 1.5
            title = el("title", f"{stretch.job}: batch {stretch.batch} ends, the optimizer steps")
            parts.append(el("rect", title, x=x, y=top - 1, width=3, height=16, class_="name"))
        start += -(-stretch.tokens() // tile) * tile
    return parts


def colors_of(jobs: Sequence[str]) -> dict[str, int]:
    """Returns the colour class of each job."""
    return {job: i % COLORS for i, job in enumerate(jobs)}


def legend(jobs: Sequence[str]) -> Element:
    """Returns the names of the jobs beside their colours."""
    entries = [
        el(
            "span",
            el("svg", el("rect", width=12, height=12, class_=f"f{color}"), viewBox="0 0 12 12"),
            job,
        )
        for job, color in colors_of(jobs).items()
    ]
    return el("div", *entries, class_="legend")


def _span(low: float, high: float) -> tuple[float, float]:
    """Widens a range that has no extent."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _axes(frame: _Frame, x: str, y: str, *, percent: bool = False) -> list[Element]:
    parts = []
    for value in ticks(*frame.y):
        _, py = frame.place(frame.x[0], value)
        text = f"{value:.0%}" if percent else f"{value:,.10g}"
        parts.append(el("path", d=f"M{_LEFT},{py:.1f}H{frame.width - _RIGHT}", class_="grid"))
        parts.append(el("text", text, x=_LEFT - 8, y=py + 4, text_anchor="end"))
    for value in ticks(*frame.x, most=8):
        if value == round(value):  # steps and microbatches are whole
            px, py = frame.place(value, frame.y[0])
            parts.append(el("text", f"{value:,.0f}", x=px, y=py + 16, text_anchor="middle"))
    parts.append(el("text", x, x=frame.width - _RIGHT, y=frame.height - 2, text_anchor="end"))
    parts.append(el("title", f"{y} over {x}"))
    return parts


def _nothing(size: tuple[float, float]) -> Element:
    return _svg((size[0], 60.0), [el("text", "nothing measured yet", x=12, y=34)], "empty")


def _svg(size: tuple[float, float], parts: Sequence[Element], label: str) -> Element:
    return el(
        "svg",
        *parts,
        viewBox=f"0 0 {size[0]:g} {size[1]:g}",
        width=f"{size[0]:g}",
        role="img",
        aria_label=label,
    )
