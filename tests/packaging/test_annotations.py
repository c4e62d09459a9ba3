"""The run-time check of annotations is on where beartype is installed, and it catches mistakes."""

import pytest


def test_wrong_shape_is_caught_at_the_border_of_a_function():
    pytest.importorskip("beartype")
    import jax.numpy as jnp
    from jaxtyping import TypeCheckError

    from lorafusion_jax.models.decoder import rotate

    with pytest.raises(TypeCheckError):
        rotate(jnp.zeros((4, 2)), None)


def test_int_is_a_float():
    from lorafusion_jax.train.events import CheckpointSaved

    assert CheckpointSaved(step=1, seconds=2, blocked=0, path="").seconds == 2
