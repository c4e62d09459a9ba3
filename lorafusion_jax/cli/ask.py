"""Commands that use trained adapters: generate, eval."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorafusion_jax.cli.export import JobsOption
from lorafusion_jax.cli.status import RunArgument
from lorafusion_jax.cli.view import number, print_table
from lorafusion_jax.errors import ConfigError

CheckpointOption = Annotated[
    Literal["best", "last"], typer.Option(help="By held-out loss, or at the end.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(generate)
    app.command(name="eval")(evaluate)


def generate(
    run: RunArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    job: JobsOption = None,
    base: Annotated[bool, typer.Option("--base", help="Also ask the base model.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    checkpoint: CheckpointOption = "best",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest, with temperature.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawing.")] = 0,
) -> None:
    """Answer prompts with adapters, side by side. --base asks the base model too."""
    from lorafusion_jax.cli.answers import adapter_folder, load_adapters, side_by_side
    from lorafusion_jax.cli.session import start_jax
    from lorafusion_jax.generate import BASE_SLOT
    from lorafusion_jax.models import load_base
    from lorafusion_jax.train.run_folder import open_run

    if not prompt:
        raise ConfigError('nothing to answer: give --prompt "..."')
    if top_p == 0:
        raise ConfigError("--top-p 0 leaves no token to draw, expected more than 0 and at most 1")
    if top_p < 1 and temperature == 0:
        raise ConfigError("--top-p has no effect without drawing: give --temperature too")
    folder = open_run(run)
    names = job or [name for name in folder.jobs if folder.adapter(name, checkpoint).is_dir()]
    paths = [adapter_folder(folder, name, checkpoint) for name in names]
    start_jax()
    model = load_base(folder.config.base.model, folder.config.base.dtype)
    bank = load_adapters(model, paths) if paths else None
    slots = {"base": BASE_SLOT} if base or not paths else {}
    slots |= {name: slot for slot, name in enumerate(names)}
    answers = side_by_side(
        model,
        bank,
        slots,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )
    width = max(map(len, slots))
    for text, answer in zip(prompt, answers, strict=True):
        print(f"> {text}")
        for name, reply in answer.items():
            print(f"{name:<{width}}  " + reply.strip().replace("\n", "\n" + " " * (width + 2)))
        print()


def evaluate(
    run: RunArgument,
    job: JobsOption = None,
    checkpoint: CheckpointOption = "best",
) -> None:
    """Evaluate adapters on held-out rows. Loss, perplexity and exact match, against the base's."""
    from lorafusion_jax.cli.answers import adapter_folder
    from lorafusion_jax.cli.heldout import evaluate_adapters
    from lorafusion_jax.cli.session import start_jax
    from lorafusion_jax.train.run_folder import open_run

    folder = open_run(run)
    names = job or list(folder.jobs)
    paths: dict[str, Path] = {name: adapter_folder(folder, name, checkpoint) for name in names}
    start_jax()
    rows = []
    for name, who, result in evaluate_adapters(folder, paths):
        values = number(result.loss), number(math.exp(min(result.loss, 700.0)), ".4g")
        accuracy = f"{result.token_accuracy:.1%}", f"{result.exact_match:.1%}"
        rows.append((f"{name}, {who}", str(result.samples), *values, *accuracy))
    if not rows:
        raise ConfigError(f"{folder.path}: none of {', '.join(names)} has held-out rows")
    print_table(("job", "rows", "loss", "perplexity", "tokens right", "exact match"), rows)
