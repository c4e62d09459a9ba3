"""What the results file of `bench schedule` says: tables, the bars that it must reach, a figure."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.report import markdown_table
from lorafusion_jax.bench.results import RESULTS, Row, write_results
from lorafusion_jax.plots import save_figure

_IDENTITY = ("part", "lengths", "stages", "gbs", "capacity", "planner", "seed", "clock")
_IDENTITY += ("whole_bucket", "attention_share")
_RIVALS = ("megatron", "mlora", "lorafusion", "lorafusion_our_packing")
_OURS = ("ours_full", "ours")
_LORAFUSION = {
    "lorafusion_ffd": "first-fit decreasing",
    "lorafusion_our_packing": "our packing",
    "lorafusion": "the programs",
}


def write_measured(rows: list[Row], *, add: bool, root: Path = RESULTS) -> Path:
    """Writes `cpu/schedule.json`.

    Args:
        rows: measured now.
        add: keep the rows of the file that were not measured now, and the commands that made them.
        root: folder of all results.
    """
    path = root / "cpu" / "schedule.json"
    if not (add and path.exists()):
        return write_results("schedule", rows, device="cpu", root=root)
    old, known = json.loads(path.read_text()), {_identity(row) for row in rows}
    kept = [row for row in old["rows"] if _identity(row) not in known]
    write_results("schedule", kept + rows, device="cpu", root=root)
    record = json.loads(path.read_text())
    commands = [*old["command"].split("; "), record["command"]]
    command = "; ".join(dict.fromkeys(commands))
    return write_results("schedule", kept + rows, command=command, device="cpu", root=root)


def _identity(row: Row) -> tuple:
    return tuple(row.get(key) for key in _IDENTITY)


def report(rows: Sequence[Row]) -> str:
    """Returns all tables and bars as text; parts that were not measured are left out."""
    parts = {
        "packing": _packing,
        "pipeline": _pipeline,
        "auto": _auto,
        "balance": _balance,
    }
    texts = []
    for part, text in parts.items():
        if mine := [row for row in rows if row["part"] == part]:
            texts.append(text(mine))
    return "\n\n".join(texts)


def bars(rows: Sequence[Row]) -> dict[str, bool]:
    """Returns every bar that these rows can show, and whether it is reached."""
    found: dict[str, bool] = {}
    packing = [row for row in rows if row["part"] == "packing"]
    if packing:
        ours = _by(packing, planner="ours")
        milp, shared = _shared(packing, "milp")
        times = _mean(shared, "plan_seconds"), _mean(milp, "plan_seconds")
        fewer = sum(_sum(_by(packing, planner=p), "fewer_than_ours") for p in ("ffd", "milp"))
        found |= {
            "bins: never more than first-fit decreasing or the programs": fewer == 0,
            "bins: mean within 0.5% of the bound": _mean(ours, "bins_over_bound") <= 0.005,
            "planning one batch and group takes at most 20 ms": _most(ours) <= 0.02,
            "planning is at least 100 times faster than the programs": times[0] * 100 <= times[1],
        }
    for rival, packed_by in _LORAFUSION.items():
        if gains := _gains(rows, rival):
            text = f"utilisation: at least LoRAFusion's ({packed_by}) in every cell"
            found[text] = min(gains) >= 1
            found["utilisation: at least 5% better on average"] = _average(gains) >= 1.05
    for stages, least in ((4, 0.93), (8, 0.88)):
        for whole in (False, True):
            auto = _by(rows, part="auto", stages=stages, whole_bucket=whole)
            if large := [row for row in auto if _number(row, "gbs") >= 16]:
                text = f"utilisation: chosen capacity, S={stages}, {_shape(whole)}: {least}"
                found[text] = _mean(large, "utilisation") >= least
    if ours := [row for row in rows if row["part"] == "pipeline" and row["planner"] in _OURS]:
        found["no plan of ours breaks a rule"] = _sum(ours, "violations") == 0
    if spreads := _spreads([row for row in rows if row["part"] == "balance"]):
        halved = all(2 * by_time <= by_tokens for by_tokens, by_time in spreads.values())
        found["spread of microbatch times is halved"] = halved
    return found


def _packing(rows: list[Row]) -> str:
    lines = []
    for planner in dict.fromkeys(str(row["planner"]) for row in rows):
        mine, ours = _shared(rows, planner)
        pairs = list(zip(mine, ours, strict=True))
        more = sum(_number(a, "microbatches") > _number(b, "microbatches") for a, b in pairs)
        less = sum(_number(a, "microbatches") < _number(b, "microbatches") for a, b in pairs)
        equal = [(a, b) for a, b in pairs if a["microbatches"] == b["microbatches"]]
        fuller = sum(_number(a, "tail_rows") > _number(b, "tail_rows") for a, b in equal)
        emptier = sum(_number(a, "tail_rows") < _number(b, "tail_rows") for a, b in equal)
        mean, most = 1000 * _mean(mine, "plan_seconds"), 1000 * _most(mine)
        cells = [planner, len(mine), f"{_mean(mine, 'bins_over_bound'):.2%}", f"{more} / {less}"]
        cells += [f"{fuller} / {emptier}", f"{mean:.1f}", f"{most:.1f}"]
        ratio = _mean(mine, "plan_seconds") / _mean(ours, "plan_seconds")
        lines.append([*map(str, cells), f"{ratio:.2f}"])
    headings = ["packer", "instances", "bins over bound", "more / fewer bins than ours"]
    headings += ["last bin fuller / emptier", "ms, mean", "ms, most", "time / ours"]
    return _section("Packing one global batch of two jobs", headings, lines, rows)


def _pipeline(rows: list[Row]) -> str:
    cells = _cells(rows)
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    lines = [
        [", ".join(map(str, key)), *(f"{cell[n]:.3f}" if n in cell else "" for n in names)]
        for key, cell in cells.items()
    ]
    mean = [_average([cell[n] for cell in cells.values() if n in cell]) for n in names]
    lines.append(["mean", *(f"{value:.3f}" for value in mean)])
    seconds = [_number(row, "plan_seconds") / 40 for row in _by(rows, planner="ours")]
    padding = _mean(_by(rows, planner="ours"), "padding")
    notes = [
        f"planning a whole run, per batch of two jobs: mean {1000 * _average(seconds):.1f} ms, "
        f"most {1000 * max(seconds):.1f} ms",
        f"padding {padding:.2%} of the tokens",
    ]
    title = "Utilisation of four jobs of 20 global batches, by S, GBS, C, lengths"
    return _section(title, ["", *names], lines, rows) + "\n" + "\n".join(notes)


def _auto(rows: list[Row]) -> str:
    lines = []
    for stages in sorted({_number(row, "stages") for row in rows}):
        for gbs in sorted({_number(row, "gbs") for row in rows}):
            line = [f"{stages:.0f}", f"{gbs:.0f}"]
            for whole in (False, True):
                mine = _by(rows, stages=stages, gbs=gbs, whole_bucket=whole)
                least = min(_number(row, "utilisation") for row in mine)
                line += [f"{_mean(mine, 'utilisation'):.3f}", f"{least:.3f}"]
            lines.append(line)
    headings = ["S", "GBS", f"{_shape(False)}: mean", "least", f"{_shape(True)}: mean", "least"]
    return _section("Utilisation with the capacity chosen by the planner", headings, lines, rows)


def _balance(rows: list[Row]) -> str:
    lines = []
    for share, (by_tokens, by_time) in _spreads(rows).items():
        used = [
            _mean(_by(rows, attention_share=share, planner=planner), "utilisation")
            for planner in ("token packing", "ours")
        ]
        cells = [f"{1 + by_tokens:.3f}", f"{1 + by_time:.3f}", *(f"{u:.3f}" for u in used)]
        lines.append([str(share), *cells])
    headings = ["attention share", "largest / mean time, by tokens", "by time"]
    headings += ["utilisation, by tokens", "by time"]
    return _section("Packing long-tailed lengths by time", headings, lines, rows)


def _section(title: str, headings: list[str], lines: list[list[str]], rows: list[Row]) -> str:
    held = [f"{'holds' if good else 'FAILS':6} {bar}" for bar, good in bars(rows).items()]
    return "\n".join([title, "", markdown_table(headings, lines), "", *held])


def _cells(rows: Iterable[Row]) -> dict[tuple, dict[str, float]]:
    """Mean utilisation over the seeds, by cell and planner."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        key = row["stages"], row["gbs"], row["capacity"], row["lengths"]
        name = str(row["planner"])
        if row["clock"] != "1f1b":
            name += f", {row['clock']}"
        found.setdefault(key, {}).setdefault(name, []).append(_number(row, "utilisation"))
    return {
        key: {name: _average(values) for name, values in cell.items()}
        for key, cell in found.items()
    }


