"""What an adapter is, and which linears of a model it targets (PEFT's words and rules)."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from flax import nnx

from lorafusion_jax.config import LoraConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.linear import MultiLoRALinear
from pallas_kernels.dropout import MIN_RATE

type Rule = str | Sequence[str]

ALL_LINEAR = "all-linear"
_OUTPUT_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """What an adapter is, in PEFT's words and with PEFT's meaning.

    Attributes:
        r: rank.
        alpha: scale numerator.
        dropout: rate on the adapter branch's input; 0 or in [1/512, 1).
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        target_modules: names (equal to a module path or its last parts), a regular expression that
            matches whole module paths, or "all-linear" for all linears but the output head
            (`lm_head`).
        exclude_modules: names or a regular expression of modules to leave out.
        init: A is uniform in +-1/sqrt(in) ("default") or normal with deviation 1/r ("gaussian");
            B is zero.
    """

    r: int = 8
    alpha: int | float = 8
    dropout: int | float = 0
    use_rslora: bool = False
    target_modules: Rule = ALL_LINEAR
    exclude_modules: Rule | None = None
    init: str = "default"

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules"):  # hashable whatever sequence is given
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, str):
                object.__setattr__(self, name, tuple(rule))
        if self.r < 1:
            raise AdapterError(f"r={self.r} must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise AdapterError(f"alpha={self.alpha} must be a positive number")
        if self.dropout and not MIN_RATE <= self.dropout < 1:
            raise AdapterError(f"dropout={self.dropout} must be 0 or in [1/512, 1)")
        if self.init not in ("default", "gaussian"):
            raise AdapterError(f"init={self.init!r} must be 'default' or 'gaussian'")

    @classmethod
    def from_config(cls, config: LoraConfig) -> "LoraSpec":
        """Returns the adapter that a run configuration describes."""
        return cls(**config.model_dump())

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


def target_paths(model: nnx.Module, spec: LoraSpec) -> list[str]:
    """Returns the paths of the linears that a spec targets, in the model's order.

    Args:
        model: any NNX model.
        spec: its `target_modules` and `exclude_modules` are read.

    Raises:
        AdapterError: a name or the expression matches nothing (the message names near candidates),
            or matches a module that is not a linear.
    """
    modules = named_modules(model)
    linears = [path for path, m in modules.items() if isinstance(m, nnx.Linear | MultiLoRALinear)]
    rule = spec.target_modules
    if rule == ALL_LINEAR:
        chosen = [path for path in linears if path.rpartition(".")[2] != _OUTPUT_HEAD]
    else:
        chosen = [path for path in modules if matches(rule, path)]
        _refuse_unmatched(rule, modules, linears)
    chosen = [path for path in chosen if not matches(spec.exclude_modules or (), path)]
    if not chosen:
        raise AdapterError(
            f"target_modules={rule!r} without exclude_modules={spec.exclude_modules!r} leaves no "
            f"linear; the model has {_names(linears)}"
        )
    for path in chosen:
        if path not in linears:
            kind = type(modules[path]).__name__
            raise AdapterError(
                f"target_modules={rule!r} matches {path!r}, which is a {kind}, not a linear: "
                f"exclude it or target some of {_names(linears)}"
            )
    return chosen


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns all modules inside a model by dotted path, a shared one by its first path."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if path}


def matches(rule: Rule, path: str) -> bool:
    """Says whether a rule (names, or an expression for whole paths) selects a module path.

    Raises:
        AdapterError: the rule is not a regular expression.
    """
    if isinstance(rule, str):
        try:
            return re.fullmatch(rule, path) is not None
        except re.error as error:
            raise AdapterError(f"{rule!r} is not a regular expression: {error}") from error
    return any(path == name or path.endswith(f".{name}") for name in rule)


def _refuse_unmatched(rule: Rule, modules: dict[str, nnx.Module], linears: list[str]) -> None:
    """Refuses a rule, or a name in it, that matches nothing: most likely it is misspelt."""
    for part in [rule] if isinstance(rule, str) else [(name,) for name in rule]:
        if any(matches(part, path) for path in modules):
            continue
        name = part if isinstance(part, str) else part[0]
        suffixes = {path.rpartition(".")[2] for path in linears}
        if isinstance(part, str) and name in suffixes:
            advice = f"a string must match the whole module path: for a name, write [{name}]"
        else:
            near = difflib.get_close_matches(name, sorted({*suffixes, *linears}), n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
        raise AdapterError(
            f"target_modules: {name!r} matches no module; {advice} The model has {_names(linears)}"
        )


def _names(linears: list[str]) -> str:
    """The last parts of the linears' paths, for messages."""
    suffixes = list(dict.fromkeys(path.rpartition(".")[2] for path in linears))
    return ", ".join(suffixes[:12]) + (", ..." if len(suffixes) > 12 else "")
