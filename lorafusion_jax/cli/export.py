"""The export command: PEFT folders or merged models, and how to serve them."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorafusion_jax.cli.status import RunArgument
from lorafusion_jax.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.lora.peft_io import LoadedAdapter
    from lorafusion_jax.models.hf_weights import Dtype

JobsOption = Annotated[list[str] | None, typer.Option("--job", help="A job; all by default.")]

# What vLLM's --max-lora-rank accepts.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

type Format = Literal["peft", "peft-uniform", "merged"]


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(export)


def export(
    run: RunArgument,
    job: JobsOption = None,
    out: Annotated[Path | None, typer.Option(help="Write into this folder, one each.")] = None,
    format: Annotated[
        Literal["peft", "peft-uniform", "merged"],
        typer.Option(
            help="PEFT's; the same at one rank and scale, for servers that know no patterns; or "
            "the base model with the adapter merged into it."
        ),
    ] = "peft",
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="By held-out loss, or at the end.")
    ] = "best",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the stored weights: float32 by default; merged, the base's own."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of a merged model: 500MB; 5GB by default.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Reload, and compare logits with a merged model.")
    ] = False,
) -> None:
    """Write PEFT adapters or merged models. Prints the commands that serve them."""
    from lorafusion_jax.cli.answers import adapter_folder
    from lorafusion_jax.lora.peft_io import load_peft
    from lorafusion_jax.train.run_folder import open_run

    folder = open_run(run)
    names = job or list(folder.jobs)
    shard_bytes = parse_size(max_shard_size or "5GB")
    if max_shard_size is not None and format != "merged":
        raise ConfigError("--max-shard-size is for --format merged: adapters are one small file")
    paths = {name: adapter_folder(folder, name, checkpoint) for name in names}
    if out is None and format != "peft":
        raise AdapterError(f"--format {format} needs --out, the folder to write into")
    if out is None and dtype not in (None, "float32"):
        raise AdapterError(f"--dtype {dtype} needs --out: the run's own adapters stay float32")
    adapters = {name: load_peft(path) for name, path in paths.items()}
    model = folder.config.base.model
    if out is not None:
        for name, loaded in adapters.items():
            if format == "merged":
                paths[name] = _write_merged(out / name, model, loaded, dtype, shard_bytes)
            else:
                paths[name] = _write_peft(out / name, loaded, format, dtype)
    for path in paths.values():
        print(path)
    if verify:
        from lorafusion_jax.cli.compare import check_adapters, check_merged

        check_merged(model, paths, adapters) if format == "merged" else check_adapters(model, paths)
    if format == "merged":
        print("\n" + "\n".join(f"vllm serve {shlex.quote(str(p))}" for p in paths.values()))
        return
    patterned = [n for n, (adapter, spec, *_) in adapters.items() if spec.patterned(adapter)]
    if patterned and format == "peft":
        print(
            f"\n# vLLM and SGLang ignore the patterns of {', '.join(patterned)}: to serve them, "
            "export with --format peft-uniform --out FOLDER"
        )
        return
    ranks = [loaded.spec.max_rank(loaded.adapter) for loaded in adapters.values()]
    print("\n" + "\n".join(serve_commands(model, paths, max(ranks))))


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as 5GB.

    Raises:
        ConfigError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--max-shard-size {text!r}: expected a size such as 500MB or 5GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _write_peft(
    directory: Path, loaded: "LoadedAdapter", format: Format, dtype: "Dtype | None"
) -> Path:
    from lorafusion_jax.lora.peft_io import save_peft
    from lorafusion_jax.lora.uniform import uniform_adapter

    adapter, spec = loaded.adapter, loaded.spec
    if format == "peft-uniform":
        adapter, spec = uniform_adapter(adapter, spec)
    base = loaded.base_model_name_or_path
    return save_peft(directory, adapter, spec, base, dtype or "float32")


def _write_merged(
    directory: Path, model: str, loaded: "LoadedAdapter", dtype: "Dtype | None", shard_bytes: int
) -> Path:
    from lorafusion_jax.models.merged import save_merged

    return save_merged(
        directory, model, loaded.adapter, loaded.spec, dtype=dtype, max_shard_bytes=shard_bytes
    )


def serve_commands(model: str, adapters: dict[str, Path], max_rank: int) -> list[str]:
    """Returns the lines to serve adapters with vLLM and with SGLang.

    Args:
        model: the base's path or hub id.
        adapters: PEFT folder by name.
        max_rank: largest rank among them.

    Raises:
        AdapterError: vLLM has no setting for the rank.
    """
    from lorafusion_jax.models.hub import hub_id

    rank = next((allowed for allowed in VLLM_RANKS if allowed >= max_rank), None)
    if rank is None:
        raise AdapterError(f"r={max_rank} cannot be served: vLLM takes up to {VLLM_RANKS[-1]}")
    lines = []
    if model.endswith(".gguf"):
        lines.append("# BASE: the Hugging Face directory of the model that was trained as GGUF")
    base = "BASE" if model.endswith(".gguf") else shlex.quote(model)
    if (hub := hub_id(model)) is not None:
        base = hub.repo + (f" --revision {hub.revision}" if hub.revision else "")
    named = " ".join(shlex.quote(f"{name}={path}") for name, path in adapters.items())
    return [
        *lines,
        f"vllm serve {base} --enable-lora --max-loras {len(adapters)} --max-lora-rank {rank} "
        f"--lora-modules {named}",
        f"python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--max-loras-per-batch {len(adapters)} --lora-paths {named}",
    ]
