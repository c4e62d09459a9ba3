"""PEFT's adapter_config.json: what we write, and what we accept."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.safetensors_io import parse_json
from lorafusion_jax.lora.targets import ALL_LINEAR, LoraSpec

_PEFT_FORMAT = "0.21.2"  # the PEFT release whose fields are written
_MAX_BYTES = 1 << 20

# Fields that change nothing about what a trained adapter computes, or are checked by themselves.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, ...) change them.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva")


def config_text(spec: LoraSpec, base: str | None, paths: Iterable[str]) -> str:
    """Returns adapter_config.json for an adapter.

    Args:
        spec: what the adapter is.
        base: path or name of its base model.
        paths: the modules it has weights for.
    """
    targets = spec.target_modules
    if targets == ALL_LINEAR:
        targets = {path.rpartition(".")[2] for path in paths}
    fields = {
        "alpha_pattern": {key: _number(alpha) for key, alpha in spec.alpha_pattern.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": _rule_json(spec.exclude_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if spec.init == "default" else spec.init,
        "layers_pattern": _rule_json(spec.layers_pattern),
        "layers_to_transform": _rule_json(spec.layers_to_transform),
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": float(spec.dropout),
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": _PEFT_FORMAT,
        "r": spec.r,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": _rule_json(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.use_rslora,
    }
    # Sorted by key, but the patterns keep their order: the first that matches counts.
    return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"


def _rule_json(rule):
    return rule if rule is None or isinstance(rule, str | int) else sorted(rule)


def _number(value: int | float) -> int | float:
    return int(value) if value == int(value) else value


def read_config(path: Path) -> tuple[LoraSpec, str | None]:
    """Reads adapter_config.json: what the adapter is, and its base model.

    Raises:
        AdapterError: the file is not that of a plain LoRA; the message names the key.
    """
    with open(path, "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise AdapterError(f"{path}: more than {_MAX_BYTES} bytes")
    config = parse_json(path, text)
    for problem in (_unsupported(config), _malformed(config)):
        if problem is not None:
            key, expected = problem
            got = f"{key}={config[key]!r}" if key in config else f"{key} is missing"
            raise AdapterError(f"{path}: {got}, expected {expected}")
    try:
        spec = LoraSpec(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            target_modules=config["target_modules"],
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern") or None,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "default",
        )
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    return spec, config.get("base_model_name_or_path")


def _unsupported(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key that asks for more than a plain LoRA, and what was expected there."""
    if config.get("peft_type") != "LORA":
        return "peft_type", "'LORA': other methods are not supported"
    if config.get("bias", "none") != "none":
        return "bias", "'none': trained biases are not supported"
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        return "init_lora_weights", "an initialisation that leaves the base weights unchanged"
    for key, value in config.items():
        if key not in _HARMLESS and value:
            return key, "null, false or empty: what it asks for is not supported"
    return None


def _malformed(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key whose value has the wrong type, and what was expected there."""
    if type(config.get("r")) is not int:
        return "r", "an integer"
    for key, default in (("lora_alpha", None), ("lora_dropout", 0.0)):
        value = config.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            return key, "a number"
    if type(config.get("use_rslora", False)) is not bool:
        return "use_rslora", "true or false"
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        return "base_model_name_or_path", "a string or null"
    if not _is_rule(config.get("target_modules")):
        return "target_modules", "a list of names or a regular expression"
    if config.get("exclude_modules") is not None and not _is_rule(config["exclude_modules"]):
        return "exclude_modules", "a list of names, a regular expression or null"
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or any(type(x) not in kinds for x in pattern.values()):
            return key, "an object of expressions and numbers"
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and any(type(number) is not int for number in numbers):
        return "layers_to_transform", "a number, a list of numbers or null"
    if config.get("layers_pattern") and not _is_rule(config["layers_pattern"]):
        return "layers_pattern", "a name, a list of names or null"
    return None


def _is_rule(rule: Any) -> bool:
    names = isinstance(rule, list) and rule and all(isinstance(name, str) for name in rule)
    return isinstance(rule, str) or bool(names)
