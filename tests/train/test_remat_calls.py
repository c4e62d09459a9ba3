"""Policy `mlp` repeats no large product: counted in a layer that is lowered for an H100."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lorafusion_jax.lora.bank import (
    attach_adapters,
    lora_context,
    merge_adapters,
    multi_linears,
    split_adapters,
)
from lorafusion_jax.models import Decoder, ModelConfig, Segments
from lorafusion_jax.models.decoder import layer_site, run_layer
from lorafusion_jax.models.rotary import LayerView, rotary_tables
from pallas_kernels import _mgpu

ROWS = 512
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64,
)  # fmt: skip


def calls(remat: Any, kernel: str) -> int:
    """How often a layer's forward and backward pass mention a kernel."""

    def make():
        model = Decoder(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return model, attach_adapters(model, list(multi_linears(model)), 2, 16)

    model, bank = nnx.eval_shape(make)
    graphdef, frozen = split_adapters(model)

    def run(x, dy, bank, frozen, rows, keys, tiles):
        def forward(x, a, b):
            adapters = bank._replace(a=a, b=b)
            layer = merge_adapters(graphdef, frozen, adapters).model.layers[0]  # pyright: ignore
            view = LayerView(rotary_tables(CONFIG, rows).of(False))
            context = lora_context(adapters, tiles, keys, train=True)
            where = Segments(0 * rows, rows[:17])
            return run_layer(layer, x, view, where, context, layer_site(0), remat=remat)

        y, pull = jax.vjp(forward, x, bank.a, bank.b)
        return y, pull(dy)

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype)

    x, tiles = rows(jnp.bfloat16, 128), jax.ShapeDtypeStruct((ROWS // 128,), jnp.int32)
    arguments = (x, x, bank, frozen, rows(jnp.int32), rows(jnp.uint32), tiles)
    with _mgpu.lower_for((9, 0)):
        lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count(kernel)


@pytest.mark.slow
def test_mlp_repeats_no_product_and_full_does():
    once = calls("none", "lora_base_up")
    assert once > 0 and once % 4 == 0  # q|k|v, o, gate|up, down
    assert calls("mlp", "lora_base_up") == once
    assert calls("full", "lora_base_up") > once
