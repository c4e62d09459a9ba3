"""What a run shows, from scripted events and a scripted clock."""

import pytest

from lorafusion_jax.cli.progress import TrainProgress, bytes_text, ended_text
from lorafusion_jax.cli.view import duration
from lorafusion_jax.train import events


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def planned(**changes):
    job = {"samples": 10, "eval_samples": 2, "tokens": 500, "supervised": 0.5, "parameters": 10**6}
    jobs = tuple(events.JobSummary(name=n, steps=4, r=8, **job) for n in ("sql", "emoji"))
    values = {
        "jobs": jobs,
        "microbatches": 20,
        "start": 0,
        "capacities": (256, 512),
        "tile": 16,
        "padding": 0.034,
        "padding_alone": 0.39,
        "slots": 2,
        "r_max": 8,
        "base_bytes": 3 * 2**30,
        "adapter_bytes": 5 * 2**20,
    }
    return events.RunPlanned(**(values | changes))


def step(job="sql", n=1, tokens=100, **changes):
    values = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "applied": True, "microbatch": n}
    return events.StepDone(job=job, step=n, total=4, tokens=tokens, **(values | changes))


def evaluated(job, n, loss, best=True):
    return events.Evaluated(job, n, loss, 0.1, 0.0, 2, best, n)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    with TrainProgress(plain=True, clock=clock) as shown:
        yield shown


def test_plan_is_shown_before_the_first_step(progress, capsys):
    progress(planned())
    out = capsys.readouterr().out
    assert "2,000,000 adapter parameters, 1,000 tokens" in out
    assert "20 microbatches of 256 and 512 tokens, 3.4% padding" in out
    assert "one job at a time: 39.0%" in out
    assert "base 3.0 GiB" in out and "5.0 MiB" in out


def test_compilation_is_announced_and_timed(progress, capsys):
    progress(events.Compiling("train", 512))
    assert capsys.readouterr().out == "compiling train step for 512 tokens ...\n"
    progress(events.Compiling("train", 512, 21.4, 2**31))
    assert "in 21 s, 2.0 GiB of working memory" in capsys.readouterr().out


def test_plain_lines_are_rate_limited_and_end_with_the_last_step(progress, clock, capsys):
    progress(planned())
    capsys.readouterr()
    for n in (1, 2, 3, 4):
        clock.now += 1.0
        progress(step(n=n, tokens=100 * n))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines] == ["1/4", "4/4"]
    assert "100 tok/s" in lines[-1]


def test_eta_comes_from_microbatches(progress, clock, capsys):
    progress(planned())
    for index in range(5):
        clock.now = 2.0 * index
        progress(events.MicrobatchDone(index, 20, 100, 128))
    assert progress._screen.eta_s == pytest.approx(2.0 * 15)
    clock.now = 30.0
    progress(step(n=3))
    progress(step(n=4))  # the job's last: the time left is not its own
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("ETA 0:30") and "ETA" not in lines[-1]


def test_the_total_rate_is_of_the_whole_run(clock, monkeypatch, capsys):
    """Two jobs one after the other, each 50 tokens/s while it trains, are 50 together, not 100."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TrainProgress(clock=clock) as shown:
        shown(planned())
        for index in range(20):
            clock.now = 2.0 * index
            shown(step("sql" if index < 10 else "emoji", index % 10 + 1, 100 * (index % 10 + 1)))
            shown(events.MicrobatchDone(index, 20, 100, 128))
    assert [line.tokens_per_s for line in shown._screen.lines] == [50.0, 50.0]
    assert "total 50 tok/s" in capsys.readouterr().out.splitlines()[-2]


def test_base_and_best_are_kept(progress, capsys):
    progress(planned())
    for n, loss, best in ((0, 4.0, True), (2, 2.0, True), (4, 3.0, False)):
        progress(evaluated("sql", n, loss, best))
    out = capsys.readouterr().out
    assert "sql  base model, eval 4.000" in out and "sql  step 4, eval 3.000" in out
    assert progress.base["sql"].loss == 4.0
    assert progress.best["sql"].loss == 2.0


def test_notices_are_shown(progress, capsys):
    progress(events.Notice("sql: step 3 rejected"))
    assert capsys.readouterr().out == "sql: step 3 rejected\n"


def test_live_table_is_drawn_on_a_terminal(clock, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TrainProgress(clock=clock) as shown:
        shown(planned())
        shown(step(n=2))
        shown(events.Notice("resumed at step 2"))
    out = capsys.readouterr().out
    assert "2/4" in out and "50%" in out and "resumed at step 2" in out


def test_end_tells_speed_and_memory():
    text = ended_text(events.RunEnded(seconds=120.0, tokens=6000, peak_bytes=3 * 2**30))
    assert "6,000 tokens in 2:00 (50 tok/s" in text and "peak 3.0 GiB" in text
    assert "nothing" in ended_text(events.RunEnded(seconds=3.0, tokens=0, peak_bytes=None))


def test_units():
    assert bytes_text(2**30) == "1.0 GiB" and bytes_text(1536) == "1.5 KiB"
    assert duration(62) == "1:02" and duration(3723) == "1:02:03"
