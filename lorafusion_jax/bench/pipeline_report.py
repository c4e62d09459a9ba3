"""The figure of `lorafusion bench pipeline` and `scaling`: tokens a second by system and mix."""

from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.results import Row
from lorafusion_jax.plots import save_figure


def draw_speed(rows: list[Row], results: Path) -> Path:
    """Draws a group of bars for each mix of lengths, a bar for each system.

    Args:
        rows: of the results file.
        results: that file; the figure is written beside it.

    Returns:
        The figure's path.
    """
    speeds: dict[str, dict[str, float]] = {}
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
    first = rows[0]
    axes.set_title(f"{first['model']}, {first['layers']} layers, {first['mesh']}", loc="left")
    axes.legend(fontsize="small")
    return save_figure(figure, results.with_name(f"{results.stem}_speed.png"))
