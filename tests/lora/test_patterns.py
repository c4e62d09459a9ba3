"""Ranks and scales of single modules, chosen layers, and adapters to start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorafusion_jax.config import DataConfig, JobConfig, LoraConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import (
    attach_adapters,
    empty_bank,
    lora_context,
    mask_gradients,
    merge_adapters,
    multi_linears,
    put_slot,
    read_slot,
    split_adapters,
    write_slot,
)
from lorafusion_jax.lora.peft_io import load_peft, save_peft
from lorafusion_jax.lora.start import adapter_fingerprint, initial_adapter
from lorafusion_jax.lora.targets import (
    LoraSpec,
    refuse_unused_patterns,
    selects,
    target_paths,
)
from tests.lora.test_bank import SHAPES, Model
from tests.tolerance import assert_bit_equal

Q0, Q11 = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj"
PATTERNED = LoraSpec(
    r=4, alpha=8, rank_pattern={"layers.1.up": 2, "up": 6}, alpha_pattern={"layers.0.*": 3}
)


def test_the_first_pattern_that_matches_the_end_of_a_path_counts():
    spec = LoraSpec(
        r=8,
        alpha=16,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 4, "proj": 99},
        alpha_pattern={"model.layers.11.*": 5},
    )
    assert [spec.rank_of(path) for path in (Q0, Q11, "x.k_proj", "proj")] == [2, 4, 8, 99]
    assert [spec.scale_of(path) for path in (Q0, Q11, "x.k_proj")] == [16 / 2, 5 / 4, 2]
    assert spec.patterned([Q0, Q11, "x.k_proj"]) == [Q0, Q11] and spec.max_rank([Q0, Q11]) == 4
    rooted = LoraSpec(r=8, alpha=16, use_rslora=True, rank_pattern={"q_proj": 4})
    assert rooted.scale_of(Q0) == 16 / 2 and rooted.scale_of("k") == rooted.scale
    assert LoraSpec(rank_pattern={"q": 8}).patterned(["q"]) == []  # no other rank than r


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"layers_to_transform": 0}, [Q0]),
        ({"layers_to_transform": [1, 11]}, [Q11]),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, [Q0]),
        ({"layers_to_transform": [0], "target_modules": ["q_proj", Q11]}, [Q0, Q11]),
        ({"layers_to_transform": [11], "layers_pattern": "layers"}, [Q11]),
        ({"layers_to_transform": [11], "layers_pattern": ["blocks", "layers"]}, [Q11]),
        ({"layers_to_transform": [11], "layers_pattern": "blocks"}, []),
        ({"layers_to_transform": [1]}, []),  # 1 is not the beginning of 11
        ({"layers_to_transform": [0, 11], "exclude_modules": [Q0]}, [Q11]),
    ],
)
def test_layers_are_chosen_as_peft_does(changes, chosen):
    assert [path for path in (Q0, Q11) if selects(LoraSpec(**changes), path)] == chosen


def test_layers_of_a_model():
    spec = LoraSpec(target_modules=["up"], layers_to_transform=[1])
    assert target_paths(Model(rngs()), spec) == ["layers.1.up"]
    refuse_unused_patterns(spec, ["layers.1.up"])
    with pytest.raises(AdapterError, match="no targeted layer 5"):
        refuse_unused_patterns(LoraSpec(layers_to_transform=[1, 5]), list(SHAPES))
    with pytest.raises(AdapterError, match="rank_pattern: 'upp' matches no targeted"):
        refuse_unused_patterns(LoraSpec(rank_pattern={"upp": 3}), list(SHAPES))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"up": 0}}, "rank_pattern: up: 0"),
        ({"rank_pattern": {"up": True}}, "rank_pattern: up: True"),
        ({"alpha_pattern": {"up": -1.0}}, "alpha_pattern: up: -1.0"),
        ({"alpha_pattern": {"(": 1.0}}, "not a regular expression"),
        ({"layers_to_transform": [-1]}, "numbers from 0"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"layers_to_transform": 1, "target_modules": ".*up"}, "names or all-linear"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(AdapterError, match=words):
        LoraSpec(**changes)


def rngs():
    return nnx.Rngs(0)


def filled(spec, seed=0):
    """An adapter of the right ranks without zeros."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(SHAPES)))
    return {
        path: (
            jax.random.normal(next(keys), (spec.rank_of(path), k)),
            jax.random.normal(next(keys), (spec.rank_of(path), n)),
        )
        for path, (k, n) in SHAPES.items()
    }


X = jax.random.normal(jax.random.key(9), (32, 8))


def outputs(bank, model):
    """Values and gradients of both slots, one tile of rows each."""
    graphdef, frozen = split_adapters(model)

    def run(a, b):
        changed = bank._replace(a=a, b=b)
        context = lora_context(
            bank, jnp.asarray([0, 1], jnp.int32), jnp.ones(32, jnp.uint32), train=False
        )
        y = merge_adapters(graphdef, frozen, changed)(X, context)
        return (y**2).sum(), y

    (_, y), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(bank.a, bank.b)
    return y, mask_gradients(bank, *grads)


def bank_of(model, second):
    bank = attach_adapters(model, list(SHAPES), 2, 8)
    usual = LoraSpec(r=3, alpha=6)
    bank = put_slot(bank, 0, usual, filled(usual))
    return put_slot(bank, 1, second, filled(second, 1))


