"""A training run of four jobs with dropout in tiles that the kernels take; also as a process.

    python -m tests.reliability.gpu_run OUTPUT [start|step]

Another process compiles everything anew, and times XLA's choices anew: replay must not depend on
either. With `start` or `step` the device is full from then on.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import lorafusion_jax as lf
from lorafusion_jax.config import (
    BatchingConfig,
    EvalConfig,
    ParallelConfig,
    RunTrainConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.data.dataset import Dataset, join_samples
from lorafusion_jax.errors import LoraFusionError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.hf_weights import Base, random_base
from lorafusion_jax.train.events import Event, Listener, MicrobatchDone
from tests.train.tiny import VOCAB, dataset

WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
RANKS = {"a": 16, "b": 8, "c": 64, "d": 4}
STEPS = 20


def wide_base() -> Base:
    """A random Llama in bfloat16, which the kernels take; float32 would go to XLA."""
    return random_base(ModelConfig.from_hf(WIDE), 0, "bfloat16")


def shifted(data: Dataset) -> Dataset:
    """The same samples with other tokens."""
    samples = [(tokens, mask) for tokens, mask, *_ in (data[i] for i in range(len(data)))]
    return join_samples(
        [
            (line + 1, [(int(t) + 1) % VOCAB for t in tokens], [bool(m) for m in mask])
            for line, (tokens, mask) in enumerate(samples)
        ]
    )


def trainer(
    base: Base,
    output: Path,
    *,
    listener: Listener | None = None,
    seed: int = 0,
    steps: int = STEPS,
    other: str = "",
    only: str = "",
    stages: int = 1,
) -> lf.MultiTrainer:
    """Four jobs with dropout, so many steps each; job `other` has other tokens than usual.

    With `only`, that job alone is trained; with `stages`, on so many devices.
    """
    made = lf.MultiTrainer(
        base,
        output=output,
        seed=seed,
        batching=BatchingConfig(tokens_per_microbatch=1024, tile=128),
        train=RunTrainConfig(deterministic=True),
        parallel=ParallelConfig(stage=stages),
        listener=listener,
    )
    for number, (name, r) in enumerate(RANKS.items()):
        if only and name != only:
            continue
        data = dataset(number, 48, 30, 120)
        made.add_job(
            name,
            shifted(data) if name == other else data,
            lora=lf.LoraConfig(r=r, dropout=0.1),
            optim=lf.AdamW(lr=1e-3),
            train=TrainConfig(max_steps=steps, global_batch_size=6),
            eval=EvalConfig(split=6, every=steps // 2),
            save=SaveConfig(every=max(1, steps // 4)),
        )
    return made


class Ballast:
    """Fills the device: all that this process may have of it."""

    def __init__(self):
        self.blocks: list[jax.Array] = []

    def fill(self) -> None:
        """Allocates until less than 1 MiB is left in one piece."""
        for size in (1 << 26, 1 << 23, 1 << 20):
            while True:
                try:
                    self.blocks.append(jnp.zeros(size, jnp.uint8).block_until_ready())
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    break

    def __call__(self, event: Event) -> None:
        """Listens to a run, and fills the device after its first microbatch."""
        if isinstance(event, MicrobatchDone) and not self.blocks:
            self.fill()
            print("full", flush=True)


def main(output: Path, full: str = "") -> int:
    """Trains; returns the exit code of the command line."""
    base, ballast = wide_base(), Ballast()
    if full == "start":
        ballast.fill()
        print("full", flush=True)
    try:
        trainer(base, output, listener=ballast if full == "step" else None).fit()
    except LoraFusionError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
