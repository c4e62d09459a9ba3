"""What stands in a report, read from the run's own files."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from lorafusion_jax.cli.status import job_line, run_state
from lorafusion_jax.cli.view import duration, number
from lorafusion_jax.plots import series, throughput
from lorafusion_jax.report import charts
from lorafusion_jax.report.markup import Child, el, table
from lorafusion_jax.train.comparison import cell
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_sched import Plan, from_json

type Records = Sequence[Mapping[str, Any]]

_LAST_NOTICES = 40
_NOTABLE = ("Notice", "CheckpointSaved", "JobEnded", "RunEnded")


def page(folder: RunFolder) -> Element:
    """Returns the report's body."""
    jobs = list(folder.jobs)
    metrics = {name: folder.metrics(name) for name in jobs}
    events = folder.events()
    plan_file = folder.path / "plan.json"
    plan = from_json(plan_file.read_text(encoding="utf-8")) if plan_file.is_file() else None
    return el(
        "main",
        *_head(folder, events, plan),
        el("h2", "Jobs"),
        _jobs(folder, metrics, events),
        *_sweeps(folder),
        el("h2", "Held-out loss of all jobs"),
        charts.legend(jobs),
        charts.line_chart(_held_out(metrics), x="optimizer step", y="loss", size=(1040, 320)),
        el("h2", "Losses"),
        el("p", "Thin: training, each step. With points: held out.", class_="soft"),
        el("div", *(_losses(name, metrics, jobs) for name in jobs), class_="charts"),
        *([] if plan is None else _use(plan, metrics, jobs)),
        *_samples(folder),
        *_notices(events),
        el("h2", "Configuration"),
        _file(folder, "config.resolved.yaml"),
        el("h2", "Environment"),
        _file(folder, "environment.json", opened=True),
    )


def _head(folder: RunFolder, events: Records, plan: Plan | None) -> list[Element]:
    planned = _last(events, "RunPlanned")
    ended = _last(events, "RunEnded")
    base = folder.config.base
    cards = [
        ("jobs", str(len(folder.jobs))),
        ("base", f"{base.model.rstrip('/').rpartition('/')[2]}, {base.dtype}"),
    ]
    if plan is not None:
        cards.append(("rows that hold tokens", f"{_filled(plan):.1%}"))
    if planned:
        cards.append(("the same, one job at a time", f"{1 - planned['padding_alone']:.1%}"))
        cards.append(("microbatches", f"{planned['microbatches']:,}"))
    if ended:
        cards.append(("time of the last process", duration(ended["seconds"])))
        if ended["seconds"] > 0:
            cards.append(("real tokens per second", f"{ended['tokens'] / ended['seconds']:,.0f}"))
        if ended["peak_bytes"]:
            cards.append(("device memory", f"{ended['peak_bytes'] / 2**30:.1f} GiB"))
    state = run_state(list(map(dict, events)), time.time())
    return [
        el("h1", folder.path.resolve().name),
        el("p", f"{state}. Written by lorafusion report.", class_="soft"),
        el(
            "div",
            *(el("div", el("b", value), name, class_="card") for name, value in cards),
            class_="cards",
        ),
    ]


def _last(events: Records, kind: str) -> Mapping[str, Any] | None:
    return next((event for event in reversed(events) if event["event"] == kind), None)


def _filled(plan: Plan) -> float:
    rows = sum(m.capacity for m in plan.microbatches)
    tokens = sum(s.tokens() for m in plan.microbatches for s in m.stretches)
    return tokens / rows if rows else 0.0


def _jobs(
    folder: RunFolder, metrics: Mapping[str, list[dict[str, Any]]], events: list[dict[str, Any]]
) -> Element:
    headings = ["job", "r", "steps", "loss", "held out: base", "best", "last"]
    headings += ["exact: base", "last", "rejected", "state"]
    rows: list[Sequence[Child]] = []
    for name, job in folder.jobs.items():
        line = job_line(metrics[name], events, name)
        held_out = [m for m in metrics[name] if m.get("eval_loss") is not None]
        trained = [m["eval_loss"] for m in held_out if m["step"]]
        base = next((m for m in held_out if not m["step"]), {})
        rejected = sum(m.get("applied") is False for m in metrics[name])
        rows.append(
            [
                name,
                str(job.lora.r),
                f"{line.step}/{line.total}",
                number(line.loss, ".4f"),
                number(base.get("eval_loss"), ".4f"),
                number(min(trained, default=None), ".4f"),
                number(trained[-1] if trained else None, ".4f"),
                number(base.get("exact_match"), ".0%"),
                number(held_out[-1].get("exact_match") if trained else None, ".0%"),
                str(rejected),
                line.note or "training",
            ]
        )
    return table(headings, rows)


