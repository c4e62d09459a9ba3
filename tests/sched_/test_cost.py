"""Costs fitted to measured times."""

import random

import pytest

from lorafusion_sched import Cost, Measured, PlanError, cost_from_json, cost_to_json, fit_cost
from lorafusion_sched.cli import main


def timed(cost: Cost, rows: int, squares: int, noise: float = 0.0) -> Measured:
    forward = cost.fixed + cost.per_token * rows + cost.per_square * squares
    return Measured(rows, squares, forward * (1 + cost.backward) * (1 + noise))


SHAPES = [(rows, rows * length) for rows in (1024, 2048, 4096, 8192) for length in (128, rows)]


@pytest.mark.parametrize(
    "cost",
    [
        Cost(fixed=1e-3, per_token=5e-6, per_square=3e-10, backward=1.0),
        Cost(fixed=0.0, per_token=5e-6, per_square=3e-10, backward=2.0),
        Cost(fixed=2e-3, per_token=5e-6, backward=1.0),
        Cost(per_token=4e-6, backward=1.0),
    ],
)
def test_the_terms_come_back(cost):
    found = fit_cost([timed(cost, *shape) for shape in SHAPES], backward=cost.backward)
    for name in ("fixed", "per_token", "per_square"):
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=1e-6, abs=1e-15)


def test_noise_gives_no_negative_term():
    """Times without attention and overhead: noise must not turn into a negative one of either."""
    rng, cost = random.Random(3), Cost(per_token=4e-6, backward=1.0)
    for _ in range(50):
        found = fit_cost([timed(cost, *shape, rng.uniform(-0.05, 0.05)) for shape in SHAPES])
        assert found.fixed >= 0 and found.per_square >= 0
        full = found.fixed + 8192 * found.per_token
        assert full == pytest.approx(8192 * cost.per_token, rel=0.1)


@pytest.mark.parametrize("measured", [[], [(1024, 5, 0.1)], [(1024, 5, 0.1), (2048, 5, 0.0)]])
def test_too_little_is_refused(measured):
    with pytest.raises(PlanError, match="two sizes"):
        fit_cost([Measured(*one) for one in measured])


def test_the_file_is_read_again_and_used(tmp_path, capsys):
    cost = Cost(fixed=0.5, per_token=0.001, per_square=1e-7, backward=1.5)
    file, lengths = tmp_path / "cost.json", tmp_path / "lengths.json"
    file.write_text(cost_to_json(cost, device="none"))
    assert cost_from_json(file.read_text()) == cost
    lengths.write_text(
        '{"jobs": [{"name": "a", "lengths": [100, 90, 80], "global_batch_size": 1}]}'
    )
    sizes = []
    for extra in ([], ["--cost", str(file)]):  # a dear microbatch wants to be large
        assert main(["plan", str(lengths), "--capacity", "auto", "--tile", "16", *extra]) == 0
        sizes.append(capsys.readouterr().out)
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid JSON"),
        ("[]", "format"),
        ('{"format": "lorafusion-cost", "version": 2}', "version 2"),
        ('{"format": "lorafusion-cost", "version": 1, "fixed": "1"}', "fixed"),
    ],
)
def test_other_documents_are_refused(text, message):
    with pytest.raises(PlanError, match=message):
        cost_from_json(text)
