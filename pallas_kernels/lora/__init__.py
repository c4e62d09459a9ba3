"""Fused LoRA linears: `spec` is the mathematics, `api` the public ops, the rest are kernels."""
