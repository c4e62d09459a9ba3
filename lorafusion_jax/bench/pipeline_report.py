"""How rows of `lorafusion bench pipeline` and `scaling` are told apart, printed and drawn."""

from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.results import Row
from lorafusion_jax.plots import save_figure


def draw_speed(rows: list[Row], results: Path) -> Path:
    """Draws a group of bars for each model, mesh and mix of lengths, a bar for each system.

    Args:
        rows: of the results file.
        results: that file; the figure is written beside it.

    Returns:
        The figure's path.
    """
    speeds: dict[str, dict[str, float]] = {}
    for row in rows:
        mesh = str(row["mesh"]).replace(",", ", ")
        case = f"{row['lengths']}, {row['adapters']} adapters"
        case = f"{row['model']}, {row['layers']} layers\n{mesh}\n{case}"
        speeds.setdefault(case, {})[str(row["system"])] = float(row["tokens_per_s"] or 0)
    systems = list(dict.fromkeys(str(row["system"]) for row in rows))
    figure = Figure(figsize=(1.2 + 1.7 * max(2, len(speeds)), 3.4))
    axes, width = figure.subplots(), 0.8 / len(systems)
    groups = [[name for name in systems if name in found] for found in speeds.values()]
    for system in systems:
        places = [  # a group stands in the middle of its place, however many ran there
            place + (group.index(system) - (len(group) - 1) / 2) * width
            for place, group in enumerate(groups)
            if system in group
        ]
        heights = [found[system] for found in speeds.values() if system in found]
        label = system if system == "ours" else f"{system}-style"
        bars = axes.bar(places, heights, width, label=label)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize="x-small")
    axes.set_xticks(range(len(speeds)), list(speeds), fontsize="x-small")
    axes.set_ylabel("tokens per second")
    figure.legend(fontsize="small", ncols=len(systems), loc="outside upper center", frameon=False)
    path = results.with_name(f"{results.stem}_speed.png")
    return save_figure(figure, path, legend_outside=True)


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