def _gains(rows: Sequence[Row], rival: str) -> list[float]:
    """Our utilisation over a rival's in each cell, means over the seeds that both have."""
    clocked = _by(rows, part="pipeline", clock="1f1b")
    theirs = _by(clocked, planner=rival)
    keys = ("stages", "gbs", "capacity", "lengths", "seed")
    same = {tuple(row[k] for k in keys) for row in theirs}
    ours = [r for r in _by(clocked, planner="ours") if tuple(r[k] for k in keys) in same]
    mine, other = _cells(ours), _cells(theirs)
    return [mine[key]["ours"] / other[key][rival] for key in other]


def _spreads(rows: Iterable[Row]) -> dict[float, tuple[float, float]]:
    """By attention share: how far the largest time exceeds the mean, packed by tokens, by time."""
    rows = list(rows)
    return {
        share: (
            _mean(_by(rows, attention_share=share, planner="token packing"), "spread") - 1,
            _mean(_by(rows, attention_share=share, planner="ours"), "spread") - 1,
        )
        for share in sorted({_number(row, "attention_share") for row in rows})
    }


def _shared(rows: Sequence[Row], planner: str) -> tuple[list[Row], list[Row]]:
    """A planner's rows, and ours of the same instances in the same order."""
    keys = ("lengths", "gbs", "capacity", "seed")
    ours = {tuple(row[k] for k in keys): row for row in _by(rows, planner="ours")}
    mine = _by(rows, planner=planner)
    return mine, [ours[tuple(row[k] for k in keys)] for row in mine]


