"""The decoder: samples stay apart, policies agree, paths are Hugging Face's."""

import jax.numpy as jnp

from lorafusion_jax.models import random_base
from tests.models.tiny import TINY, packed


def test_remat_policies_agree(rng):
    base = random_base(TINY)
    tokens = jnp.asarray(rng.integers(0, 97, 32))
    positions, segments = packed([9, 14], 32)
    hidden = base.model(tokens, positions, segments)
    assert hidden.shape == (32, 32)
    for remat in ("attention", "full"):
        assert jnp.array_equal(base.model(tokens, positions, segments, remat=remat), hidden)
