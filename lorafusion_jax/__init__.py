"""Fine-tune many LoRA adapters of one frozen base model at once.

    import lorafusion_jax as lf

    base = lf.load_base("./SmolLM2-135M-Instruct", dtype="bfloat16")
    trainer = lf.MultiTrainer(base, tokens_per_microbatch=8192, output="runs/demo")
    trainer.add_job("sql", "sql.jsonl", lora=lf.LoraConfig(r=16), optim=lf.AdamW(lr=2e-4))
    trainer.add_job("emoji", rows, lora=lf.LoraConfig(r=8))
    results = trainer.fit()
    results["sql"].adapter.save_peft("adapters/sql")

Names are imported when they are first used: importing the package is quick and touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafusion_jax.config import DataConfig as DataConfig
    from lorafusion_jax.config import EarlyStoppingConfig as EarlyStoppingConfig
    from lorafusion_jax.config import EvalConfig as EvalConfig
    from lorafusion_jax.config import LoraConfig as LoraConfig
    from lorafusion_jax.config import RunConfig as RunConfig
    from lorafusion_jax.config import SaveConfig as SaveConfig
    from lorafusion_jax.config import TrainConfig as TrainConfig
    from lorafusion_jax.config import load_config as load_config
    from lorafusion_jax.data import Dataset as Dataset
    from lorafusion_jax.lora import LoRALinear as LoRALinear
    from lorafusion_jax.lora import LoraSpec as LoraSpec
    from lorafusion_jax.lora import MultiLoRALinear as MultiLoRALinear
    from lorafusion_jax.lora import loraize as loraize
    from lorafusion_jax.lora.qwix_plugin import FusedLoraProvider as FusedLoraProvider
    from lorafusion_jax.models.hf_weights import Base as Base
    from lorafusion_jax.models.hf_weights import load_base as load_base
    from lorafusion_jax.models.hf_weights import random_base as random_base
    from lorafusion_jax.train.optim import Adam as Adam
    from lorafusion_jax.train.optim import AdamW as AdamW
    from lorafusion_jax.train.optim import Sgd as Sgd
    from lorafusion_jax.train.run_folder import open_run as open_run
    from lorafusion_jax.train.trainer import MultiTrainer as MultiTrainer
    from lorafusion_jax.train.trainer import trainer_from_config as trainer_from_config
    from lorafusion_sched import plan as plan
    from pallas_kernels import fused_gated_mlp as fused_gated_mlp
    from pallas_kernels import fused_lora as fused_lora
    from pallas_kernels import fused_multi_lora as fused_multi_lora

__version__ = "0.1.0"

_HOMES = {
    "lorafusion_jax.config": (
        "DataConfig",
        "EarlyStoppingConfig",
        "EvalConfig",
        "LoraConfig",
        "RunConfig",
        "SaveConfig",
        "TrainConfig",
        "load_config",
    ),
    "lorafusion_jax.data": ("Dataset",),
    "lorafusion_jax.lora": ("LoRALinear", "LoraSpec", "MultiLoRALinear", "loraize"),
    "lorafusion_jax.lora.qwix_plugin": ("FusedLoraProvider",),
    "lorafusion_jax.models.hf_weights": ("Base", "load_base", "random_base"),
    "lorafusion_jax.train.optim": ("Adam", "AdamW", "Sgd"),
    "lorafusion_jax.train.run_folder": ("open_run",),
    "lorafusion_jax.train.trainer": ("MultiTrainer", "trainer_from_config"),
    "lorafusion_sched": ("plan",),
    "pallas_kernels": ("fused_gated_mlp", "fused_lora", "fused_multi_lora"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
