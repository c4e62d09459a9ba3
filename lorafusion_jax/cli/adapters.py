"""The import command: what a PEFT adapter is, and the job that goes on from it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafusion_jax.cli.view import print_table
from lorafusion_jax.errors import ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.lora.peft_io import LoadedAdapter

_DATA = "data/FILL_IN.jsonl"


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("import")(import_adapter)


def import_adapter(
    adapter: Annotated[Path, typer.Argument(help="PEFT folder of a LoRA adapter.")],
    name: Annotated[
        str | None, typer.Option("--as", help="Name of the job; the folder's by default.")
    ] = None,
    data: Annotated[str, typer.Option(help="Training data of the job.")] = _DATA,
    append: Annotated[
        Path | None, typer.Option(help="Add the job at the end of this configuration.")
    ] = None,
) -> None:
    """Print the job that goes on from a PEFT adapter. Shows what the adapter holds."""
    from lorafusion_jax.lora.peft_io import load_peft

    loaded = load_peft(adapter)
    where = adapter.resolve()
    print(f"adapter  {where}")
    for line in found_text(loaded):
        print(line)
    inherited = frozenset() if append is None else _default_keys(append)
    text = job_text(loaded, name or where.name, data, where, inherited)
    if append is None:
        print("\njob section:\n\n" + text, end="")
        return
    append_job(append, text)
    print(f"added    job {name or where.name} to {append}")


def found_text(loaded: "LoadedAdapter") -> list[str]:
    """Says in a few lines what an adapter is; prints its modules as a table."""
    import numpy as np

    adapter, spec = loaded.adapter, loaded.spec
    parameters = sum(a.size + b.size for a, b in adapter.values())
    kinds: dict[str, list[str]] = {}
    for path in adapter:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    rows = []
    for kind, paths in kinds.items():
        ranks = sorted({spec.rank_of(path) for path in paths})
        scales = sorted({spec.scale_of(path) for path in paths})
        largest = max(float(np.abs(spec.scale_of(p) * adapter[p][1]).max()) for p in paths)
        cells = ("/".join(map(str, ranks)), "/".join(f"{scale:g}" for scale in scales))
        rows.append((kind, str(len(paths)), *cells, f"{largest:.2g}"))
    print_table(("modules", "count", "rank", "scale", "largest of scale x B"), rows)
    rule = "alpha / sqrt(r)" if spec.use_rslora else "alpha / r"
    return [
        f"base     {loaded.base_model_name_or_path or 'not recorded'}",
        f"lora     r {spec.r}, alpha {spec.alpha:g}, scale {spec.scale:g} ({rule}), "
        f"dropout {spec.dropout:g}",
        f"size     {parameters:,} parameters in {len(adapter)} modules, stored as {loaded.dtype}",
    ]


def job_text(
    loaded: "LoadedAdapter",
    name: str,
    data: str,
    directory: Path,
    inherited: frozenset[str] = frozenset(),
) -> str:
    """Returns the YAML of a job that starts from an adapter, as an entry of `jobs:`.

    Every setting that decides the adapter is written, so that no default changes it; those that it
    does not have are written where they are among the `inherited` keys of the defaults.
    """
    spec = loaded.spec
    settings = {
        "init_from": str(directory),
        "r": spec.r,
        "alpha": float(spec.alpha),
        "use_rslora": spec.use_rslora,
        "dropout": float(spec.dropout),
        "target_modules": _rule(spec.target_modules),
        "exclude_modules": _rule(spec.exclude_modules),
        "layers_to_transform": _rule(spec.layers_to_transform),
        "layers_pattern": _rule(spec.layers_pattern),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: float(value) for key, value in spec.alpha_pattern.items()},
    }
    lines = [
        f"  - name: {json.dumps(name, ensure_ascii=False)}",
        f"    data: {{path: {json.dumps(data, ensure_ascii=False)}}}",
        "    lora:",
    ]
    lines += [
        # JSON is YAML on one line, whatever characters a name has.
        f"      {key}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in settings.items()
        if key in inherited or (value is not None and value != {})
    ]
    return "\n".join(lines) + "\n"


def _default_keys(path: Path) -> frozenset[str]:
    """Keys of `defaults.lora` in a configuration file."""
    from lorafusion_jax.config.source import read_source

    defaults = read_source(path)[0].get("defaults")
    lora = defaults.get("lora") if isinstance(defaults, dict) else None
    return frozenset(lora) if isinstance(lora, dict) else frozenset()


def append_job(path: Path, text: str) -> None:
    """Adds the YAML of a job at the end of a configuration file.

    Raises:
        ConfigError: the file with the job would not be a valid configuration, which needs `jobs`
            to be its last section; the file stays as it is.
    """
    from lorafusion_jax.config.load import config_from_dict
    from lorafusion_jax.config.source import parse_yaml, read_source

    if path.suffix == ".toml":
        raise ConfigError(f"{path}: a job is added to YAML files only")
    before, _ = read_source(path)
    content = path.read_text(encoding="utf-8-sig")
    whole = content + ("" if content.endswith("\n") else "\n") + text
    try:
        raw, lines = parse_yaml(whole, str(path))
        last = list(before)[-1:] == ["jobs"]
        added = last and len(raw["jobs"]) == len(before["jobs"]) + 1
    except (ConfigError, KeyError, TypeError) as error:
        raise _not_last(path) from error
    if not added:
        raise _not_last(path)
    config_from_dict(raw, name=str(path), folder=path.parent, lines=lines)
    path.write_text(whole, encoding="utf-8")


def _not_last(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: a job can be added where `jobs:` is the last section and a list indented by two; "
        "without --append the section is printed for you to paste"
    )


def _rule(rule):
    return list(rule) if isinstance(rule, tuple) else rule
