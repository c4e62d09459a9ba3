"""How rows of `lorafusion bench pipeline` and `scaling` are told apart, printed and drawn."""

from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.results import Row
from lorafusion_jax.plots import save_figure


def draw_speed(rows: list[Row], results: Path) -> Path:
    """Draws a group of bars for each mix of lengths, a bar for each system.

    Args:
        rows: of the results file; those of other meshes and models than the first are left out.
        results: that file; the figure is written beside it.

    Returns:
        The figure's path.
    """
    speeds: dict[str, dict[str, float]] = {}
    first = rows[0]
    rows = [row for row in rows if all(row[k] == first[k] for k in ("model", "layers", "mesh"))]
    for row in rows:
        case = f"{row['lengths']}\n{row['adapters']} adapters"
        speeds.setdefault(case, {})[str(row["system"])] = float(row["tokens_per_s"] or 0)
    systems = list(dict.fromkeys(str(row["system"]) for row in rows))
    figure = Figure(figsize=(2 + 1.3 * len(speeds), 3.2))
    axes, width = figure.subplots(), 0.8 / len(systems)
    for number, system in enumerate(systems):
        places = [i for i, found in enumerate(speeds.values()) if system in found]
        heights = [found[system] for found in speeds.values() if system in found]
        bars = axes.bar([i + number * width for i in places], heights, width, label=system)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize="x-small")
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(speeds))], list(speeds))
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{first['model']}, {first['layers']} layers, {first['mesh']}", loc="left")
    axes.legend(fontsize="small")
    return save_figure(figure, results.with_name(f"{results.stem}_speed.png"))


def case_of(row: Row) -> tuple:
    """What was measured: a row measured again takes the place of the one before."""
    keys = ("system", "mesh", "model", "layers", "lengths", "adapters", "gbs", "capacity")
    return tuple(row[key] for key in keys)


def in_words_of(row: Row) -> str:
    """What is printed of a measurement."""
    parts = [f"{row['tokens_per_s']:.0f} tokens/s", f"bubble {row['bubble']:.1%}"]
    if row["tokens_per_s_steady"] is not None:
        parts[0] += f" (steady {row['tokens_per_s_steady']:.0f})"
        parts[1] += f" (steady {row['bubble_steady']:.1%})"
    return ", ".join([*parts, f"remat {row['remat']}", f"tick {row['tick_ms']:.1f} ms"])
