"""What an adapter is, and which linears of a model it targets (PEFT's words and rules)."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flax import nnx

from lorafusion_jax.config import LoraConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.linear import MultiLoRALinear
from pallas_kernels.dropout import MIN_RATE

type Rule = str | Sequence[str]

MAX_RANK = 256
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
        layers_to_transform: number or numbers of the layers to adapt; None for all. Only where
            `target_modules` is not an expression, which can say the same.
        layers_pattern: name or names of the list of layers, where a path has several numbers.
        rank_pattern: other ranks: an expression for the end of a module path, and the rank; the
            first that matches counts.
        alpha_pattern: other values of alpha, by the same rule.
        init: A is uniform in +-1/sqrt(in) ("default") or normal with deviation 1/r ("gaussian");
            B is zero.
    """

    r: int = 8
    alpha: int | float = 8
    dropout: int | float = 0
    use_rslora: bool = False
    target_modules: Rule = ALL_LINEAR
    exclude_modules: Rule | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Rule | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    init: str = "default"

    def __post_init__(self):
        # Hashable whatever sequence is given.
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, str):
                object.__setattr__(self, name, tuple(rule))
        layers = self.layers_to_transform
        if isinstance(layers, Sequence):
            object.__setattr__(self, "layers_to_transform", tuple(layers) or None)
        self._check_layers()
        self._check_patterns()
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
        return cls(**config.model_dump(exclude={"init_from"}))

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by, where no pattern says otherwise.

        >>> LoraSpec(r=16, alpha=32).scale, LoraSpec(r=16, alpha=32, use_rslora=True).scale
        (2.0, 8.0)
        """
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def rank_of(self, path: str) -> int:
        """Returns the rank of a module's A and B."""
        return _first_match(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """Returns what the adapter's output at a module is multiplied by."""
        r, alpha = self.rank_of(path), _first_match(self.alpha_pattern, path, self.alpha)
        return alpha / (r**0.5 if self.use_rslora else r)

    def max_rank(self, paths: Iterable[str]) -> int:
        """Returns the largest rank among modules; `r` for none."""
        return max((self.rank_of(path) for path in paths), default=self.r)

    def patterned(self, paths: Iterable[str]) -> list[str]:
        """Returns those of the modules whose rank or scale is not the adapter's own."""
        if not (self.rank_pattern or self.alpha_pattern):
            return []
        usual = self.r, self.scale
        return [path for path in paths if (self.rank_of(path), self.scale_of(path)) != usual]

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                raise AdapterError("layers_pattern needs layers_to_transform")
            return
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise AdapterError(
                "layers_to_transform needs target_modules to be names or all-linear: an expression "
                "can name the layers itself"
            )
        numbers = layers if isinstance(layers, tuple) else (layers,)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise AdapterError(f"layers_to_transform={layers!r} must be numbers from 0")
        for pattern in _names_of(self.layers_pattern):
            _compiled(pattern)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                _compiled(key)
                whole = isinstance(value, int) and not isinstance(value, bool)
                if name == "rank_pattern" and not (whole and 1 <= value <= MAX_RANK):
                    raise AdapterError(f"{name}: {key}: {value!r} must be from 1 to {MAX_RANK}")
                if not (whole or isinstance(value, float)) or not 0 < value < float("inf"):
                    raise AdapterError(f"{name}: {key}: {value!r} must be a positive number")


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
        chosen = [path for path in linears if selects(spec, path)]
    else:
        _refuse_unmatched(rule, modules, linears)
        chosen = [path for path in modules if selects(spec, path)]
    if not chosen:
        raise AdapterError(
            f"target_modules={rule!r} without exclude_modules={spec.exclude_modules!r} in "
            f"layers_to_transform={spec.layers_to_transform!r} leaves no linear; the model has "
            f"{_names(linears)}"
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


def selects(spec: LoraSpec, path: str) -> bool:
    """Says whether a spec targets a linear at a path."""
    rule = spec.target_modules
    if matches(spec.exclude_modules or (), path):
        return False
    if rule == ALL_LINEAR:
        return path.rpartition(".")[2] != _OUTPUT_HEAD and _in_layers(spec, path)
    if isinstance(rule, str) or path in rule:  # a whole path is PEFT's way to say: in any case
        return matches(rule, path)
    return matches(rule, path) and _in_layers(spec, path)


def refuse_unused_patterns(spec: LoraSpec, paths: Iterable[str]) -> None:
    """Refuses patterns and layers that concern none of the targeted modules: they are misspelt.

    Raises:
        AdapterError: names the key.
    """
    paths = list(paths)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, name):
            if not any(_matches_end(key, path) for path in paths):
                raise AdapterError(
                    f"{name}: {key!r} matches no targeted module, check the spelling"
                )
    layers = spec.layers_to_transform
    for number in () if layers is None else layers if isinstance(layers, tuple) else (layers,):
        if not any(_layer_of(spec, path) == number for path in paths):
            raise AdapterError(f"layers_to_transform: the model has no targeted layer {number}")


def _first_match[T](pattern: Mapping[str, T], path: str, default: T) -> T:
    return next((value for key, value in pattern.items() if _matches_end(key, path)), default)


def _matches_end(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _in_layers(spec: LoraSpec, path: str) -> bool:
    layers = spec.layers_to_transform
    if layers is None:
        return True
    number = _layer_of(spec, path)
    return number in layers if isinstance(layers, tuple) else number == layers


def _layer_of(spec: LoraSpec, path: str) -> int | None:
    """The first number behind a name in a path (behind one of `layers_pattern`, if given)."""
    for name in _names_of(spec.layers_pattern) or (r"[^.]*",):
        found = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
        if found is not None:
            return int(found[found.lastindex or 1])
    return None


def _names_of(rule: Rule | None) -> tuple[str, ...]:
    return () if not rule else (rule,) if isinstance(rule, str) else tuple(rule)


def _compiled(text: str) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{text!r} is not a regular expression: {error}") from None


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
