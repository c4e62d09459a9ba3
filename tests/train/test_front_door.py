import os
import subprocess
import sys

import pytest

import lorafusion_jax as lf


def test_importing_the_package_is_light():
    code = "import sys, lorafusion_jax; sys.exit(bool({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_every_public_name_is_there():
    names = set(lf._HOME_OF)
    assert {"load_base", "MultiTrainer", "LoraConfig", "AdamW", "loraize", "fused_lora"} <= names
    for name in names:
        assert getattr(lf, name) is not None
    assert names <= set(dir(lf))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = lf.Trainer


def test_optimizers_fill_in_their_name():
    assert [f(lr=0.5).name for f in (lf.AdamW, lf.Adam, lf.Sgd)] == ["adamw", "adam", "sgd"]
