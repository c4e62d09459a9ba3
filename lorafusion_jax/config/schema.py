"""What a run is made of: the sections of the configuration file, as validated records.

Names are PEFT's and transformers' words. Every section refuses unknown keys and values of the wrong
type; nothing is coerced (`r: "16"` and `r: true` are errors). Records are immutable.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lorafusion_jax.config.data import DataConfig, data_path
from lorafusion_jax.config.data import SourceConfig as SourceConfig
from lorafusion_jax.config.section import Section

MIN_DROPOUT = 1 / 512
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(10))]
)


class BaseModelConfig(Section):
    """The frozen base model.

    Attributes:
        model: Hugging Face model directory, `.gguf` file, or hf://org/name (with @revision behind
            it if wanted) to download it from the hub.
        dtype: type the frozen weights are kept and multiplied in.
    """

    model: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class BatchingConfig(Section):
    """How samples become microbatches of static shape.

    Attributes:
        tokens_per_microbatch: capacity in tokens that the packer fills.
        max_length: longest sample in tokens; by default a whole microbatch.
        overlong: what happens to longer samples: cut at the end, left out, or refused.
        capacities: allowed microbatch sizes in tokens, ascending, one compilation each; auto
            chooses one or two by simulating whole schedules with the measured or counted cost of a
            microbatch; by default one, as large as the data can fill.
        tile: padding multiple of each job's stretch in a microbatch; auto is 128 on a GPU and 16
            on a CPU.
    """

    tokens_per_microbatch: int = Field(default=8192, ge=16)
    max_length: int = Field(default_factory=lambda data: data["tokens_per_microbatch"], ge=2)
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    tile: Literal["auto", 16, 128] = "auto"
    capacities: (
        Literal["auto"] | Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None
    ) = None

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        tile = 128 if self.tile == "auto" else self.tile
        if self.tokens_per_microbatch % tile:
            raise ValueError(
                f"tokens_per_microbatch={self.tokens_per_microbatch}, expected a multiple of "
                f"the tile {tile}" + (" (or set tile: 16)" if tile == 128 else "")
            )
        if self.max_length > self.tokens_per_microbatch:
            raise ValueError(
                f"max_length={self.max_length}, expected at most tokens_per_microbatch="
                f"{self.tokens_per_microbatch}: a sample is never split"
            )
        sizes = self.capacities
        if isinstance(sizes, tuple) and (
            list(sizes) != sorted(set(sizes))
            or sizes[-1] != self.tokens_per_microbatch
            or any(size < 1 or size % tile for size in sizes)
        ):
            raise ValueError(
                f"capacities={list(sizes)}, expected ascending multiples of the tile {tile}, the "
                f"last equal to tokens_per_microbatch={self.tokens_per_microbatch}"
            )
        return self


class ParallelConfig(Section):
    """How many devices share the work: `data` copies of a pipeline of `stage` devices.

    Attributes:
        data: copies of the model that train on different microbatches.
        stage: devices that each hold a part of the layers.
    """

    data: int = Field(default=1, ge=1)
    stage: int = Field(default=1, ge=1)

    @property
    def devices(self) -> int:
        """Devices that take part."""
        return self.data * self.stage


class RunTrainConfig(Section):
    """Settings of the whole run, not of a job.

    Attributes:
        remat: which activations are recomputed in the backward pass to save memory; auto takes the
            first of none, mlp, attention and full that fits the device.
        deterministic: the same run gives the same bits on a GPU too, at some cost in speed; on a
            CPU it always does.
        watchdog: seconds without any progress, compilation included, after which the process
            writes the stacks of its threads and leaves with exit code 6; null waits for ever.
    """

    remat: Literal["auto", "none", "mlp", "attention", "full"] = "auto"
    deterministic: bool = False
    watchdog: float | None = Field(default=1800.0, ge=1)


class ReportConfig(Section):
    """How often a job reports, and where to beside the run's folder.

    Attributes:
        every: optimizer steps of a job between two lines of its metrics.
        to: services that get the metrics too, each from an optional package; one that fails is
            left out, and training goes on.
        project: name under which wandb and trackio keep the run.
    """

    every: int = Field(default=10, ge=1)
    to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)] = ()
    project: str = Field(default="lorafusion", min_length=1)


class LoraConfig(Section):
    """The adapter.

    Attributes:
        r: rank.
        alpha: numerator of the scale alpha/r, or alpha/sqrt(r) with `use_rslora`.
        dropout: rate on the input of the adapter; 0, or from 1/512 up.
        use_rslora: scale by alpha/sqrt(r) in place of alpha/r.
        target_modules: "all-linear", a list of module names, or a regex for whole module paths.
        exclude_modules: modules to leave out, by the same rules.
        layers_to_transform: number or list of numbers of the layers to adapt, from 0; by default
            all. Needs target_modules to be names or all-linear.
        layers_pattern: name of the list of layers, where module paths hold several numbers.
        rank_pattern: other ranks for some modules, as in {q_proj: 32, "layers.0.*down_proj": 4};
            a key is a regex for the end of a module path, and the first that matches counts.
        alpha_pattern: other values of alpha for some modules, by the same rule.
        init: of A; B starts at zero. PEFT's uniform, or gaussian.
        init_from: folder of a PEFT adapter to start from instead; its ranks, scales and modules
            must be this job's (`lorafusion import` writes a job that fits).
    """

    r: int = Field(default=16, ge=1, le=256)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | Annotated[tuple[int, ...], Field(strict=False)] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=256)]] = Field(default={})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    init: Literal["default", "gaussian"] = "default"
    init_from: str | None = Field(default=None, min_length=1)

    @field_validator("dropout")
    @classmethod
    def _dropout_is_representable(cls, rate: float) -> float:
        if 0 < rate < MIN_DROPOUT:
            raise ValueError(f"got {rate}, expected 0 or at least 1/512: masks have 8-bit rates")
        return rate

    @field_validator("target_modules", "exclude_modules", "layers_pattern", mode="before")
    @classmethod
    def _modules(cls, value: Any, info: ValidationInfo) -> str | tuple[str, ...] | None:
        if value is None and info.field_name != "target_modules":
            return None
        if isinstance(value, str) and value:
            if value != "all-linear":
                try:
                    re.compile(value)
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"got {value!r}, not a regular expression: {error}") from None
            return value
        if isinstance(value, list | tuple) and value:
            names = tuple(name for name in value if isinstance(name, str) and name)
            if len(names) == len(value):
                return names
        raise ValueError(f'got {value!r}, expected "all-linear", a list of names, or a regex')

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns[T: dict[str, Any]](cls, patterns: T) -> T:
        for key in patterns:
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"got {key!r}, not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        rule, layers = self.target_modules, self.layers_to_transform
        if layers is None and self.layers_pattern is not None:
            raise ValueError("layers_pattern needs layers_to_transform")
        if layers is not None and isinstance(rule, str) and rule != "all-linear":
            raise ValueError(
                "layers_to_transform needs target_modules to be all-linear or a list of names: a "
                "regex can name the layers itself"
            )
        numbers = () if layers is None else layers if isinstance(layers, tuple) else (layers,)
        if layers == () or any(number < 0 for number in numbers):
            raise ValueError(f"layers_to_transform={layers}, expected numbers from 0")
        return self


class OptimConfig(Section):
    """The optimizer of one adapter.

    Attributes:
        name: of the algorithm.
        lr: peak learning rate.
        schedule: of the learning rate over the job's optimizer steps; constant_with_warmup is
            transformers' name for constant with the warmup below.
        warmup_ratio: share of the steps in which the rate rises linearly.
        warmup_steps: the same in steps; replaces the ratio.
        lora_plus_ratio: learning rate of B over that of A (LoRA+); 1 is plain LoRA.
        weight_decay: decoupled decay; adamw only.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        max_grad_norm: clip of this adapter's gradient norm; null is no clip.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"got {list(betas)}, expected two numbers from 0 to below 1")
        return betas

    @model_validator(mode="after")
    def _decay_needs_adamw(self) -> Self:
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay={self.weight_decay} needs name: adamw, got {self.name}")
        return self


