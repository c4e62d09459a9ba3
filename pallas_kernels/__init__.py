"""Fused LoRA ops for JAX. Knows nothing of models, jobs or training."""

from pallas_kernels.dropout import job_seed as job_seed
from pallas_kernels.dropout import row_keys as row_keys
from pallas_kernels.lora.api import fused_lora as fused_lora
from pallas_kernels.lora.api import fused_multi_lora as fused_multi_lora
from pallas_kernels.lora.mlp import fused_gated_mlp as fused_gated_mlp
