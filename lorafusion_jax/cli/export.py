"""The export command: PEFT folders, a check of what they compute, and how to serve them."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorafusion_jax.cli.status import RunArgument
from lorafusion_jax.cli.view import print_table
from lorafusion_jax.errors import AdapterError

if TYPE_CHECKING:
    from lorafusion_jax.lora.peft_io import LoadedAdapter
    from lorafusion_jax.models import Base

JobsOption = Annotated[list[str] | None, typer.Option("--job", help="A job; all by default.")]

# What vLLM's --max-lora-rank accepts.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Largest difference of logits, as a share of the largest logit, that float32 sums in another order
# explain; a wrong scale, target or transposition is far beyond it.
_TOLERANCE = 1e-3
_PROBE_TOKENS = 64


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(export)


def export(
    run: RunArgument,
    job: JobsOption = None,
    out: Annotated[Path | None, typer.Option(help="Copy into this folder, one each.")] = None,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="By held-out loss, or at the end.")
    ] = "best",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the stored weights.")
    ] = "float32",
    verify: Annotated[
        bool, typer.Option("--verify", help="Reload, and compare logits with a merged model.")
    ] = False,
) -> None:
    """Write PEFT adapters and print the commands that serve them."""
    from lorafusion_jax.cli.answers import adapter_folder
    from lorafusion_jax.lora.peft_io import load_peft, save_peft
    from lorafusion_jax.train.run_folder import open_run

    folder = open_run(run)
    names = job or list(folder.jobs)
    paths = {name: adapter_folder(folder, name, checkpoint) for name in names}
    if out is None and dtype != "float32":
        raise AdapterError(f"--dtype {dtype} needs --out: the run's own adapters stay float32")
    adapters = {name: load_peft(path) for name, path in paths.items()}
    if out is not None:
        for name, (adapter, spec, base, _) in adapters.items():
            paths[name] = save_peft(out / name, adapter, spec, base, dtype)
    for path in paths.values():
        print(path)
    model = folder.config.base.model
    if verify:
        check_adapters(model, paths)
    ranks = [loaded.spec.max_rank(loaded.adapter) for loaded in adapters.values()]
    print("\n" + "\n".join(serve_commands(model, paths, max(ranks))))


def serve_commands(model: str, adapters: dict[str, Path], max_rank: int) -> list[str]:
    """Returns the lines to serve adapters with vLLM and with SGLang.

    Args:
        model: the base's path.
        adapters: PEFT folder by name.
        max_rank: largest rank among them.

    Raises:
        AdapterError: vLLM has no setting for the rank.
    """
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= max_rank), None)
    if rank is None:
        raise AdapterError(f"r={max_rank} cannot be served: vLLM takes up to {VLLM_RANKS[-1]}")
    lines = []
    if model.endswith(".gguf"):
        lines.append("# BASE: the Hugging Face directory of the model that was trained as GGUF")
    base = "BASE" if model.endswith(".gguf") else shlex.quote(model)
    named = " ".join(shlex.quote(f"{name}={path}") for name, path in adapters.items())
    return [
        *lines,
        f"vllm serve {base} --enable-lora --max-loras {len(adapters)} --max-lora-rank {rank} "
        f"--lora-modules {named}",
        f"python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--max-loras-per-batch {len(adapters)} --lora-paths {named}",
    ]


def check_adapters(model: str, paths: dict[str, Path]) -> None:
    """Reloads adapters, compares their logits with merged weights, and prints the differences.

    Raises:
        AdapterError: a folder does not fit the model, or computes something else than a merge of
            its weights.
    """
    from lorafusion_jax.cli.session import start_jax
    from lorafusion_jax.lora.peft_io import load_peft
    from lorafusion_jax.models import load_base

    start_jax()
    base = load_base(model, "float32")
    rows = []
    for name, path in paths.items():
        difference, moved = compare_with_merge(base, load_peft(path, base.model))
        rows.append((name, f"{difference:.1e}", f"{moved:.1e}"))
        if not difference <= _TOLERANCE:
            raise AdapterError(
                f"{path}: its logits differ from a manual merge by {difference:.1e} of the "
                f"largest one, expected at most {_TOLERANCE:.0e}"
            )
    print()
    print_table(("verified", "differs from a merge by", "differs from the base by"), rows)


def compare_with_merge(base: "Base", loaded: "LoadedAdapter") -> tuple[float, float]:
    """Compares an adapter's logits with those of merged weights, and with the base's.

    Args:
        base: the base model in float32.
        loaded: the adapter.

    Returns:
        Largest difference to the merged model and to the base, as shares of the largest logit.
    """
    import jax.numpy as jnp

    from lorafusion_jax.lora.bank import attach_adapters, multi_linears, put_slot

    tokens = jnp.arange(_PROBE_TOKENS, dtype=jnp.int32) * 7 % base.config.vocab_size
    adapter, spec = loaded.adapter, loaded.spec
    linears = multi_linears(base.model)
    largest = spec.max_rank(adapter)
    bank = put_slot(attach_adapters(base.model, list(adapter), 1, largest), 0, spec, adapter)
    plain, adapted = _logits(base, bank, tokens, -1), _logits(base, bank, tokens, 0)
    kernels = {path: linears[path].kernel[...] for path in adapter}
    for path, (a, b) in adapter.items():
        linears[path].kernel[...] = kernels[path] + spec.scale_of(path) * jnp.asarray(
            a
        ).T @ jnp.asarray(b)
    merged = _logits(base, bank, tokens, -1)
    for path, kernel in kernels.items():
        linears[path].kernel[...] = kernel
    largest = jnp.abs(merged).max()
    return float(jnp.abs(adapted - merged).max() / largest), float(
        jnp.abs(adapted - plain).max() / largest
    )


def _logits(base: "Base", bank, tokens, slot: int):
    """Returns the logits of one sample with the adapter in a slot, -1 for none."""
    import jax.numpy as jnp

    from lorafusion_jax.lora.bank import lora_context, merge_adapters, split_adapters
    from lorafusion_jax.models import Decoder, Segments

    count = tokens.shape[0]
    segments = Segments(jnp.zeros(count, jnp.int32), jnp.asarray([0, count], jnp.int32))
    # Any row key but 0, which marks padding.
    lora = lora_context(
        bank, jnp.asarray([slot], jnp.int32), jnp.ones(count, jnp.uint32), train=False
    )
    model = merge_adapters(*split_adapters(base.model), bank)
    assert isinstance(model, Decoder)
    return model.logits(model(tokens, jnp.arange(count, dtype=jnp.int32), segments, lora))
