"""The verify-checkpoint command: reads, and changes nothing."""

from pathlib import Path
from typing import Annotated

import typer

from lorafusion_jax.errors import CheckpointError, ConfigError

PathArgument = Annotated[Path, typer.Argument(help="Output folder of a run, or one checkpoint.")]


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("verify-checkpoint")(verify_checkpoint)


def verify_checkpoint(path: PathArgument) -> None:
    """Check every byte of checkpoints. Exit code 3 if one is damaged."""
    from lorafusion_jax.train.checkpoint import Checkpoints

    one = path.name.isdecimal() and path.is_dir()
    folder = path.parent if one else path / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"{path}: expected the output folder of a run, or one of its checkpoints")
    checkpoints = Checkpoints(folder)
    steps = [int(path.name)] if one else checkpoints.steps()
    damaged = []
    for step in steps:
        try:
            restored = checkpoints.load(step)
        except CheckpointError as error:
            damaged.append(step)
            print(f"{step:>8}  damaged  {error}")
            continue
        size = sum(leaf.nbytes for leaf in restored.leaves.values())
        print(f"{step:>8}  whole    {len(restored.leaves)} arrays, {size} bytes")
    for name in () if one else checkpoints.leftovers():
        print(f"{name:>8}  unfinished, will be removed when the run goes on")
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint")
    if damaged:
        usable = [step for step in steps if step not in damaged]
        hint = f"the run goes on from {max(usable)}" if usable else "none can be used"
        raise CheckpointError(f"{len(damaged)} of {len(steps)} checkpoints damaged; {hint}")
