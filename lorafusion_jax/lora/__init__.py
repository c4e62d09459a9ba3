"""Adapters: what they are, where they live, how they get into a model and out to PEFT."""

from lorafusion_jax.lora.bank import AdapterBank as AdapterBank
from lorafusion_jax.lora.inject import get_adapter as get_adapter
from lorafusion_jax.lora.inject import loraize as loraize
from lorafusion_jax.lora.inject import set_adapter as set_adapter
from lorafusion_jax.lora.linear import LoraContext as LoraContext
from lorafusion_jax.lora.linear import LoRALinear as LoRALinear
from lorafusion_jax.lora.linear import MultiLoRALinear as MultiLoRALinear
from lorafusion_jax.lora.peft_io import load_peft as load_peft
from lorafusion_jax.lora.peft_io import save_peft as save_peft
from lorafusion_jax.lora.targets import LoraSpec as LoraSpec
from lorafusion_jax.lora.targets import target_paths as target_paths
