"""Draws the pictures of the site: plans from the planner itself, and how the kernels fit together.

    python docs/pictures/make.py [FOLDER]    # beside this file by default

Same input, same bytes; a test compares them with what is committed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from lorafusion_jax.bench.schedule import jobs_of, problem_of
from lorafusion_jax.report.charts import colors_of, packing
from lorafusion_jax.report.markup import el, picture
from lorafusion_sched import Cost, Plan, plan, simulate
from lorafusion_sched.baselines import megatron

WIDTH = 1040


def pictures() -> dict[str, str]:
    """Returns every picture by file name."""
    jobs = jobs_of("het", 8, seed=0)
    names = [job.name for job in jobs]
    one_device = plan(problem_of(jobs, 8192, 1, "1f1b"))
    pipeline = problem_of(jobs, 6144, 4, "1f1b")
    return {
        "packing.svg": picture(packing(one_device, names, rows=12, width=WIDTH)),
        "gantt_ours.svg": picture(gantt(plan(pipeline), names)),
        "gantt_alone.svg": picture(gantt(megatron(pipeline), names)),
        "forward.svg": picture(forward()),
        "backward.svg": picture(backward()),
    }


def gantt(made: Plan, names: Sequence[str], stages: int = 4, slots: int = 44) -> Element:
    """Draws the first slots of a plan on a simulated pipeline; empty is waiting."""
    timeline = simulate(made, Cost(whole_bucket=False), stages)
    spans = [span for span in timeline.spans if span.slot < slots and span.end > span.start]
    scale = (WIDTH - 70) / max(span.end for span in spans)
    colors = colors_of(names)
    parts = []
    for stage in range(stages):
        parts.append(el("text", f"stage {stage}", x=0, y=26 + 40 * stage))
        parts.append(el("rect", x=62, y=6 + 40 * stage, width=WIDTH - 70, height=32, class_="grid"))
    for span in spans:
        stretches = [
            s
            for m in made.microbatches[span.slot * made.width : (span.slot + 1) * made.width]
            for s in m.stretches
        ]
        total = sum(s.tokens() for s in stretches)
        y = 6.0 + 40 * span.stage
        for stretch in stretches:
            height = 32 * stretch.tokens() / total
            parts.append(
                el(
                    "rect",
                    x=62 + span.start * scale,
                    y=y,
                    width=max(0.3, (span.end - span.start) * scale - 0.7),
                    height=height,
                    class_=f"f{colors[stretch.job]}",
                    opacity=0.55 if span.phase == "F" else 1,
                )
            )
            y += height
    words = f"whole run: utilisation {timeline.utilisation:.1%}, waiting {timeline.bubble:.1%}"
    parts.append(el("text", words, x=62, y=40 * stages + 22, class_="name"))
    return drawing(parts, 40 * stages + 32)


def forward() -> Element:
    """Draws the forward pass of projections that share their input."""
    return drawing(
        [
            *box(20, 70, 130, 70, "X", "tokens of all jobs", color=9),
            *arrow(150, 90, 230, 50),
            *arrow(150, 105, 470, 122),
            *box(230, 15, 190, 70, "down", "drop(X) A, once for q, k, v", color=0),
            *arrow(420, 50, 470, 100, "S: rank columns"),
            *box(470, 80, 260, 100, "base_up", "one accumulator: X W, then S B", color=1),
            *box(230, 145, 190, 44, "W (frozen), B", None, color=9),
            *arrow(420, 165, 470, 160),
            *arrow(730, 130, 820, 130),
            *box(820, 95, 200, 70, "Y = X W + s S B", "written once", color=9),
            *note(
                20, 205, "Kept for the backward pass: X (the graph holds it anyway), S, row keys."
            ),
            *note(20, 224, "Never stored: drop(X) and its mask, which are made in registers."),
        ],
        236,
    )


def backward() -> Element:
    """Draws the backward pass."""
    return drawing(
        [
            *box(20, 20, 130, 60, "dY", "read once", color=9),
            *box(20, 150, 130, 60, "X", "read once", color=9),
            *arrow(150, 50, 230, 50),
            *box(230, 20, 200, 60, "grad_up", "dS = dY B, dB = S dY", color=2),
            *arrow(430, 50, 520, 50, "dB"),
            *box(520, 20, 180, 60, "dB of each job", "ordered sums", color=9),
            *arrow(330, 80, 330, 150, "dS"),
            *arrow(150, 180, 230, 180),
            *box(230, 150, 200, 60, "grad_down", "dA = dS drop(X)", color=3),
            *arrow(430, 180, 520, 180, "dA"),
            *box(520, 150, 180, 60, "dA of each job", "ordered sums", color=9),
            *arrow(430, 78, 760, 118),
            *note(716, 104, "dS"),
            *box(760, 85, 260, 70, "dx", "starts from mask (dS A), adds dY W", color=1),
            *arrow(890, 155, 890, 185),
            *note(846, 204, "dX, written once"),
            *note(20, 240, "A and B are f32 masters; W has no gradient and no buffer for one."),
        ],
        252,
    )


def box(x: float, y: float, width: float, height: float, title: str, text: str | None, *, color):
    """Draws a box with a title, and a line of text below it."""
    middle = y + height / 2 + (4 if text is None else -4)
    yield el("rect", x=x, y=y, width=width, height=height, rx=6, class_=f"f{color}", opacity=0.22)
    yield el("rect", x=x, y=y, width=width, height=height, rx=6, class_=f"s{color}")
    yield el("text", title, x=x + width / 2, y=middle, text_anchor="middle", class_="name strong")
    if text is not None:
        yield el("text", text, x=x + width / 2, y=middle + 18, text_anchor="middle")


def arrow(x: float, y: float, to_x: float, to_y: float, text: str | None = None):
    """Draws an arrow, with a word above its middle."""
    length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
    ux, uy = (to_x - x) / length, (to_y - y) / length
    back_x, back_y = to_x - 9 * ux, to_y - 9 * uy
    head = (
        f"M{to_x:.1f},{to_y:.1f}L{back_x - 4 * uy:.1f},{back_y + 4 * ux:.1f}"
        f"L{back_x + 4 * uy:.1f},{back_y - 4 * ux:.1f}Z"
    )
    yield el("path", d=f"M{x:.1f},{y:.1f}L{back_x:.1f},{back_y:.1f}", class_="s9")
    yield el("path", d=head, class_="f9")
    if text is not None:
        yield el("text", text, x=(x + to_x) / 2 + 6, y=(y + to_y) / 2 - 6)


def note(x: float, y: float, text: str):
    """Draws a line of text."""
    yield el("text", text, x=x, y=y)


def drawing(parts: Sequence[Element], height: float) -> Element:
    """Returns the parts as one picture of the site's width."""
    return el("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", width=WIDTH, role="img")


def main(arguments: Sequence[str]) -> None:
    """Writes the pictures."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    for name, text in pictures().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
