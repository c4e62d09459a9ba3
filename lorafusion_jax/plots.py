"""Figures of a run: loss.png of each job and of all, utilisation.png. Drawn without a display."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafusion_sched import Plan, Timeline
from lorafusion_sched.simulate import Span

type Records = Sequence[Mapping]

_DPI = 120


def series(records: Records, key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Returns (x, y) of the records that hold a finite `key`."""
    points = [(r[x], r[key]) for r in records if r.get(x) is not None and _finite(r.get(key))]
    return [p[0] for p in points], [p[1] for p in points]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _draw_loss(axes: Axes, records: Records, name: str, color: str | None = None) -> None:
    steps, loss = series(records, "loss")
    (line,) = axes.plot(steps, loss, linewidth=0.8, alpha=0.5, color=color, label=f"{name}, train")
    steps, loss = series(records, "eval_loss")
    axes.plot(
        steps, loss, marker="o", markersize=3, color=line.get_color(), label=f"{name}, held out"
    )


def _finish(figure: Figure, axes: Axes, path: Path, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, *, legend_outside: bool = False) -> Path:
    """Writes a PNG file, whose bytes are equal for equal data; returns its path.

    Args:
        figure: to write.
        path: its folder is made if need be.
        legend_outside: the figure has a legend outside its axes, to be given room.
    """
    if legend_outside:
        figure.set_layout_engine("constrained")
    else:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The library's version and date would differ.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def plot_job(records: Records, name: str, path: Path) -> None:
    """Draws one job's training and held-out loss over its optimizer steps.

    Args:
        records: lines of the job's metrics.jsonl (step, loss, eval_loss).
        name: the job's name.
        path: PNG file to write.
    """
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    _draw_loss(axes, records, name)
    _finish(figure, axes, path, "optimizer step", "loss per supervised token")


def plot_jobs(jobs: Mapping[str, Records], path: Path) -> None:
    """Draws every job's losses into one figure.

    Args:
        jobs: records of each job by name.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for i, (name, records) in enumerate(jobs.items()):
        _draw_loss(axes, records, name, f"C{i % 10}")
    _finish(figure, axes, path, "optimizer step of the job", "loss per supervised token")


def plot_utilisation(plan: Plan, jobs: Mapping[str, Records], path: Path) -> None:
    """Draws what each microbatch holds, by job, and the real tokens trained per second.

    Args:
        plan: the run's plan.
        jobs: records of each job by name (microbatch, time).
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    index = range(len(plan.microbatches))
    base = [0.0] * len(plan.microbatches)
    for i, name in enumerate(jobs):
        share = [
            sum(s.tokens() for s in m.stretches if s.job == name) / m.capacity
            for m in plan.microbatches
        ]
        heights = [b + s for b, s in zip(base, share, strict=True)]
        top.fill_between(
            index, base, heights, step="mid", color=f"C{i % 10}", label=name, linewidth=0
        )
        base = heights
    top.set_ylim(0, 1)
    top.set_ylabel("real tokens / capacity")
    filled = sum(base) / max(len(base), 1)
    top.set_title(f"filled {filled:.1%} on average", fontsize="medium", loc="left")
    if jobs:
        top.legend(fontsize="small", ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    bottom.plot(*throughput(plan, jobs), drawstyle="steps-pre")
    bottom.set_ylim(bottom=0)
    _finish(figure, bottom, path, "microbatch", "real tokens per second")


def throughput(plan: Plan, jobs: Mapping[str, Records]) -> tuple[list[int], list[float]]:
    """Returns (microbatch, real tokens per second since the record before it).

    A resumed run has a gap in time there; a speed across it would mean nothing, but it is only one
    point of the curve.
    """
    done = [0]
    for microbatch in plan.microbatches:
        done.append(done[-1] + sum(s.tokens() for s in microbatch.stretches))
    times: dict[int, float] = {}
    for records in jobs.values():
        for record in records:
            if 0 <= record["microbatch"] < len(plan.microbatches):
                at = record["microbatch"]
                times[at] = max(record["time"], times.get(at, 0.0))
    points = sorted(times.items())
    xs, ys = [], []
    for (before, start), (at, stop) in pairwise(points):
        if stop > start:
            xs.append(at)
            ys.append((done[at + 1] - done[before + 1]) / (stop - start))
    return xs, ys


def plot_gantt(
    runs: Mapping[str, tuple[Plan, Timeline]],
    path: Path,
    *,
    until: float | None = None,
    unit: str = "simulated time",
) -> None:
    """Draws pipelines, simulated or measured, below each other: a lane per stage, a stripe per job.

    Forwards are light, backwards dark, waiting is white; all runs share one axis of time.

    Args:
        runs: a plan and how it ran by title.
        path: PNG file to write.
        until: time at which the picture ends; by default that of the 40th slot of the first run.
        unit: what stands at the axis of time.
    """
    if until is None:
        first = next(iter(runs.values()))[1]
        until = max((s.end for s in first.spans if s.slot < 40), default=1.0)
    heights = [len(timeline.busy) for _, timeline in runs.values()]
    figure = Figure(figsize=(11, 0.6 + sum(0.35 * h + 0.55 for h in heights)))
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)
    jobs = dict.fromkeys(
        s.job for plan, _ in runs.values() for m in plan.microbatches for s in m.stretches
    )
    colour = {job: f"C{i % 10}" for i, job in enumerate(jobs)}
    for axes, (title, (plan, timeline)) in zip(panels[:, 0], runs.items(), strict=True):
        for span in timeline.spans:
            if span.start < until and span.end > span.start:
                _draw_span(axes, plan, span, colour)
        axes.set_ylim(len(timeline.busy) - 0.5, -0.5)
        axes.set_yticks(range(len(timeline.busy)))
        axes.set_ylabel("stage")
        axes.set_title(
            f"{title}: utilisation {timeline.utilisation:.1%}, bubble {timeline.bubble:.1%}",
            fontsize="medium",
            loc="left",
        )
    for job in jobs:
        panels[0, 0].bar(0, 0, color=colour[job], label=job)
    panels[0, 0].set_xlim(0, until)
    panels[0, 0].legend(
        fontsize="small", ncols=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.2
    )
    panels[-1, 0].set_xlabel(unit)
    save_figure(figure, path)


def _draw_span(axes: Axes, plan: Plan, span: Span, colour: Mapping[str, str]) -> None:
    """Draws a forward or backward of a slot, cut into its jobs by their tokens."""
    ranks = plan.microbatches[span.slot * plan.width : (span.slot + 1) * plan.width]
    stretches = [stretch for microbatch in ranks for stretch in microbatch.stretches]
    total = sum(stretch.tokens() for stretch in stretches)
    low = span.stage - 0.42
    for stretch in stretches:
        height = 0.84 * stretch.tokens() / total
        axes.barh(
            low,
            span.end - span.start,
            height,
            span.start,
            align="edge",
            color=colour[stretch.job],
            alpha=0.45 if span.phase == "F" else 0.95,
            linewidth=0,
        )
        low += height
    axes.plot([span.start] * 2, [span.stage - 0.42, span.stage + 0.42], color="white", lw=0.6)