def _by(rows: Iterable[Row], **values: object) -> list[Row]:
    return [row for row in rows if all(row.get(k) == v for k, v in values.items())]


def _number(row: Row, key: str) -> float:
    value = row[key]
    assert isinstance(value, int | float), f"{key}={value!r}"
    return value


def _sum(rows: Iterable[Row], key: str) -> float:
    return sum(_number(row, key) for row in rows)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _mean(rows: Iterable[Row], key: str) -> float:
    return _average([_number(row, key) for row in rows])


def _most(rows: Iterable[Row]) -> float:
    return max(_number(row, "plan_seconds") for row in rows)


def _shape(whole: bool) -> str:
    return "a microbatch costs its capacity" if whole else "time follows padded tokens"


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draws utilisation by cell and planner into `schedule_utilisation.png`."""
    cells = _cells([row for row in rows if row["part"] == "pipeline"])
    if not cells:
        return
    names = [n for n in (*_RIVALS, *_OURS) if any(n in cell for cell in cells.values())]
    figure = Figure(figsize=(10, 4.5))
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        xs = [x - 0.4 + (i + 0.5) * width for x in range(len(cells))]
        axes.bar(xs, [cell.get(name, 0.0) for cell in cells.values()], width, label=_label(name))
    labels = [f"{key[3]}\nS {key[0]}, {key[1]}\n{key[2]}" for key in cells]
    axes.set_xticks(range(len(cells)), labels, fontsize=7)
    axes.set_ylim(0, 1)
    axes.set_ylabel("utilisation in simulation (1F1B)")
    axes.set_xlabel("lengths; stages, global batch size; capacity", fontsize="small")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, folder / "schedule_utilisation.png")


_label: Callable[[str], str] = {
    "megatron": "Megatron: one job at a time",
    "mlora": "mLoRA: jobs take turns",
    "lorafusion": "LoRAFusion: two MILPs, merges",
    "lorafusion_our_packing": "LoRAFusion with our packing",
    "ours_full": "ours, always filled up",
    "ours": "ours",
}.__getitem__
