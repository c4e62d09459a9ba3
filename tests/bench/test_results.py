"""Where results of a device lie."""

import pytest

from lorafusion_jax.bench.results import folder_of


@pytest.mark.parametrize(
    "kind, folder",
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_folder_of_a_device(kind, folder):
    assert folder_of(kind) == folder
