"""One real run of a family: train two adapters, export them in every form, load them in PEFT.

    python -m tests.models.family_run [--torch PYTHON]

runs all families and writes docs/results/cpu/families.json. PYTHON is an interpreter with torch,
transformers and peft; by default LORAFUSION_TORCH_PYTHON, or this one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorafusion_jax.cli import main as lorafusion
from lorafusion_jax.lora.bank import (
    attach_adapters,
    lora_context,
    merge_adapters,
    put_slot,
    split_adapters,
)
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.models import load_base
from lorafusion_jax.train.loss import token_losses
from lorafusion_jax.train.run_folder import open_run
from tests.cli.conftest import WORDS, write_jsonl, write_tokenizer
from tests.golden import tiny_families
from tests.models.tiny import packed

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2", "qwen2_windows", "qwen3", "mistral", "gemma2", "gemma3_text")
COMMAND = "python -m tests.models.family_run"
_TOKENS = 24
_CONFIG = """\
version: 1
base: {model: base, dtype: float32}
output: run
batching: {tokens_per_microbatch: 128, max_length: 48, tile: 16}
report: {every: 1}
defaults:
  data: {path: words.jsonl}
  lora: {r: 4, alpha: 8}
  optim: {lr: 2.0e-2}
  train: {max_steps: 6, global_batch_size: 4}
  eval: {split: 0}
jobs:
  - name: plain
  - name: patterned
    lora: {dropout: 0.1, rank_pattern: {q_proj: 2, down_proj: 6}, alpha_pattern: {up_proj: 5}}
"""


def write_project(folder: Path, name: str) -> Path:
    """Writes a base model with tokenizer, data and a configuration; returns the configuration."""
    base = folder / "base"
    base.mkdir(parents=True)
    config = tiny_families.CONFIGS[name] | {
        "vocab_size": write_tokenizer(base),
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (base / "config.json").write_text(json.dumps(config))
    weights = tiny_families.weights(name, config)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    pairs = [{"prompt": f"German for {a} =", "completion": f" {b}"} for a, b in WORDS.items()]
    write_jsonl(folder / "words.jsonl", pairs * 4)
    path = folder / "lorafusion.yaml"
    path.write_text(_CONFIG)
    return path


def command(*words) -> None:
    """Runs a command of the package in this process."""
    code = lorafusion([str(word) for word in words])
    assert code == 0, f"lorafusion {words[0]} left with {code}"


def computed(base_folder: Path, adapter_folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of one sample, and the adapter's gradient of predicting it, in float32.

    By the names that check_export expects.
    """
    base = load_base(base_folder)
    loaded = load_peft(adapter_folder, base.model)
    largest = loaded.spec.max_rank(loaded.adapter)
    bank = attach_adapters(base.model, list(loaded.adapter), 1, largest)
    bank = put_slot(bank, 0, loaded.spec, loaded.adapter)
    graphdef, frozen = split_adapters(base.model)
    count = len(tokens)
    positions, segments = packed([count], count)
    context = lora_context(bank, jnp.zeros(1, jnp.int32), jnp.ones(count, jnp.uint32), train=False)
    labels = jnp.asarray(np.append(tokens[1:], 0))
    weight = jnp.asarray(np.append(np.full(count - 1, 1 / (count - 1)), 0), jnp.float32)

    def loss(a, b):
        model: Any = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))
        hidden = model(jnp.asarray(tokens), positions, segments, context)
        cap = base.config.logit_softcap
        losses = token_losses(hidden, model.head_weight(), labels, weight, 16, cap)
        return losses.weighted.sum(), model.logits(hidden)

    (a, b), logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(bank.a, bank.b)
    found = {"tokens": tokens, "logits": np.asarray(logits)}
    for path in loaded.adapter:
        rank, name = loaded.spec.rank_of(path), f"base_model.model.{path}"
        found[f"{name}.lora_A.weight"] = np.asarray(a[path][0, :rank])
        found[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[path][0, :rank].T)
    return found


def run_family(name: str, folder: Path, python: str) -> list[dict[str, Any]]:
    """Trains, exports and checks one family.

    Args:
        name: of tiny_families.
        folder: new; everything is written below it.
        python: interpreter with torch, transformers and peft.

    Returns:
        Rows of families.json, one per adapter.
    """
    config, run = write_project(folder, name), folder / "run"
    command("train", config, "--plain")
    for job, form in (("plain", "merged"), ("patterned", "merged"), ("patterned", "peft-uniform")):
        words = ("--job", job, "--format", form, "--out", folder / form)
        shards = ("--max-shard-size", "60KB") if form == "merged" else ()
        command("export", run, *words, *shards, "--verify")
    tokens = np.arange(_TOKENS, dtype=np.int32) * 11 % load_base(folder / "base").config.vocab_size
    rows = []
    for job in ("plain", "patterned"):
        adapter = run / "jobs" / job / "adapter"
        given = folder / f"{job}.npz"
        np.savez(given, **computed(folder / "base", adapter, tokens))  # pyright: ignore[reportArgumentType]
        words = [folder / "base", given, "--adapter", adapter, "--merged", folder / "merged" / job]
        if job == "patterned":
            words += ["--uniform", folder / "peft-uniform/patterned"]
        done = subprocess.run(
            [python, "-m", "tests.models.check_export", *map(str, words)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        figures = json.loads(done.stdout.splitlines()[-1])
        figures["error_ratio"] = figures["our_float32_error"] / figures["peft_float32_error"]
        losses = [line["loss"] for line in open_run(run).metrics(job) if "loss" in line]
        trained = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
        rows.append({"family": name, "job": job, **trained, **figures})
    return rows


def torch_python() -> str:
    """Returns the interpreter with torch that the environment names, or this one."""
    return os.environ.get("LORAFUSION_TORCH_PYTHON", sys.executable)


def main() -> None:
    from lorafusion_jax.bench.results import write_results

    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", default=torch_python())
    python = parser.parse_args().torch
    rows = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_family(name, Path(folder) / "project", python)
        print(json.dumps(rows[-2:]), flush=True)
    write_results("families", rows, command=COMMAND, device="cpu")


if __name__ == "__main__":
    main()
