"""Train two adapters of one base model at once, from Python.

python examples/train_two_adapters.py [--model DIRECTORY] [--output DIRECTORY] [--steps N]
"""

import argparse
import tempfile

from tiny_base import load_or_make

import lorafusion_jax as lf

WORDS = "apple river stone cloud paper green seven light north music bread table horse".split()


def main(argv: list[str] | None = None) -> dict[str, tuple[float | None, float | None]]:
    """Returns the held-out loss of each job before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face directory or .gguf file")
    parser.add_argument("--output", default=None, help="folder of the run; a temporary one")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(argv)

    trainer = lf.MultiTrainer(
        load_or_make(args.model),
        output=args.output or tempfile.mkdtemp(),
        tokens_per_microbatch=256,
    )
    # Rank, scale, dropout, targets, optimizer and batch size are each job's own.
    trainer.add_job(
        "upper",
        [{"prompt": f"{word} = ", "completion": word.upper()} for word in WORDS],
        lora=lf.LoraConfig(r=8, alpha=16, dropout=0.1),
        optim=lf.AdamW(lr=2e-2),
        train=lf.TrainConfig(max_steps=args.steps, global_batch_size=4),
        eval=lf.EvalConfig(split=3),
    )
    trainer.add_job(
        "length",
        [{"prompt": f"{word}: ", "completion": str(len(word))} for word in WORDS],
        lora=lf.LoraConfig(r=4, alpha=4, use_rslora=True, target_modules=("q_proj", "v_proj")),
        optim=lf.AdamW(lr=1e-2, schedule="linear"),
        train=lf.TrainConfig(max_steps=args.steps, global_batch_size=6),
        eval=lf.EvalConfig(split=3),
    )
    results = trainer.fit()

    for name, result in results.items():
        print(
            f"{name:8} held-out loss {result.base_eval_loss:.3f} before, {result.eval_loss:.3f} "
            f"after {result.steps} steps; adapter in {result.adapter.path}"
        )
    return {name: (r.base_eval_loss, r.eval_loss) for name, r in results.items()}


if __name__ == "__main__":
    main()
