"""`loraize`: LoRA for any NNX model, by replacing its linears in place."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax import lax

from lorafusion_jax.config import LoraConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import Adapter, init_adapter
from lorafusion_jax.lora.linear import LoRALinear
from lorafusion_jax.lora.targets import LoraSpec, named_modules, target_paths


def loraize(
    model: nnx.Module,
    config: LoraConfig | LoraSpec,
    *,
    seed: int = 0,
    rngs: nnx.Rngs | None = None,
) -> list[str]:
    """Replaces the targeted `nnx.Linear`s of a model by `LoRALinear`s, in place.

    The model's outputs are unchanged until the adapter is trained, because B starts at zero.

    Args:
        model: any NNX model.
        config: rank, scale, dropout and PEFT's target rules.
        seed: of A's initial value, which is a function of it and of the module paths.
        rngs: source of dropout keys; None makes one from `seed`.

    Returns:
        The paths of the adapted linears.

    Raises:
        AdapterError: nothing matches, or a matched module cannot be adapted.
    """
    spec = config if isinstance(config, LoraSpec) else LoraSpec.from_config(config)
    paths = target_paths(model, spec)
    modules = named_modules(model)
    linears = {path: _checked(path, modules[path]) for path in paths}
    holders = _holders(model, linears)
    shapes = {path: (m.in_features, m.out_features) for path, m in linears.items()}
    adapter = init_adapter(shapes, spec, seed)
    rngs = nnx.Rngs(dropout=seed) if rngs is None else rngs
    for site, path in enumerate(paths):
        adapted = LoRALinear(
            linears[path],
            *adapter[path],
            scale=spec.scale_of(path),
            dropout=spec.dropout,
            site=site,
            rngs=rngs,
        )
        for holder, name in holders[path]:
            setattr(holder, name, adapted)
    return paths


def get_adapter(model: nnx.Module) -> Adapter:
    """Returns the adapter of a loraized model: (A [r, in], B [r, out]) by module path."""
    return {path: (m.lora_a[...], m.lora_b[...]) for path, m in _adapted(model).items()}


def set_adapter(model: nnx.Module, adapter: Adapter) -> None:
    """Writes an adapter, such as one that was loaded from a PEFT directory, into a loraized model.

    Raises:
        AdapterError: its modules or shapes are not those of the model.
    """
    present = get_adapter(model)
    if set(present) != set(adapter):
        odd = sorted(set(present) ^ set(adapter))
        raise AdapterError(f"adapter and model differ in {len(odd)} modules, such as {odd[0]!r}")
    linears = _adapted(model)
    for path, (a, b) in adapter.items():
        if (a.shape, b.shape) != tuple(x.shape for x in present[path]):
            raise AdapterError(
                f"{path}: A {a.shape} and B {b.shape} do not fit the model's "
                f"{present[path][0].shape} and {present[path][1].shape}"
            )
        linears[path].lora_a[...], linears[path].lora_b[...] = jnp.asarray(a), jnp.asarray(b)


def _adapted(model: nnx.Module) -> dict[str, LoRALinear]:
    return {p: m for p, m in named_modules(model).items() if isinstance(m, LoRALinear)}


def _checked(path: str, module: nnx.Module) -> nnx.Linear:
    if type(module) is not nnx.Linear:
        raise AdapterError(
            f"{path} is a {type(module).__name__}: only nnx.Linear itself can be replaced "
            "(for MultiLoRALinear use attach_adapters)"
        )
    own = (module.precision, module.preferred_element_type)
    if module.dot_general is not lax.dot_general or any(setting is not None for setting in own):
        raise AdapterError(
            f"{path} has its own dot_general, precision or preferred_element_type, which the fused "
            "op would ignore: leave it out with exclude_modules"
        )
    return module


def _holders(
    model: nnx.Module, linears: Mapping[str, nnx.Linear]
) -> dict[str, list[tuple[nnx.Module, str]]]:
    """Where each linear is an attribute (also entries of nnx.List and nnx.Dict); all, if shared."""
    path_of = {id(linear): path for path, linear in linears.items()}
    holders: dict[str, list[tuple[nnx.Module, str]]] = {path: [] for path in linears}
    for _, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if id(value) in path_of:
                holders[path_of[id(value)]].append((module, name))
    for path, found in holders.items():
        if not found:
            raise AdapterError(
                f"{path} is held in a plain container, where it cannot be replaced: use nnx.List "
                "or nnx.Dict"
            )
    return holders
