"""Base models: configuration, decoder, loading."""

from lorafusion_jax.models.attention import Segments
from lorafusion_jax.models.config import ModelConfig, RopeScaling
from lorafusion_jax.models.decoder import Decoder
from lorafusion_jax.models.hf_weights import Base, load_base, open_base, random_base

__all__ = [
    "Base",
    "Decoder",
    "ModelConfig",
    "RopeScaling",
    "Segments",
    "load_base",
    "open_base",
    "random_base",
]
