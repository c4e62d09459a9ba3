"""Target rules: PEFT's, on the module paths of a small transformer."""

import pytest
from flax import nnx

from lorafusion_jax.config import LoraConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.targets import LoraSpec, target_paths


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Linear(4, 4, rngs=rngs)
        self.v_proj = nnx.Linear(4, 4, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.self_attn = Attention(rngs)
        self.up_proj = nnx.Linear(4, 8, rngs=rngs)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.lm_head = nnx.Linear(4, 8, rngs=rngs)


Q = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
UP = ["layers.0.up_proj", "layers.1.up_proj"]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (("q_proj",), None, Q),
        (["q_proj"], None, Q),
        (("self_attn.q_proj",), None, Q),
        (("proj",), "nothing", None),  # a suffix is a whole part of the path, never a piece of one
        (("layers.1.up_proj",), None, UP[1:]),
        (r".*\.q_proj", None, Q),
        (r"layers\.1\..*proj", ("q_proj", "v_proj"), UP[1:]),
        (("q_proj", "up_proj"), r"layers\.0\..*", [Q[1], UP[1]]),
        ("all-linear", ("self_attn.v_proj", "up_proj"), Q),
        (("lm_head",), None, ["lm_head"]),
    ],
)
def test_rules(targets, exclude, expected):
    spec = LoraSpec(target_modules=targets, exclude_modules=exclude)
    if expected is None:
        with pytest.raises(AdapterError):
            target_paths(Model(), spec)
    else:
        assert sorted(target_paths(Model(), spec)) == sorted(expected)


def test_all_linear_leaves_out_the_head_and_what_is_no_linear():
    paths = target_paths(Model(), LoraSpec())
    assert len(paths) == 6 and not {"lm_head", "embed"} & set(paths)


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (("q_prj",), None, "did you mean q_proj"),
        (("q_proj", "gate"), None, "'gate' matches no module"),
        ("q_proj", None, r"write \[q_proj\]"),
        (".*qproj", None, "q_proj"),
        ("(", None, "not a regular expression"),
        (("embed",), None, "is a Embed, not a linear"),
        (r".*self_attn.*", None, "is a Attention, not a linear"),
        (("q_proj",), ".*", "leaves no linear"),
    ],
)
def test_refusals_name_the_problem(targets, exclude, words):
    with pytest.raises(AdapterError, match=words):
        target_paths(Model(), LoraSpec(target_modules=targets, exclude_modules=exclude))


def test_scale():
    assert LoraSpec(r=16, alpha=32).scale == 2
    assert LoraSpec(r=16, alpha=32, use_rslora=True).scale == 8


def test_spec_takes_over_every_field_of_the_configuration():
    config = LoraConfig(
        r=4, alpha=2, dropout=0.25, use_rslora=True, target_modules=("q_proj",),
        exclude_modules="x", init="gaussian",
    )  # fmt: skip
    spec = LoraSpec.from_config(config)
    # Where a job starts from is no property of its adapter.
    fields = config.model_dump(exclude={"init_from"})
    assert {name: getattr(spec, name) for name in fields} == fields
