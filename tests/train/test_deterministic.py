"""`train.deterministic` reaches the attention of every layer and the compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lorafusion_jax.lora.bank import attach_adapters, multi_linears, split_adapters
from lorafusion_jax.models import Decoder, attention_cudnn
from lorafusion_jax.train import programs
from lorafusion_jax.train.batch import pack
from lorafusion_jax.train.step import Model, init_state, train_step
from lorafusion_sched import Microbatch
from tests.train.tiny import CONFIG


@pytest.mark.parametrize("deterministic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reaches_attention_and_compiler(monkeypatch, deterministic):
    asked = []

    def refusal(q, k, segments, scoring):
        asked.append(segments.demands.deterministic)
        return "no GPU here"

    monkeypatch.setattr(attention_cudnn, "refusal", refusal)
    jax.clear_caches()
    decoder = Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    bank = attach_adapters(decoder, list(multi_linears(decoder)), 1, 4)
    graphdef, frozen = split_adapters(decoder)
    model = Model(graphdef, "none", 16, deterministic)
    batch, _ = pack(Microbatch((), 64), {}, tile=16, num_slots=1, max_segments=16)
    state = init_state(bank, ("adamw",))
    jax.eval_shape(partial(train_step, model), state, frozen, batch)
    assert set(asked) == {deterministic}
    for program in programs.programs_of(model).values():
        assert program.options == (programs.REPEATABLE if deterministic else None)
