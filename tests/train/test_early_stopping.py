"""Early stopping: the decision, and whole runs in which one job ends before the others."""

import math

import pytest

import lorafusion_jax as lf
from lorafusion_jax.config import (
    BatchingConfig,
    EarlyStoppingConfig,
    EvalConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.train import events
from lorafusion_jax.train.early_stop import STOPPED, note_evaluation
from lorafusion_jax.train.progress import JobProgress
from tests.tolerance import assert_bit_equal
from tests.train.tiny import TILE, dataset, tiny_base

pytestmark = pytest.mark.usefixtures("shared_programs")


def stops_at(losses, **rule):
    """The number of the evaluation that ends the job; None if none does."""
    progress = JobProgress()
    for number, loss in enumerate(losses, start=1):
        progress.eval_loss = loss
        if note_evaluation(EarlyStoppingConfig(**rule), progress):
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "rule", "number"),
    [
        ([3, 2, 1, 0.5], {"patience": 1}, None),
        ([3, 2, 2.5, 1, 1.5, 1.2], {"patience": 2}, 6),
        ([3, 2, 2, 2], {"patience": 2}, 4),  # equal is not better
        ([3, 2.99, 2.98, 2.97], {"patience": 2, "min_delta": 0.05}, 3),
        ([3, 2.97, 2.94, 2.91], {"patience": 2, "min_delta": 0.05}, None),  # slow, but it adds up
        ([math.nan, math.nan], {"patience": 2}, 2),
        ([2, math.nan, 1, math.inf, math.nan], {"patience": 2}, 5),
    ],
)
def test_when_a_job_stops(losses, rule, number):
    assert stops_at(losses, **rule) == number


def test_without_a_rule_or_a_loss_nothing_stops():
    assert not note_evaluation(None, JobProgress(eval_loss=1.0))
    assert not note_evaluation(EarlyStoppingConfig(patience=1), JobProgress())


DATA = {"stuck": dataset(1, 24), "long": dataset(2, 64)}


def fit(output, stopping=None, listener=None, names=("stuck", "long")):
    trainer = lf.MultiTrainer(
        tiny_base(),
        output=output,
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
        listener=listener,
    )
    for name in names:
        stuck = name == "stuck"
        trainer.add_job(
            name,
            DATA[name],
            lora=lf.LoraConfig(r=4, alpha=8.0),
            # So small a rate never lowers the loss.
            optim=lf.AdamW(lr=1e-30 if stuck else 1e-2),
            train=TrainConfig(
                max_steps=25,
                global_batch_size=6 if stuck else 2,
                early_stopping=stopping if stuck else None,
            ),
            eval=EvalConfig(split=4, every=2 if stuck else 25),
            save=SaveConfig(every=100),
        )
    return trainer.fit()


def ran(seen):
    return [event.index for event in seen if isinstance(event, events.MicrobatchDone)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    seen = []
    output = tmp_path_factory.mktemp("whole") / "run"
    return fit(output, listener=seen.append), ran(seen)


def adapter(results, name):
    return load_peft(results[name].last_adapter.path).adapter


def test_a_job_that_gets_no_better_ends_and_the_others_keep_every_bit(whole, tmp_path):
    seen = []
    rule = EarlyStoppingConfig(patience=2, keep_bits=True)
    results = fit(tmp_path / "run", rule, seen.append)
    assert (results["stuck"].status, results["stuck"].steps) == (STOPPED, 6)
    assert (results["long"].status, results["long"].steps) == ("done", 25)
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert "stuck: stopped early after step 6 of 25: no better held-out loss in 2" in notices[0]
    assert_bit_equal(adapter(results, "long"), adapter(whole[0], "long"))
    assert "| stuck | 4 | 6 |" in (tmp_path / "run" / "summary.md").read_text()
    steps = {m["step"] for m in results["stuck"].history}
    assert max(steps) == 6
    # What is left of it in the plan is padding, and no trained token.
    tokens = {event.job: event.tokens for event in seen if isinstance(event, events.StepDone)}
    done = [event.tokens for event in seen if isinstance(event, events.MicrobatchDone)]
    ended = next(event.tokens for event in seen if isinstance(event, events.RunEnded))
    assert sum(done) == ended == sum(tokens.values())


def test_its_remaining_samples_cost_no_time(whole, tmp_path):
    seen = []
    results = fit(tmp_path / "run", EarlyStoppingConfig(patience=2), seen.append)
    assert results["stuck"].status == STOPPED and results["long"].steps == 25
    # The job's last 19 global batches took a microbatch each, at least.
    assert len(ran(seen)) < len(whole[1]) - 15
