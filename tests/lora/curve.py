"""Twenty steps of two adapters on a tiny Llama: our side, and the input of the torch side.

To make golden/peft_curve.json again (the first command needs this package, the second only torch,
transformers and peft):

    PYTHONPATH=.:sched python -m tests.lora.curve /tmp/curve
    python tests/lora/peft_curve.py /tmp/curve tests/lora/golden/peft_curve.json
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import lorafusion_jax as lf
from lorafusion_jax.config import BatchingConfig, DataConfig, JobConfig
from lorafusion_jax.lora.bank import init_adapter, multi_linears
from lorafusion_jax.lora.peft_io import save_peft
from lorafusion_jax.train.events import StepDone
from lorafusion_jax.train.jobs import lora_spec, resolve_job
from tests.lora.tiny_hf import VOCAB, write_tiny_llama

STEPS = 20
_BATCHING = BatchingConfig(tokens_per_microbatch=64, max_length=32, tile=16)
_SETTINGS = {
    "plain": {
        "lora": lf.LoraConfig(r=4, alpha=8),
        "optim": lf.AdamW(
            lr=5e-3, schedule="constant", warmup_steps=0, weight_decay=0.1, max_grad_norm=None
        ),
        "train": lf.TrainConfig(global_batch_size=4, max_steps=STEPS),
    },
    "rslora": {
        "lora": lf.LoraConfig(
            r=8, alpha=4, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")
        ),
        "optim": lf.AdamW(lr=1e-2, schedule="cosine", warmup_steps=3, max_grad_norm=0.5),
        "train": lf.TrainConfig(global_batch_size=3, max_steps=STEPS),
    },
}


def dataset(name: str) -> lf.Dataset:
    """Sequences that follow a rule per job, with the first two tokens as prompt."""
    random, step = np.random.RandomState(len(name)), {"plain": 5, "rslora": 11}[name]
    samples = []
    for _ in range(24):
        start, length = random.randint(VOCAB), random.randint(5, 15)
        samples.append((start + step * np.arange(length)) % VOCAB)
    ends = np.cumsum([0, *map(len, samples)])
    supervised = np.ones(ends[-1], bool)
    supervised[ends[:-1]] = supervised[ends[:-1] + 1] = False
    return lf.Dataset(
        tokens=np.concatenate(samples).astype(np.int32),
        supervised=supervised,
        offsets=ends.astype(np.int64),
        lines=np.arange(1, 25, dtype=np.int32),
    )


def our_losses(base: lf.Base, output: Path, names=tuple(_SETTINGS)) -> dict[str, list[float]]:
    """Trains the named jobs together and returns the loss of every step."""
    losses: dict[str, list[float]] = {name: [] for name in names}

    def listen(event):
        if isinstance(event, StepDone):
            losses[event.job].append(event.loss)

    trainer = lf.MultiTrainer(base, output=output, batching=_BATCHING, listener=listen)
    for name in names:
        trainer.add_job(name, dataset(name), eval=lf.EvalConfig(split=0), **_SETTINGS[name])
    trainer.fit()
    return losses


def prepare(directory: Path) -> str:
    """Writes the base model and, per job, its initial adapter, global batches and optimizer.

    Returns:
        SHA-256 of the weights, tokens and settings.
    """
    base = lf.load_base(write_tiny_llama(directory / "base"))
    linears = multi_linears(base.model)
    for name, settings in _SETTINGS.items():
        config = JobConfig(
            name=name, data=DataConfig(path="-"), eval=lf.EvalConfig(split=0), **settings
        )
        job = resolve_job(config, dataset(name), base, _BATCHING, seed=0)
        shapes = {
            path: (linears[path].in_features, linears[path].out_features) for path in job.targets
        }
        spec = lora_spec(config)
        adapter = init_adapter(shapes, spec, job.seed)
        save_peft(directory / name / "adapter", adapter, spec, str(directory / "base"))
        batches = [
            [[part.tolist() for part in job.samples[sample.index]] for sample in batch]
            for batch in job.plan.batches
        ]
        # PEFT's script knows no other rate for B; the golden was made without the key.
        optim = config.optim.model_dump(exclude={"lora_plus_ratio"})
        recipe = {"optim": optim, "batches": batches}
        (directory / name / "recipe.json").write_text(json.dumps(recipe))
    files = [*directory.glob("**/*.safetensors"), *directory.glob("**/recipe.json")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
    (directory / "inputs.sha256").write_text(digest)
    return digest


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