class EarlyStoppingConfig(Section):
    """When a job that no longer gets better ends.

    Attributes:
        patience: evaluations in a row without a better held-out loss.
        min_delta: how much lower a loss must be to count as better.
        keep_bits: leave the room of the ended job empty, so that no bit of the other jobs changes;
            by default they are packed anew without it, which adds up their gradients in another
            order.
    """

    patience: int = Field(default=3, ge=1)
    min_delta: float = Field(default=0.0, ge=0)
    keep_bits: bool = False


class SpikeConfig(Section):
    """What a loss spike is: a global batch whose loss is far above the job's recent ones.

    Attributes:
        window: losses that mean and deviation are taken of; no step is skipped before.
        sigmas: deviations above the mean from which on a step is skipped.
        max_consecutive: steps skipped in a row after which the run is saved and stops.
    """

    window: int = Field(default=32, ge=4, le=10_000)
    sigmas: float = Field(default=6.0, gt=0)
    max_consecutive: int = Field(default=3, ge=1)


class TrainConfig(Section):
    """How long a job trains and how its samples are grouped.

    Attributes:
        epochs: passes over the data; 1 where neither this nor `max_steps` is given.
        max_steps: optimizer steps; the data are repeated as needed.
        global_batch_size: samples per optimizer step.
        on_nonfinite: what a non-finite gradient does to this job: reject the step, freeze the
            adapter as it is, or stop the run.
        early_stopping: when the job ends before its last step; by default never.
        spike: guard against loss spikes; null has none.
    """

    epochs: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    global_batch_size: int = Field(default=16, ge=1)
    on_nonfinite: Literal["skip", "freeze", "stop"] = "skip"
    early_stopping: EarlyStoppingConfig | None = None
    spike: SpikeConfig | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both given, expected one of them")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 1)
        return self


