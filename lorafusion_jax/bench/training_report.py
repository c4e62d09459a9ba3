"""What training.json says: ratios to two of the other systems, and two figures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.results import Row
from lorafusion_jax.plots import save_figure

SEQUENTIAL, LORAFUSION = "a_sequential_padded", "d_lorafusion"
LABELS = {
    SEQUENTIAL: "(a) one job at a time, padded, naive LoRA",
    "b_sequential_packed": "(b) one job at a time, packed",
    "c_mlora": "(c) jobs side by side, padded (mLoRA-style)",
    LORAFUSION: "(d) fused, packed by first-fit (LoRAFusion-style)",
    "e_ours": "(e) ours",
    "f_ours_fp8": "(f) ours, fp8",
    "peft_compile": "PEFT, torch.compile",
}
CLASSES = (
    "fused_gemm", "gemm", "lora", "attention", "elementwise", "slices", "copy", "exchange", "idle",
)  # fmt: skip
"""Classes of kernels in the order they are stacked: products with fused LoRA, other products,
LoRA's own passes, attention, elementwise, slices into and out of rings, copies, exchanges, and a
device without work."""

type Key = tuple[str, ...]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Adds `over_a` and `over_d`: real tokens/s over those of systems a and d on the same samples.

    Only rows of one mix, model and depth are compared; where the other was not measured, or is
    this system itself, the ratio is None.
    """
    speeds = {(row["system"], _case(row)): row.get("tokens_per_s") for row in rows}

    def ratio(row: Row, rival: str) -> float | None:
        mine, theirs = row.get("tokens_per_s"), speeds.get((rival, _case(row)))
        if row["system"] == rival or not isinstance(mine, int | float):
            return None
        return mine / theirs if isinstance(theirs, int | float) and theirs else None

    return [
        row | {"over_a": ratio(row, SEQUENTIAL), "over_d": ratio(row, LORAFUSION)} for row in rows
    ]


def _case(row: Row) -> Key:
    """What must be equal for two rows to be compared."""
    repeats = "deterministic" if row.get("deterministic") else ""
    return (*(str(row.get(key, "")) for key in ("lengths", "model", "layers")), repeats)


def _titles(rows: Sequence[Row]) -> dict[Key, str]:
    """A short title of each case; model and depth are only there where they differ."""
    cases = dict.fromkeys(map(_case, rows))
    models, depths = ({case[i] for case in cases} for i in (1, 2))
    titles = {}
    for lengths, model, layers, repeats in cases:
        parts = [lengths, model if len(models) > 1 else ""]
        parts += [f"{layers} layers" if len(depths) > 1 else "", repeats]
        titles[lengths, model, layers, repeats] = "\n".join(part for part in parts if part)
    return titles


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws the figures of a results file that has rows for them.

    Args:
        rows: of training.json.
        folder: gets `training_tokens.png` and, where kernels were profiled,
            `training_breakdown.png`.

    Returns:
        The files.
    """
    paths = []
    if rows:
        paths.append(_draw_tokens(rows, folder / "training_tokens.png"))
    if profiled := [row for row in rows if any(f"ms_{name}" in row for name in CLASSES)]:
        paths.append(_draw_breakdown(profiled, folder / "training_breakdown.png"))
    return paths


def _draw_tokens(rows: Sequence[Row], path: Path) -> Path:
    titles = _titles(rows)
    named = dict.fromkeys(str(row["system"]) for row in rows)
    systems = [name for name in LABELS if name in named]
    systems += [name for name in named if name not in LABELS]
    figure = Figure(figsize=(max(5.0, 1.6 + 1.5 * len(titles)), 4.4))
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        speeds = {_case(row): row["tokens_per_s"] for row in rows if row["system"] == system}
        xs = [x - 0.4 + (i + 0.5) * width for x, case in enumerate(titles) if case in speeds]
        heights = [_number(speeds[case]) for case in titles if case in speeds]
        axes.bar(xs, heights, width, label=LABELS.get(system, system))
    axes.set_xticks(range(len(titles)), list(titles.values()), fontsize="small")
    axes.set_ylabel("real tokens per second")
    axes.grid(alpha=0.3, axis="y")
    _legend_above(figure, ncols=2)
    return save_figure(figure, path, legend_outside=True)


def _draw_breakdown(rows: Sequence[Row], path: Path) -> Path:
    """A bar for each row: its time per real token, split as the profile of its microbatches is."""
    titles = {case: title.replace("\n", ", ") for case, title in _titles(rows).items()}
    figure = Figure(figsize=(8.5, 1.5 + 0.34 * len(rows)))
    axes = figure.subplots()
    lefts = [0.0] * len(rows)
    found = [name for name in CLASSES if any(f"ms_{name}" in row for row in rows)]
    for name in found:
        widths = [_share(row, name) * 1e6 / _number(row["tokens_per_s"]) for row in rows]
        axes.barh(range(len(rows)), widths, 0.75, lefts, label=name.replace("_", " "))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    labels = [f"{LABELS.get(str(r['system']), r['system'])}, {titles[_case(r)]}" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("microseconds per real token")
    axes.grid(alpha=0.3, axis="x")
    _legend_above(figure, ncols=len(found))
    return save_figure(figure, path, legend_outside=True)


def _share(row: Row, name: str) -> float:
    """Share of a class in the profiled time of a row."""
    total = sum(_number(row.get(f"ms_{other}")) for other in CLASSES)
    return _number(row.get(f"ms_{name}")) / total if total else 0.0


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _legend_above(figure: Figure, *, ncols: int) -> None:
    figure.legend(fontsize="x-small", ncols=ncols, loc="outside upper center", frameon=False)
