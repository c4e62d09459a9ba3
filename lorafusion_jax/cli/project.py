"""Commands about the machine and the project: init, schema, env, bench."""

from pathlib import Path
from typing import Annotated

import typer

from lorafusion_jax.errors import ConfigError

CONFIG_NAME = "lorafusion.yaml"

_JOB_LIST = """\
jobs:
  # Names become folders; each job may set its own lora, optim, train, eval and save.
"""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(init)
    app.command()(schema)
    app.command()(env)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def template(jobs: int) -> str:
    """Returns a commented configuration with so many jobs: the long one for two, else a list."""
    from lorafusion_jax.config import template_yaml

    text = template_yaml()
    if jobs == 2:
        return text
    width = len(str(jobs))
    names = [f"job-{number:0{width}d}" for number in range(1, jobs + 1)]
    lines = [f"  - {{name: {name}, data: {{path: data/{name}.jsonl}}}}\n" for name in names]
    return text[: text.index("jobs:\n")] + _JOB_LIST + "".join(lines)


def init(
    directory: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("."),
    demo: Annotated[bool, typer.Option("--demo", help="Also build the four demo tasks.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=256, help="How many jobs the template lists, 2 if not.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented lorafusion.yaml. With --demo, also the demo's data."""
    path = directory / CONFIG_NAME
    if demo and jobs is not None:
        raise ConfigError("--demo has four jobs of its own: leave out --jobs, or --demo")
    if demo:
        _init_demo(directory, replace=force or not path.exists())
    elif path.exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(template(jobs or 2))
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


def schema() -> None:
    """Print the configuration's JSON schema, for editors."""
    import json

    from lorafusion_jax.config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))


def env() -> None:
    """Print versions, devices and kernels of this machine."""
    import platform

    from lorafusion_jax.bench.results import versions
    from lorafusion_jax.cli.session import cache_folder, device_line

    print(f"python   {platform.python_version()} on {platform.platform()}")
    for name, version in versions().items():
        print(f"{name:<8} {version}")
    print(f"device   {device_line()}")
    print(f"cache    {cache_folder()}")


def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="Benchmark.")]) -> int:
    """Run a benchmark of this machine (`bench list`)."""
    from lorafusion_jax import bench as benchmarks

    if name == "list":
        print("\n".join(benchmarks.names()))
        return 0
    return benchmarks.run(name, context.args)