def _sweeps(folder: RunFolder) -> list[Element]:
    """Returns the comparison of each sweep, the lowest held-out loss first."""
    path = folder.path / "sweep.json"
    if not path.is_file():
        return []
    parts = [el("h2", "Sweeps")]
    for name, rows in json.loads(path.read_text(encoding="utf-8")).items():
        headings = [key.replace("_", " ") for key in rows[0]]
        parts += [el("h3", name), table(headings, [[*map(cell, row.values())] for row in rows])]
    return parts


def _held_out(metrics: Mapping[str, Records]) -> list[charts.Line]:
    colors = charts.colors_of(list(metrics))
    return [
        charts.Line(_points(records, "eval_loss"), colors[name], name)
        for name, records in metrics.items()
    ]


def _points(records: Records, key: str) -> list[tuple[float, float]]:
    return list(zip(*series(records, key), strict=True))


def _losses(name: str, metrics: Mapping[str, Records], jobs: Sequence[str]) -> Element:
    color = charts.colors_of(jobs)[name]
    records = metrics[name]
    lines = [
        charts.Line(_points(records, "loss"), color, f"{name}, training", "thin"),
        charts.Line(_points(records, "eval_loss"), color, f"{name}, held out"),
    ]
    marks = [record["step"] for record in records if record.get("applied") is False]
    chart = charts.line_chart(lines, x="optimizer step", y="loss", marks=marks, size=(420, 240))
    return el("section", el("h3", name), chart)


def _use(plan: Plan, metrics: Mapping[str, Records], jobs: Sequence[str]) -> list[Element]:
    xs, ys = throughput(plan, metrics)
    speed = list(zip(map(float, xs), ys, strict=True))
    median = f"Median {statistics.median(ys):,.0f}." if ys else ""
    return [
        el("h2", "Utilisation"),
        charts.legend(jobs),
        el("p", "Rows of each microbatch that hold tokens; the rest is padding.", class_="soft"),
        charts.share_chart(plan, jobs),
        el("p", f"Real tokens per second, between lines of the metrics. {median}", class_="soft"),
        charts.line_chart(
            [charts.Line(speed, 0, "tokens per second", "thin")],
            x="microbatch",
            y="tokens per second",
            from_zero=True,
            size=(1040, 200),
        ),
        el("h2", "Packing"),
        el(
            "p",
            "The first microbatches, sample by sample; grey is padding. Where a job's global batch "
            "ends stands a bar: there its optimizer steps.",
            class_="soft",
        ),
        charts.packing(plan, jobs),
    ]


def _samples(folder: RunFolder) -> list[Element]:
    parts = []
    for name in folder.jobs:
        path = folder.job(name) / "samples.md"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            parts.append(el("h3", name))
            parts.append(el("pre", text.removeprefix(f"## {name}").strip("\n")))
    return [el("h2", "Samples"), *parts] if parts else []


def _notices(events: Records) -> list[Element]:
    shown = [event for event in events if event["event"] in _NOTABLE][-_LAST_NOTICES:]
    lines = [
        time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(event["time"])) + _words(event)
        for event in shown
    ]
    return [el("h2", "What happened"), el("pre", "\n".join(lines))] if lines else []


def _words(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "Notice":
            return event["message"]
        case "CheckpointSaved":
            return f"checkpoint {event['step']} saved in {event['seconds']:.1f} s"
        case "JobEnded":
            return f"{event['job']} {event['status']} after {event['step']} steps"
    return f"{event['tokens']:,} tokens in {duration(event['seconds'])}"


def _file(folder: RunFolder, name: str, *, opened: bool = False) -> Element:
    path = folder.path / name
    text = path.read_text(encoding="utf-8") if path.is_file() else "not written"
    if name.endswith(".json") and path.is_file():
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return el("details", el("summary", name), el("pre", text), open="" if opened else None)
