"""Renders the tables of README.md from docs/results/**/*.json.

    python -m lorafusion_jax.bench.report [--check] [PAGE.md ...]

Between `<!-- table NAME -->` and `<!-- end -->` stands a table with its heading; what is between
them is replaced, by nothing where there is no such file.
With `--check` nothing is written, and a README that is out of date gives exit code 1.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lorafusion_jax.bench import kernels_report, training_report
from lorafusion_jax.bench.results import RESULTS, Row

_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


class Column(NamedTuple):
    """A printed column: key in the row, heading, and format of its numbers."""

    key: str
    heading: str
    format: str = ""


class Table(NamedTuple):
    """How a bench is printed.

    Attributes:
        title: heading of its part, which is only there where it was measured.
        columns: one printed column each; where `pivot` is given, what rows are grouped by.
        pivot: key whose values become further columns, such as `impl`.
        value: what stands in those columns.
        where: only rows with these values are printed.
        derive: chooses among the rows, or adds to them what is computed from several.
        having: a further table of the rows that have this key, with a line above it.
        bench: whose results it shows, where it has another name.
    """

    title: str
    columns: tuple[Column, ...]
    pivot: str | None = None
    value: Column | None = None
    where: Row = {}  # noqa: RUF012  (never changed)
    derive: Callable[[Sequence[Row]], list[Row]] | None = None
    having: tuple[str, str, tuple[Column, ...]] | None = None
    bench: str = ""


_MESH_COLUMNS = (
    Column("system", "system"),
    Column("model", "model"),
    Column("layers", "layers"),
    Column("mesh", "mesh"),
    Column("lengths", "lengths"),
    Column("adapters", "adapters"),
    Column("remat", "computed again"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("tokens_per_s_steady", "steady", ",.0f"),
    Column("mfu", "MFU", ".1%"),
    Column("bubble", "bubble", ".1%"),
    Column("bubble_steady", "steady", ".1%"),
    Column("predicted_error", "predicted time", "+.1%"),
    Column("peak_gib", "peak GiB", ".1f"),
)
_LINEAR_COLUMNS = (
    Column("tokens", "tokens", ","),
    Column("k", "k"),
    Column("n", "n"),
    Column("r", "rank"),
    Column("p", "dropout"),
    Column("adapters", "adapters"),
)
_OVER_FROZEN = Column("ratio_to_frozen", "time of forward and backward / frozen", ".3f")
TABLES = {
    "demo": Table(
        "The demo: four tasks learnt together",
        (
            Column("job", "task"),
            Column("rank", "rank"),
            Column("samples", "held-out rows"),
            Column("base_loss", "loss, base", ".2f"),
            Column("adapter_loss", "loss, adapter", ".2f"),
            Column("base_exact", "exact match, base", ".0%"),
            Column("adapter_exact", "exact match, adapter", ".0%"),
        ),
    ),
    "families": Table(
        "Exported adapters against PEFT",
        (
            Column("family", "family"),
            Column("job", "adapter"),
            Column("largest_logit", "largest logit", ".1f"),
            Column("our_float32_error", "our error", ".1e"),
            Column("peft_float32_error", "PEFT's error", ".1e"),
            Column("error_ratio", "ratio", ".2f"),
            Column("our_gradient_error", "our gradient", ".1e"),
            Column("peft_gradient_error", "PEFT's gradient", ".1e"),
            Column("merged_error", "merged model", ".1e"),
            Column("uniform_error", "one rank and scale", ".1e"),
        ),
    ),
    "kernels": Table(
        "LoRA linears against the frozen linear",
        _LINEAR_COLUMNS,
        pivot="impl",
        value=_OVER_FROZEN,
        where={"pass": "fwdbwd"},
        derive=kernels_report.whole_linears,
    ),
    "linears": Table(
        "LoRA linears against the frozen linear",
        tuple(c for c in _LINEAR_COLUMNS if c.key in ("tokens", "k", "n")),
        pivot="impl",
        value=_OVER_FROZEN,
        where=dict(kernels_report.SHOWN),
        derive=kernels_report.whole_linears,
        bench="kernels",
    ),
    "layer": Table(
        "A decoder layer",
        (
            Column("impl", "implementation"),
            Column("tokens", "tokens", ","),
            Column("ms", "ms", ".2f"),
            Column("tokens_per_s", "tokens/s", ",.0f"),
            Column("mfu", "MFU", ".1%"),
            Column("ratio_to_frozen", "time / frozen", ".2f"),
        ),
    ),
    "training": Table(
        "Training",
        (
            Column("lengths", "lengths"),
            Column("layers", "layers"),
            Column("system", "system"),
            Column("tokens_per_s", "tokens/s", ",.0f"),
            Column("over_a", "over (a)", ".2f"),
            Column("over_d", "over (d)", ".2f"),
            Column("mfu", "MFU", ".1%"),
            Column("padding", "padding", ".1%"),
            Column("peak_gib", "peak GiB", ".1f"),
        ),
        derive=training_report.with_ratios,
        having=(
            "overhead",
            "What of a microbatch of (e) is no work, in milliseconds and together:",
            (
                Column("lengths", "lengths"),
                Column("layers", "layers"),
                Column("loop_ms", "ms a microbatch", ".1f"),
                Column("padding_ms", "padding", ".2f"),
                Column("plan_ms", "planning", ".2f"),
                Column("optimizer_ms", "optimizer", ".2f"),
                Column("host_ms", "host", ".2f"),
                Column("overhead", "together", ".1%"),
                Column("update_ms", "an update alone", ".1f"),
                Column("compile_cold_seconds", "s to compile", ".1f"),
                Column("compile_cached_seconds", "from the cache", ".1f"),
            ),
        ),
    ),
    "schedule": Table(
        "Planning",
        (
            Column("lengths", "lengths"),
            Column("stages", "stages"),
            Column("gbs", "global batch"),
            Column("capacity", "capacity", ","),
        ),
        pivot="planner",
        value=Column("utilisation", "utilisation of a simulated pipeline", ".1%"),
        where={"part": "pipeline", "clock": "1f1b"},
    ),
    "pipeline": Table("A pipeline against other schedules", _MESH_COLUMNS),
    "scaling": Table("Large models on several devices", _MESH_COLUMNS),
}

FIGURES: dict[str, Callable] = {"training": training_report.draw, "kernels": kernels_report.draw}


def _cell(value: object, form: str = "") -> str:
    if value is None:
        return ""
    text = format(value, form) if isinstance(value, int | float) else str(value)
    return text.replace("|", "\\|")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a GitHub table; columns whose cells all look like numbers are set flush right."""
    number = re.compile(r"[-+]?[\d,]*\.?\d+%?|")
    right = [all(number.fullmatch(row[i]) for row in rows) for i in range(len(headings))]
    lines = [headings, ["---:" if flag else "---" for flag in right], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(columns: tuple[Column, ...], rows: list[Row]) -> str:
    """A table with a line for each row."""
    cells = [[_cell(row.get(c.key), c.format) for c in columns] for row in rows]
    return markdown_table([column.heading for column in columns], cells)


def _there(columns: tuple[Column, ...], rows: list[Row]) -> tuple[Column, ...]:
    """The columns that any row has."""
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))


