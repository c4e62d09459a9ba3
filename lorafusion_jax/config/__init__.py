"""One configuration file describes a run: the base model and every job that trains on it."""

from lorafusion_jax.config.data import DataConfig, SourceConfig
from lorafusion_jax.config.diff import Change, config_diff, settings_of
from lorafusion_jax.config.load import config_from_dict, load_config, resolved_yaml, template_yaml
from lorafusion_jax.config.schema import (
    BaseModelConfig,
    BatchingConfig,
    EarlyStoppingConfig,
    EvalConfig,
    JobConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    ReportConfig,
    RunConfig,
    RunTrainConfig,
    SaveConfig,
    SpikeConfig,
    TrainConfig,
)

__all__ = [
    "BaseModelConfig",
    "BatchingConfig",
    "Change",
    "DataConfig",
    "EarlyStoppingConfig",
    "EvalConfig",
    "JobConfig",
    "LoraConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReportConfig",
    "RunConfig",
    "RunTrainConfig",
    "SaveConfig",
    "SourceConfig",
    "SpikeConfig",
    "TrainConfig",
    "config_diff",
    "config_from_dict",
    "load_config",
    "resolved_yaml",
    "settings_of",
    "template_yaml",
]
