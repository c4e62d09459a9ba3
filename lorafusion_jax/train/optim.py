"""Optimizers of the Python API: the configuration's `optim` section with its name filled in."""

from functools import partial

from lorafusion_jax.config import OptimConfig

AdamW = partial(OptimConfig, name="adamw")
Adam = partial(OptimConfig, name="adam")
Sgd = partial(OptimConfig, name="sgd")
