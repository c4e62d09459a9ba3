"""Commands about the machine and the project: init, env, bench."""

from pathlib import Path
from typing import Annotated

import typer

from lorafusion_jax.errors import ConfigError

CONFIG_NAME = "lorafusion.yaml"

TEMPLATE = """\
# One base model, many adapters. `lorafusion check` validates this file and the data.
version: 1
base:
  model: path/to/model          # Hugging Face directory (safetensors) or a .gguf file
  dtype: bfloat16               # float32 on a CPU
output: runs/first
seed: 0
batching:
  tokens_per_microbatch: 8192   # what one step takes; lower it if memory runs out
  max_length: 1024
  overlong: truncate            # truncate | drop | error
defaults:                       # every job inherits these and may override them
  lora: {r: 16, alpha: 32, dropout: 0.0, target_modules: all-linear}
  optim: {name: adamw, lr: 2.0e-4, schedule: cosine, warmup_ratio: 0.03}
  train: {epochs: 1, global_batch_size: 16}
  eval: {split: 0.05, every: 50}
jobs:                           # one adapter each; they train together
  - name: first
    data: {path: data/first.jsonl}   # text | prompt+completion | instruction+output | messages
  - name: second
    data: {path: data/second.jsonl}
    lora: {r: 8, alpha: 16}
"""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(init)
    app.command()(env)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def init(
    directory: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("."),
    demo: Annotated[bool, typer.Option("--demo", help="Also build the four demo tasks.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented lorafusion.yaml, and the demo's data with --demo."""
    path = directory / CONFIG_NAME
    if demo:
        _init_demo(directory, replace=force or not path.exists())
    elif path.exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(TEMPLATE)
        print(f"wrote    {path}\nnext     lorafusion check {path}")


def _init_demo(directory: Path, *, replace: bool) -> None:
    """Builds the demo's data; the configuration is sized for this machine's device."""
    from lorafusion_jax.cli.session import device_line, on_gpu
    from lorafusion_jax.data.demo import build_demo_tasks, write_demo_config

    print(f"device   {device_line()}")
    for task, path in build_demo_tasks(directory / "data").items():
        print(f"task     {task}: {path}")
    path = directory / CONFIG_NAME
    if replace:
        write_demo_config(directory, "gpu" if on_gpu() else "cpu")
    print(f"{'wrote' if replace else 'kept':<8} {path}\nnext     lorafusion train {path}")


def env() -> None:
    """Print versions, devices and which kernels this machine will use."""
    import platform

    from lorafusion_jax.bench.results import versions
    from lorafusion_jax.cli.session import cache_folder, device_line

    print(f"python   {platform.python_version()} on {platform.platform()}")
    for name, version in versions().items():
        print(f"{name:<8} {version}")
    print(f"device   {device_line()}")
    print(f"cache    {cache_folder()}")


def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="Benchmark.")]) -> int:
    """Run a benchmark of this machine: kernels, layer, schedule, training, ..."""
    from lorafusion_jax import bench as benchmarks

    return benchmarks.run(name, context.args)
