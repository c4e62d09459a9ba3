"""The kernel benchmark where it needs no GPU: tuning, baselines, roofline, its XLA formulas."""

import json

import jax
import numpy as np
import pytest

from lorafusion_jax.bench import kernel_variants, kernels, linears, roofline, timing
from lorafusion_jax.bench.linears import Case, make_operands, xla_best
from lorafusion_jax.errors import ConfigError
from pallas_kernels import fused_multi_lora, tables
from pallas_kernels.tuning import candidates
from tests.kernels.oracle import relative_error

CASE = Case(8192, 4096, (4096,), 16, 0.1)


def test_tuning_keeps_the_fastest_and_its_table_can_be_read(tmp_path):
    shape = kernel_variants.shape_of(CASE)

    def measure(case, which):
        """The last candidate is the fastest; the others' kernels take what they are not."""
        times = [("lora_sum_segments_mosaic_gpu", 1.0), ("some fusion", 99.0)]
        for op in ("down", "base_up", "grad_up", "grad_down", "dx"):
            rank = candidates(op, shape).index(tables.choose(op, shape))
            times.append((f"lora_{op}_mosaic_gpu_kernel", 50.0 - rank))
        return times

    entries = kernel_variants.tune(CASE, report=lambda line: None, measure=measure)
    path = tmp_path / "table.json"
    other = dict(entries[0], rows=64)
    kernel_variants.write_table([other, dict(entries[0], us=1e9)], path)
    kernel_variants.write_table(entries, path)
    assert json.loads(path.read_text())["entries"] == [other, *entries]
    with tables.using_table(path):
        for entry in entries:
            op = entry["op"]
            assert tables.choose(op, shape) == candidates(op, shape)[-1]
            sums = 1.0 if op.startswith("grad_") else 0.0
            assert entry["us"] == 50.0 - (len(candidates(op, shape)) - 1) + sums


def test_peft_rows_are_ratios_to_their_own_frozen_linear(tmp_path):
    path = tmp_path / "peft.json"
    times = {"frozen": {"fwdbwd": 2.0}, "peft": {"fwdbwd": 3.0}, "compile": {"error": "none"}}
    record = {"case": [8192, 4096, 4096, 16, 0.1], "methods": times}
    path.write_text(json.dumps({"results": [record]}))
    (row,) = kernels.peft_rows(path)
    assert (row["impl"], row["ratio_to_frozen"], row["adapters"]) == ("peft", 1.5, 1)
    for text in ("", "[]", '{"results": [{"case": 1}]}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no PEFT baseline"):
            kernels.peft_rows(path)


H100 = 3.0e6  # bytes per us of a copy


def test_rooflines_are_those_of_the_lab_book():
    floor = roofline.floor_us(CASE, H100)
    assert floor["base_up"] == pytest.approx(2 * 8192 * 4096 * (4096 + 16) / 989e6, rel=1e-6)
    for op in ("down", "grad_up", "grad_down"):  # one read of 67 MB at 3.0 TB/s, and a little
        assert 22.3 < floor[op] < 23.2
    rows = roofline.kernel_rows(CASE, [("lora_down_mosaic_gpu_kernel", 2 * floor["down"])], H100)
    assert [row["share_of_roofline"] for row in rows] == [0.5]


@pytest.mark.slow
def test_the_best_xla_formula_computes_the_same_as_the_op():
    o = make_operands(Case(256, 64, (32, 16), 8, 0.1, 2), 0)
    results = []
    for linear in (
        xla_best,
        lambda o: fused_multi_lora(o.x, o.ws, o.a, o.b, *o.routing, implementation="xla"),
    ):
        ys, pullback = jax.vjp(
            lambda x, a, b, f=linear: f(o._replace(x=x, a=a, b=b)), o.x, o.a, o.b
        )
        results.append(jax.tree.leaves((ys, pullback(o.dys))))
    for one, other in zip(*results, strict=True):
        assert relative_error(np.asarray(one), np.asarray(other)) < 0.01


def test_variants_are_timed_side_by_side(monkeypatch):
    """The plumbing, with XLA in the place of the kernels."""

    def ours(o):
        return fused_multi_lora(o.x, o.ws, o.a, o.b, *o.routing, implementation="xla")

    def instead_of_time(calls, rounds):
        for function, sets in calls.values():
            jax.block_until_ready([function(*arguments) for arguments in sets])
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setitem(linears.IMPLEMENTATIONS, "ours", ours)
    monkeypatch.setattr(timing, "sustained", instead_of_time)
    rows = kernels._compare_variants(Case(128, 16, (16,), 8, 0.1), rounds=1)
    names = [f"ours: {name}" for name in (*kernel_variants.VARIANTS, "atomic", "both, atomic")]
    assert [row["impl"] for row in rows] == ["frozen", "ours", *names]


def test_says_that_it_needs_a_gpu():
    with pytest.raises(ConfigError, match="needs a GPU"):
        kernels.main(["--quick"])
    with pytest.raises(ConfigError, match="--graphs hides"):
        kernels.main(["--graphs", "--tune", "x.json"])
