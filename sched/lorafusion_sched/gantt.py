"""Draws a simulated run as one self-contained HTML page: a lane per stage, a colour per job."""

from html import escape

from lorafusion_sched.problem import Plan, Stretch
from lorafusion_sched.simulate import Span, Timeline

_LANE, _GAP, _LEFT, _TOP = 46.0, 10.0, 70.0, 34.0  # pixels
_PIXELS_PER_SLOT = 26.0
_LEGEND = 24.0


def gantt_html(plan: Plan, timeline: Timeline, *, title: str, slots: int = 120) -> str:
    """Returns the page.

    A box is the forward (light) or backward (dark) of one slot; its stripes are the jobs in it, as
    high as their share of the tokens. White is waiting.

    Args:
        plan: the plan.
        timeline: its simulation.
        title: heading of the page.
        slots: how many slots from the start are drawn.
    """
    spans = [span for span in timeline.spans if span.slot < slots and span.end > span.start]
    jobs = list(dict.fromkeys(s.job for mb in plan.microbatches for s in mb.stretches))
    hue = {job: round(360 * i / max(1, len(jobs))) for i, job in enumerate(jobs)}
    stages = len(timeline.busy)
    end = max((span.end for span in spans), default=1.0)
    drawn = 1 + max((span.slot for span in spans), default=0)
    width = max(600.0, min(12000.0, drawn * _PIXELS_PER_SLOT * 2))
    lines = _LEGEND * (1 + len(jobs) // 8)
    height = _TOP + stages * (_LANE + _GAP) + lines
    parts = [
        f'<text x="4" y="{_y(stage) + _LANE / 2:.1f}">stage {stage}</text>'
        f'<rect x="{_LEFT}" y="{_y(stage)}" width="{width:.1f}" height="{_LANE}" class="lane"/>'
        for stage in range(stages)
    ]
    parts += [_box(plan, span, hue, width / end) for span in spans]
    parts += [_legend(i, job, hue[job], height - lines) for i, job in enumerate(jobs)]
    heading = (
        f"{escape(title)}: {len(plan.microbatches)} microbatches, utilisation "
        f"{timeline.utilisation:.1%}, bubble {timeline.bubble:.1%}"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>body{font:13px sans-serif;margin:12px} text{font:12px sans-serif} "
        ".lane{fill:none;stroke:#bbb}</style>\n"
        f"<h1>{heading}</h1>\n"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + width + 8:.0f}" '
        f'height="{height:.0f}">\n' + "\n".join(parts) + "\n</svg>\n</html>\n"
    )


def _y(stage: int) -> float:
    return _TOP + stage * (_LANE + _GAP)


def _box(plan: Plan, span: Span, hue: dict[str, int], scale: float) -> str:
    """Draws one forward or backward: a stripe per job, with a tooltip."""
    ranks = plan.microbatches[span.slot * plan.width : (span.slot + 1) * plan.width]
    stretches = [stretch for microbatch in ranks for stretch in microbatch.stretches]
    total = sum(stretch.tokens() for stretch in stretches)
    x, width = _LEFT + span.start * scale, (span.end - span.start) * scale
    y = _y(span.stage)
    light = 72 if span.phase == "F" else 48
    parts = [f"<g><title>{span.phase} of slot {span.slot}: {_contents(stretches)}</title>"]
    for stretch in stretches:
        height = _LANE * stretch.tokens() / total
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(0.1, width - 0.5):.2f}" '
            f'height="{height:.2f}" fill="hsl({hue[stretch.job]},65%,{light}%)"/>'
        )
        y += height
    return "".join([*parts, "</g>"])


def _contents(stretches: list[Stretch]) -> str:
    return ", ".join(
        f"{escape(s.job)} batch {s.batch} ({s.tokens()} tokens{', end' if s.ends else ''})"
        for s in stretches
    )


def _legend(number: int, job: str, hue: int, top: float) -> str:
    x, y = _LEFT + number % 8 * 140, top + _LEGEND * (number // 8)
    return (
        f'<rect x="{x}" y="{y}" width="14" height="14" fill="hsl({hue},65%,55%)"/>'
        f'<text x="{x + 20}" y="{y + 12}">{escape(job)}</text>'
    )