class EvalConfig(Section):
    """The held-out part of a job.

    Attributes:
        split: share (below 1) or number of samples of the data to hold out; 0 is no evaluation.
        path: separate data to evaluate on, instead of a split; read as the section `data` says.
        every: optimizer steps between evaluations.
        max_samples: evaluate on the first so many only.
    """

    split: int | float = 0.05
    path: str | None = Field(default=None, min_length=1)
    every: int = Field(default=50, ge=1)
    max_samples: int | None = Field(default=None, ge=1)

    @field_validator("split", mode="before")
    @classmethod
    def _share_or_count(cls, split: Any) -> int | float:
        number = isinstance(split, int | float) and not isinstance(split, bool)
        if not number or not (0 <= split < 1 or (isinstance(split, int) and split >= 1)):
            raise ValueError(f"got {split!r}, expected a share from 0 to below 1 or a whole number")
        return split

    @field_validator("path")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        return None if path is None else data_path(path)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.split:
            if "split" in self.model_fields_set:
                raise ValueError("split and path are both given, expected one of them")
            object.__setattr__(self, "split", 0)
        return self


class SaveConfig(Section):
    """Which checkpoints of a job are kept.

    Attributes:
        every: optimizer steps between checkpoints.
        keep_last: newest checkpoints to keep.
        keep_best: checkpoints of lowest held-out loss to keep.
    """

    every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(default=1, ge=0)


class SweptConfig(Section):
    """What a sweep made a job of; written by `sweep`, not by hand.

    Attributes:
        job: name of the job in the file, which decides held-out rows, order and initialisation.
        values: the values that are this job's own, by dotted key.
    """

    job: str
    values: dict[str, Any]


class JobConfig(Section):
    """One adapter to train: its data and its settings, defaults already filled in.

    Attributes:
        name: of the job, its folder and its adapter: 1 to 64 of A-Z a-z 0-9 . _ - without a leading
            dot.
        data: what it learns from.
        lora: the adapter.
        optim: its optimizer.
        train: how long it trains.
        eval: what is held out of its data.
        save: which of its checkpoints are kept.
        swept: the sweep that it comes from.
    """

    name: str
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    swept: SweptConfig | None = None

    @property
    def identity(self) -> str:
        """The name that decides held-out rows, order, initialisation and dropout."""
        return self.name if self.swept is None else self.swept.job

    @model_validator(mode="after")
    def _stopping_needs_evaluation(self) -> Self:
        evaluated = self.eval.split or self.eval.path is not None
        if self.train.early_stopping is not None and not evaluated:
            raise ValueError("train.early_stopping needs held-out rows: set eval.split or path")
        return self

    @model_validator(mode="after")
    def _sources_say_for_themselves(self) -> Self:
        """Of `data` with sources, format and split are those of held-out data only."""
        changed = self.data.format != "auto" or self.data.split != "train"
        if self.data.sources and changed and self.eval.path is None:
            raise ValueError("with data.sources, format and split belong to each source")
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_safe_folder(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"got {name[:70]!r}, expected 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot"
            )
        if name.split(".")[0].casefold() in WINDOWS_DEVICES or name.endswith("."):
            raise ValueError(f"got {name!r}, which some systems refuse as a folder: rename the job")
        return name


class RunConfig(Section):
    """A whole run: one base model, many jobs.

    Attributes:
        version: of the file format.
        base: the frozen model.
        output: folder of the run.
        seed: of initialisation, order, split and dropout, together with each job's name.
        batching: how samples become microbatches.
        parallel: how many devices share the work.
        train: settings of the whole run; those of a job are in jobs and defaults.
        report: how often jobs report, and where to.
        jobs: adapters that train together, with unique names.
    """

    version: Literal[1] = 1
    base: BaseModelConfig
    output: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    batching: BatchingConfig = BatchingConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: RunTrainConfig = RunTrainConfig()
    report: ReportConfig = ReportConfig()
    jobs: Annotated[tuple[JobConfig, ...], Field(strict=False, min_length=1)]
