"""Train two adapters together, then each alone, and print how much they differ.

python examples/together_vs_alone.py [--model DIRECTORY] [--steps N]

Same samples, same order, same dropout masks, same normalisation: what remains is the rounding of
sums that other batch shapes add up in another order.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tiny_base import load_or_make

import lorafusion_jax as lf
from lorafusion_jax.lora import load_peft

JOBS = {
    "squares": {
        "data": [{"prompt": f"{n} squared is ", "completion": str(n * n)} for n in range(24)],
        "lora": lf.LoraConfig(r=8, alpha=16, dropout=0.2),
        "optim": lf.AdamW(lr=5e-3),
        "batch": 4,
    },
    "colours": {
        "data": [{"text": f"the {c} {n}"} for c in ("red", "blue") for n in range(8)],
        "lora": lf.LoraConfig(r=2, alpha=8, dropout=0.05, use_rslora=True),
        "optim": lf.AdamW(lr=2e-3, weight_decay=0.1),
        "batch": 3,
    },
}


def train(base: lf.Base, names: list[str], steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Trains the named jobs in one run; returns the change B A of every adapted weight."""
    trainer = lf.MultiTrainer(base, output=tempfile.mkdtemp(), tokens_per_microbatch=256)
    for name in names:
        job = JOBS[name]
        trainer.add_job(
            name,
            job["data"],
            lora=job["lora"],
            optim=job["optim"],
            train=lf.TrainConfig(max_steps=steps, global_batch_size=job["batch"]),
            eval=lf.EvalConfig(split=0),
        )
    return {name: changes(result.adapter.path) for name, result in trainer.fit().items()}


def changes(adapter: Path) -> dict[str, np.ndarray]:
    """Reads a PEFT folder and multiplies each pair of factors out."""
    modules = load_peft(adapter).adapter
    return {path: np.asarray(a).T @ np.asarray(b) for path, (a, b) in modules.items()}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the largest difference of each job, relative to its largest change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face directory or .gguf file")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    base = load_or_make(args.model)

    together = train(base, list(JOBS), args.steps)
    differences = {}
    for name in JOBS:
        alone = train(base, [name], args.steps)[name]
        change = max(np.abs(alone[path]).max() for path in alone)
        apart = max(np.abs(together[name][path] - alone[path]).max() for path in alone)
        differences[name] = float(apart / change)
        print(
            f"{name:8} largest change of a weight {change:.2e}, together and alone differ by "
            f"{apart:.2e} ({differences[name]:.1e} of it)"
        )
    return differences


if __name__ == "__main__":
    main()
