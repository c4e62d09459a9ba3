"""On GPUs, with our kernels: together is alone, and several devices are one; against float32."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lorafusion_jax.models.hf_weights import Base
from tests.reliability.gpu_run import trainer, wide_base
from tests.tolerance import assert_error_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("trained_on_gpu"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
STEPS, COMPARED = 10, ("b", "c")
two_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs 2 CUDA devices")


def adapter(output: Path, name: str) -> dict[str, np.ndarray]:
    """A job's last adapter, as one vector a side: the ratio of single small tensors is chance."""
    tensors = load_file(output / "jobs" / name / "adapter_last" / "adapter_model.safetensors")
    sides = {side: [x for key, x in tensors.items() if f"lora_{side}" in key] for side in "AB"}
    return {side: np.concatenate([x.ravel() for x in found]) for side, found in sides.items()}


def trained(base: Base, output: Path, **options) -> Path:
    trainer(base, output, steps=STEPS, **options).fit()
    return output


@pytest.fixture(scope="module")
def base():
    return wide_base()


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    return trained(base, tmp_path_factory.mktemp("together") / "run")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {name: adapter(trained(base, folder / name, only=name), name) for name in COMPARED}


@pytest.fixture(scope="module")
def truth(base, tmp_path_factory):
    """The same weights in float32, which go through XLA, with exact products."""
    graphdef, state = nnx.split(base.model)
    wide = jax.tree.map(lambda x: x.astype(np.float32), state)
    exact = Base(nnx.merge(graphdef, wide), base.config, "", "random", None)
    folder, before = tmp_path_factory.mktemp("truth"), jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")  # in the compiler's threads too
    try:
        return {name: adapter(trained(exact, folder / name, only=name), name) for name in COMPARED}
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.scenario("C1")
@pytest.mark.parametrize("name", COMPARED)
def test_together_errs_no_more_than_alone(together, alone, truth, name):
    """Alone, a job is packed in another way, and its neighbours' rows are not there."""
    assert_error_ratio(adapter(together, name), alone[name], truth[name], factor=2)


@pytest.mark.scenario("C1")
def test_other_tokens_would_be_seen(base, alone, truth, tmp_path):
    """The twin."""
    other = adapter(trained(base, tmp_path / "run", only="b", other="b"), "b")
    with pytest.raises(AssertionError, match="error beyond"):
        assert_error_ratio(other, alone["b"], truth["b"], factor=2)


@pytest.fixture(scope="module")
def halves(base, tmp_path_factory):
    return trained(base, tmp_path_factory.mktemp("halves") / "run", stages=2)


@two_devices
@pytest.mark.scenario("C11")
@pytest.mark.parametrize("name", COMPARED)
def test_two_stages_err_no_more_than_one_device(halves, together, truth, name):
    assert_error_ratio(adapter(halves, name), adapter(together, name), truth[name], factor=2)