def render(table: Table, rows: list[Row]) -> str:
    """Returns the rows of one results file as a GitHub table.

    Rows that share all grouping columns and the pivot (such as several seeds) are averaged.
    """
    rows = [row for row in rows if all(row.get(k) == v for k, v in table.where.items())]
    rows = rows if table.derive is None else table.derive(rows)
    headings = [column.heading for column in table.columns]
    if table.pivot is None or table.value is None:
        parts = [_plain(_there(table.columns, rows) if table.derive else table.columns, rows)]
        if table.having is not None:
            key, line, columns = table.having
            some = [row for row in rows if row.get(key) is not None]
            parts += [line, _plain(_there(columns, some), some)] if some else []
        return "\n\n".join(parts)
    names = list(dict.fromkeys(str(row[table.pivot]) for row in rows))
    groups: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        value = row.get(table.value.key)
        group = groups.setdefault(tuple(row.get(c.key) for c in table.columns), {})
        if isinstance(value, int | float):
            group.setdefault(str(row[table.pivot]), []).append(value)
    cells = [
        [_cell(v, c.format) for v, c in zip(key, table.columns, strict=True)]
        + [_cell(_mean(group.get(name, [])), table.value.format) for name in names]
        for key, group in groups.items()
    ]
    return markdown_table(headings + names, cells)


def section(name: str, root: Path = RESULTS, page: Path = Path("README.md")) -> str:
    """Returns a table's heading, it and its figures for all devices, and the commands behind.

    Args:
        name: of the table.
        root: folder of all results.
        page: that it is for; figures are linked from there.
    """
    parts, table = [], TABLES[name]
    bench = table.bench or name
    for path in sorted(root.glob(f"*/{bench}.json")):
        record = json.loads(path.read_text())
        jax = record["versions"].get("jax", "?")
        value = table.value
        what = f" {value.heading[0].upper()}{value.heading[1:]}." if value else ""
        head = f"{record['device']}, {record['date']}, jax {jax}: `{record['command']}`.{what}"
        parts.append(f"{head}\n\n{render(table, record['rows'])}\n")
        for figure in sorted(path.parent.glob(f"{bench}_*.png")):
            shown = RESULTS / path.parent.name / figure.name
            link = shown.relative_to(page.parent) if page.parent in shown.parents else shown
            parts.append(f"![{figure.stem.replace('_', ' ')}]({link.as_posix()})\n")
    return "\n".join([f"### {table.title}\n", *parts] if parts else [])


def update(text: str, root: Path = RESULTS, page: Path = Path("README.md")) -> str:
    """Returns a page's text with every marked table replaced.

    Raises:
        ValueError: a marker names a table that does not exist.
    """

    def fresh(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; there are: {', '.join(TABLES)}")
        body = section(name, root, page)
        return f"{match[1]}\n{body}\n{match[3]}" if body else f"{match[1]}{match[3]}"

    return _MARKED.sub(fresh, text)


def pages() -> list[Path]:
    """Returns the pages that hold tables: README.md, and those right under docs/."""
    found = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    return [path for path in found if path.is_file() and _MARKED.search(path.read_text())]


def main(arguments: list[str]) -> int:
    """Updates or checks the files; returns the exit code."""
    check = "--check" in arguments
    if not check:  # measured on a machine that may have had no library for figures
        for bench, draw in FIGURES.items():
            for path in sorted(RESULTS.glob(f"*/{bench}.json")):
                draw(json.loads(path.read_text())["rows"], path.parent)
    named = [Path(a) for a in arguments if a != "--check"]
    stale = False
    for path in named or pages():
        old = path.read_text()
        new = update(old, page=path)
        if check:
            stale |= new != old
            print(f"{path}: {'up to date' if new == old else 'out of date; run `make readme`'}")
        else:
            path.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
