"""The comparisons must catch what they are for: every test here has a twin that fails."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerance import assert_bit_equal, assert_error_ratio, assert_ulp


def test_bit_equal_sees_sign_of_zero_nan_payload_dtype_and_structure():
    x = {"w": np.array([0.0, np.nan, 1.0], np.float32)}
    assert_bit_equal(x, {"w": x["w"].copy()})
    other_nan = x["w"].copy()
    other_nan.view(np.uint32)[1] ^= 1
    for wrong in (
        {"w": np.array([-0.0, np.nan, 1.0], np.float32)},
        {"w": other_nan},
        {"w": x["w"].astype(np.float64)},
        {"w": x["w"][:2]},
        {"v": x["w"]},
    ):
        with pytest.raises(AssertionError):
            assert_bit_equal(x, wrong)


def test_bit_equal_names_leaf_and_place():
    got = {"a": jnp.zeros(3), "b": {"c": jnp.arange(4.0).reshape(2, 2)}}
    want = {"a": jnp.zeros(3), "b": {"c": jnp.array([[0.0, 1.0], [2.0, 4.0]])}}
    with pytest.raises(AssertionError, match=r"\['b'\]\['c'\]: 1 of 4 .* first at \(1, 1\)"):
        assert_bit_equal(got, want)


def test_error_ratio_allows_the_references_error_and_no_more():
    truth = np.linspace(-1, 1, 64)
    reference = truth.astype(jnp.bfloat16)
    error = np.max(np.abs(reference.astype(np.float64) - truth))
    assert assert_error_ratio(truth + 1.9 * error, reference, truth, 2.0, floor_ulp=0) > 0.9
    with pytest.raises(AssertionError, match="value: error"):
        assert_error_ratio(truth + 2.1 * error, reference, truth, 2.0, floor_ulp=0)


def test_error_ratio_has_a_floor_and_refuses_nan():
    truth = np.array([1.0, 2.0])
    exact = truth.astype(np.float32)
    assert_error_ratio(exact + np.float32(2.4e-7), exact, truth)
    with pytest.raises(AssertionError):
        assert_error_ratio(exact + np.float32(1e-6), exact, truth)
    with pytest.raises(AssertionError):
        assert_error_ratio(np.array([1.0, np.nan]), exact, truth)


def test_error_ratio_puts_the_worst_leaf_first():
    truth = {"fine": np.ones(2), "bad": np.ones(2), "worst": np.ones(2)}
    ref = {name: x.astype(np.float32) for name, x in truth.items()}
    got = {"fine": truth["fine"], "bad": truth["bad"] + 0.1, "worst": truth["worst"] + 0.5}
    with pytest.raises(AssertionError) as caught:
        assert_error_ratio(got, ref, truth)
    lines = str(caught.value).splitlines()
    assert "worst" in lines[1] and "bad" in lines[2] and "fine" not in str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64])
def test_ulp_counts_representable_numbers_across_zero(dtype):
    tiny = np.asarray(jnp.finfo(dtype).smallest_subnormal).astype(dtype)
    around_zero = np.array([-tiny, 0 * tiny, tiny])
    assert assert_ulp(around_zero[:1], around_zero[2:], 2) == 2
    with pytest.raises(AssertionError, match="2 ulp"):
        assert_ulp(around_zero[:1], around_zero[2:], 1)
