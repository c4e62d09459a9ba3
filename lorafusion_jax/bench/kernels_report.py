"""What is published of `lorafusion bench kernels`: its table's rows, and the figure."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lorafusion_jax.bench.results import Row
from lorafusion_jax.plots import save_figure

# In the order of the bars; other implementations come last.
_NAMES = {
    "peft": "PEFT",
    "peft_compile": "PEFT, torch.compile",
    "xla_naive": "XLA, naive",
    "xla_best": "XLA, best formula",
    "ours": "ours",
}
# The case that is drawn, and stands in the README.
SHOWN = {"pass": "fwdbwd", "r": 16, "p": 0.1, "adapters": 1}


def whole_linears(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that compare linears, not those of single kernels."""
    return [row for row in rows if "ratio_to_frozen" in row]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws forward and backward over the frozen linear, by shape; nothing without such rows.

    Args:
        rows: of `kernels.json`.
        folder: of the figure.
    """
    shown = [row for row in rows if all(row.get(key) == value for key, value in SHOWN.items())]
    found: dict[str, dict[str, float]] = {}
    for row in shown:
        width = str(row["n"]).replace("|", "\n+ ")
        shape = f"{row['tokens']} tokens\n{row['k']} to {width}"
        found.setdefault(shape, {})[str(row["impl"])] = float(row["ratio_to_frozen"] or 0)
    names = [name for name in _NAMES if any(name in ratios for ratios in found.values())]
    if not names:
        return []
    figure = Figure((9, 4.2))
    axes, width = figure.subplots(), 0.8 / len(names)
    for number, name in enumerate(names):
        at = [i for i, ratios in enumerate(found.values()) if name in ratios]
        heights = [ratios[name] for ratios in found.values() if name in ratios]
        places = [i + width * (number - (len(names) - 1) / 2) for i in at]
        bars = axes.bar(places, heights, width, label=_NAMES[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0.9)
    axes.set_xticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylabel("forward and backward over the frozen linear")
    axes.set_title("LoRA linears, rank 16, dropout 0.1, one adapter")
    axes.legend(fontsize=8, ncols=len(names), loc="upper right")
    return [save_figure(figure, folder / "kernels_ratios.png", legend_outside=True)]