def test_a_patterned_adapter_computes_what_a_merge_of_its_scales_does():
    model = Model(rngs())
    y, grads = outputs(bank_of(model, PATTERNED), model)
    plain = Model(rngs())
    for path, (a, b) in filled(PATTERNED, 1).items():
        multi_linears(plain)[path].kernel[...] += PATTERNED.scale_of(path) * a.T @ b
    np.testing.assert_allclose(y[16:], plain(X[16:]), rtol=2e-4, atol=2e-4)
    for path in SHAPES:
        rows = np.abs(np.asarray(grads[0][path][1])).max(1) > 0
        assert rows.sum() == PATTERNED.rank_of(path), path  # and padding gets no gradient
        assert (np.abs(np.asarray(grads[0][path][0])).max(1) > 0).sum() == 3


def test_patterns_of_one_adapter_change_no_bit_of_another():
    model = Model(rngs())
    uniform = bank_of(model, LoraSpec(r=4, alpha=8))
    assert not uniform.ranks and not uniform.ratios  # nobody pays for what nobody uses
    mixed = bank_of(model, PATTERNED)
    assert set(mixed.ranks) == set(mixed.ratios) == {"layers.0.up", "layers.0.down", "layers.1.up"}
    (y, grads), (y2, grads2) = outputs(uniform, model), outputs(mixed, model)
    assert_bit_equal(y2[:16], y[:16])
    first = jax.tree.map(lambda leaf: leaf[0], (grads, grads2))
    assert_bit_equal(first[1], first[0])
    assert not np.array_equal(y[16:], y2[16:])


def test_slots_keep_patterns_apart():
    bank = write_slot(empty_bank(SHAPES, 2, 8), 0, PATTERNED, 7)
    bank = write_slot(bank, 1, LoraSpec(r=8, alpha=8), 7)
    assert {path: a.shape[0] for path, (a, _) in read_slot(bank, 0).items()} == {
        path: PATTERNED.rank_of(path) for path in SHAPES
    }
    assert all(a.shape[0] == 8 for a, _ in read_slot(bank, 1).values())
    with pytest.raises(AdapterError, match="r=6 does not fit the bank's r_max=5"):
        write_slot(empty_bank(SHAPES, 1, 5), 0, PATTERNED, 7)


def test_patterned_adapters_come_back_from_disk(tmp_path):
    adapter = filled(PATTERNED)
    loaded = load_peft(save_peft(tmp_path / "a", adapter, PATTERNED, "base"))
    assert loaded.spec.rank_pattern == PATTERNED.rank_pattern
    assert list(loaded.spec.rank_pattern) == list(PATTERNED.rank_pattern)
    assert [loaded.spec.scale_of(path) for path in SHAPES] == [
        PATTERNED.scale_of(path) for path in SHAPES
    ]
    assert_bit_equal(loaded.adapter, adapter)


def job(**lora):
    return JobConfig(name="sql", data=DataConfig(path="x"), lora=LoraConfig(**lora))


def started(tmp_path, **lora):
    spec = LoraSpec(r=4, alpha=8)
    directory = save_peft(tmp_path / "a", filled(spec), spec, "base")
    return initial_adapter(directory, job(**lora), Model(rngs()), list(SHAPES))


def test_a_job_starts_from_exactly_the_adapter_it_describes(tmp_path):
    adapter = started(tmp_path, r=4, alpha=8.0)
    assert_bit_equal(adapter, filled(LoraSpec(r=4)))
    assert started(tmp_path, r=4, alpha=8.0, dropout=0.1)  # may differ: it is of training
    other = adapter | {"layers.0.up": (adapter["layers.0.up"][0] + 1, adapter["layers.0.up"][1])}
    assert adapter_fingerprint(adapter) != adapter_fingerprint(other)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8, "alpha": 16.0}, r"jobs\.sql\.lora\.r: got 8, the adapter has 4"),
        ({"r": 4, "alpha": 16.0}, r"lora\.alpha: gives a scale of 4 .* has 2 \(alpha=8\)"),
        ({"r": 4, "alpha": 8.0, "use_rslora": True}, r"lora\.use_rslora: got True"),
        ({"r": 4, "alpha": 8.0, "rank_pattern": {"up": 2}}, r"lora\.rank_pattern: got 2 at layers"),
        ({"r": 4, "alpha": 8.0, "alpha_pattern": {"up": 2.0}}, r"lora\.alpha_pattern: gives"),
    ],
)
def test_another_adapter_is_refused_by_key(tmp_path, lora, words):
    with pytest.raises(AdapterError, match=words):
        started(tmp_path, **lora)


def test_other_modules_and_nan_are_refused_by_name(tmp_path):
    spec = LoraSpec(r=4, alpha=8)
    directory = save_peft(tmp_path / "a", filled(spec), spec, "base")
    with pytest.raises(AdapterError, match=r"target_modules: leave out layers\.1\.up"):
        initial_adapter(directory, job(r=4, alpha=8.0), Model(rngs()), list(SHAPES)[:2])
    few = {path: pair for path, pair in filled(spec).items() if path != "layers.1.up"}
    directory = save_peft(tmp_path / "few", few, spec, "base")
    with pytest.raises(AdapterError, match=r"target_modules: name layers\.1\.up"):
        initial_adapter(directory, job(r=4, alpha=8.0), Model(rngs()), list(SHAPES))
    narrow = {path: (a[:, :5], b) for path, (a, b) in filled(spec).items()}
    directory = save_peft(tmp_path / "narrow", narrow, spec, "base")
    with pytest.raises(AdapterError, match="maps 5 to 8 values"):
        initial_adapter(directory, job(r=4, alpha=8.0), Model(rngs()), list(SHAPES))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.layers.0.down.lora_B.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=rf"{name}.* NaN"):
        initial_adapter(tmp_path / "a", job(r=4, alpha=8.0), Model(rngs()), list(SHAPES))
