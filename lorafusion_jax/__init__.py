"""Fine-tune many LoRA adapters of one frozen base model at once."""

__version__ = "0.1.0"
