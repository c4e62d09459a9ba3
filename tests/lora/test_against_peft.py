"""Our adapters and PEFT's: the same loss curves, the same logits, each reads the other's files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.lora.bank import (
    attach_adapters,
    empty_bank,
    lora_context,
    merge_adapters,
    multi_linears,
    put_slot,
    read_slot,
    split_adapters,
    write_slot,
)
from lorafusion_jax.lora.peft_io import load_peft, save_peft
from lorafusion_jax.lora.targets import LoraSpec, target_paths
from lorafusion_jax.models import Segments
from tests.lora.curve import our_losses, prepare
from tests.lora.tiny_hf import VOCAB, write_tiny_llama
from tests.tolerance import assert_bit_equal, assert_error_ratio

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "peft_curve.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return lf.load_base(write_tiny_llama(tmp_path_factory.mktemp("hf") / "base"))


def _assert_curves_agree(ours, theirs, factor=2.0):
    for name, losses in ours.items():
        curve = {width: np.array(values) for width, values in theirs[name].items()}
        assert curve["float64"].min() < curve["float64"][0] - 0.3  # it learns: it could differ
        actual = np.array(losses, np.float32)
        reference = curve["float32"].astype(np.float32)
        # The floor is 1e-6 of the loss: other machines round other sums.
        assert_error_ratio(
            {name: actual}, {name: reference}, {name: curve["float64"]}, factor, floor_ulp=8
        )


def test_twenty_steps_of_two_adapters_together_follow_pefts_curves_alone(base, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    assert golden["inputs"] == prepare(tmp_path / "prepared"), "make the golden again: see curve.py"
    theirs = golden["losses"]
    ours = our_losses(base, tmp_path / "run")
    _assert_curves_agree(ours, theirs)
    swapped = {"plain": ours["rslora"], "rslora": ours["plain"]}
    with pytest.raises(AssertionError):
        _assert_curves_agree(swapped, theirs)


def _torch_python() -> str:
    """An interpreter with torch, transformers and peft: this one, or LORAFUSION_TORCH_PYTHON."""
    named = os.environ.get("LORAFUSION_TORCH_PYTHON")
    if named is None and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    if named is None and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    return named or sys.executable


def _run_torch(script: str, *args) -> str:
    command = [_torch_python(), str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.torch
def test_the_committed_curves_are_what_torch_computes_here(tmp_path):
    prepare(tmp_path / "prepared")
    _run_torch("peft_curve.py", tmp_path / "prepared", tmp_path / "curves.json")
    computed = json.loads((tmp_path / "curves.json").read_text())["losses"]
    for name, curve in json.loads(GOLDEN.read_text())["losses"].items():
        np.testing.assert_allclose(computed[name]["float64"], curve["float64"], rtol=1e-9)


def _trained(base, spec):
    """An adapter with non-zero B, as after training."""
    linears = multi_linears(base.model)
    shapes = {
        path: (linears[path].in_features, linears[path].out_features)
        for path in target_paths(base.model, spec)
    }
    bank = empty_bank(shapes, 1, spec.max_rank(shapes))
    adapter = read_slot(write_slot(bank, 0, spec, 5, list(shapes)), 0)
    normal = np.random.RandomState(1).standard_normal
    return {
        path: (np.asarray(a), (0.1 * normal(b.shape)).astype(np.float32))
        for path, (a, b) in adapter.items()
    }


def _our_logits(base, spec, adapter, tokens):
    bank = attach_adapters(base.model, list(adapter), 2, spec.max_rank(adapter))
    bank = put_slot(bank, 1, spec, adapter)
    model = merge_adapters(*split_adapters(base.model), bank)
    length = len(tokens)
    zeros = jnp.zeros(length, jnp.int32)
    segments = Segments(zeros, jnp.array([0, length]))
    context = lora_context(bank, jnp.ones(1, jnp.int32), jnp.ones(length, jnp.uint32), train=False)
    hidden = model(jnp.array(tokens), jnp.arange(length), segments, context)
    return np.asarray(model.logits(hidden))


SPECS = {
    "all-linear": LoraSpec(r=4, alpha=8, dropout=0.1),
    "rslora": LoraSpec(r=8, alpha=3, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "regex": LoraSpec(r=2, alpha=2, target_modules=r"model\.layers\.1\..*_proj"),
    "exclude": LoraSpec(r=1, alpha=4, exclude_modules=r".*layers\.0\.mlp.*"),
    "patterns": LoraSpec(
        r=4,
        alpha=8,
        layers_to_transform=(1,),
        rank_pattern={"q_proj": 2, "gate_proj": 8},
        alpha_pattern={"o_proj": 3.5, "up_proj": 20},
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", SPECS)
def test_peft_loads_our_adapter_without_a_warning_and_computes_the_same(base, tmp_path, name):
    spec = SPECS[name]
    adapter = _trained(base, spec)
    save_peft(tmp_path / "adapter", adapter, spec, base.path)
    tokens = np.random.RandomState(2).randint(3, VOCAB, 24).tolist()
    logits = _our_logits(base, spec, adapter, tokens).tolist()
    (tmp_path / "logits.json").write_text(json.dumps({"tokens": tokens, "logits": logits}))
    out = _run_torch(
        "check_peft.py", tmp_path / "adapter", base.path,
        "--expect", tmp_path / "logits.json", "--resave", tmp_path / "by_peft",
    )  # fmt: skip
    print(name, out)
    loaded = load_peft(tmp_path / "by_peft", base.model)
    assert_bit_equal(loaded.adapter, dict(sorted(adapter.items())))
    assert loaded.spec.scale == spec.scale


@pytest.mark.torch
def test_the_check_notices_a_wrong_scale(base, tmp_path):
    spec = SPECS["rslora"]
    adapter = _trained(base, spec)
    save_peft(tmp_path / "adapter", adapter, spec, base.path)
    tokens = list(range(3, 20))
    plain = LoraSpec(r=8, alpha=3, target_modules=spec.target_modules)
    logits = _our_logits(base, plain, adapter, tokens).tolist()
    (tmp_path / "logits.json").write_text(json.dumps({"tokens": tokens, "logits": logits}))
    with pytest.raises(AssertionError, match='"ok": false'):
        _run_torch(
            "check_peft.py", tmp_path / "adapter", base.path, "--expect", tmp_path / "logits.json"
        )
