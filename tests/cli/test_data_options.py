"""Sources, columns, masks and system prompts, from the configuration to batches and questions."""

import numpy as np
import pytest

from lorafusion_jax.cli.answers import held_out
from lorafusion_jax.cli.prepare import prepare, shown_sample
from lorafusion_jax.cli.training import read_config
from lorafusion_jax.config import DataConfig, config_diff, load_config
from lorafusion_jax.errors import DataError
from lorafusion_jax.train.run_folder import RunFolder

JOB = """\
  - name: mixed
    data:
      system: Be kind.
      sources:
        - {path: data/more.csv, weight: 3.0, columns: {prompt: q, completion: a}}
        - {path: data/numbers.jsonl, weight: 1.0}
    train: {epochs: 2}
"""


@pytest.fixture
def mixed(project):
    """The project with one job of two sources, and nothing else."""
    rows = "".join(f"what is {n}?,it is {n}\n" for n in range(10))
    (project.parent / "data/more.csv").write_text("q,a\n" + rows)
    before = project.read_text()
    project.write_text(before[: before.index("jobs:")] + "jobs:\n" + JOB)
    return project


def test_batches_take_each_source_by_weight(mixed):
    ready = prepare(read_config(mixed))
    (job,) = ready.jobs
    assert job.samples.sizes == (10, 10) and len(job.eval_indices) == 2
    for epoch in range(2):
        batches = job.plan.batches[epoch * 9 : (epoch + 1) * 9]
        indices = np.asarray([sample.index for batch in batches for sample in batch])
        assert len(indices) == 18 and (indices < 10).sum() in (13, 14)  # 13.5 of 18 are three parts
    visits = [(sample.epoch, sample.index) for batch in job.plan.batches for sample in batch]
    assert len(set(visits)) == len(visits)
    assert not {index for _, index in visits} & set(job.eval_indices)
    (given, learnt) = shown_sample(job, ready.base.tokenizer)
    assert given == (False, "Be kind.\n\nwhat is 0?") and learnt[1].startswith("it is 0")


def test_questions_are_the_held_out_rows_of_their_source(mixed):
    ready = prepare(read_config(mixed))
    folder = RunFolder(mixed.parent / "run")
    folder.write_start(ready.config, "{}", None)
    questions, passed_over = held_out(folder, ready.base, "mixed", 2)
    assert len(questions) == 2 and not passed_over
    for question, index in zip(questions, ready.jobs[0].eval_indices, strict=True):
        tokens, _ = ready.jobs[0].samples[index]
        text = ready.base.tokenizer.decode(tokens)
        assert text.startswith(question.prompt + question.expected)
        assert question.tokens == tuple(tokens[: len(question.tokens)])


@pytest.mark.parametrize(
    ("override", "share"),
    [("train_on_prompt=true", 1.0), ("system=null", None), ("last_turn_only=true", None)],
)
def test_masks_reach_the_samples(project, override, share):
    ready = prepare(read_config(project, [f"jobs.numbers.data.{override}"], jobs="numbers"))
    supervised = ready.jobs[0].samples.supervised
    learnt = (supervised.sum() + len(ready.jobs[0].samples)) / len(supervised)
    assert learnt == share if share else learnt < 0.9


def test_held_out_rows_of_another_file_are_read_as_the_data_are(project):
    (project.parent / "data/q.csv").write_text("q,a\none,eins\n")
    (project.parent / "data/p.csv").write_text("q,a\ntwo,zwei\nthree,drei\n")
    data = "jobs.numbers.data={path: data/p.csv, columns: {prompt: q, completion: a}}"
    evaluation = "jobs.numbers.eval={path: data/q.csv}"
    ready = prepare(read_config(project, [data, evaluation], jobs="numbers"))
    (job,) = ready.jobs
    assert (len(job.samples), len(job.eval_samples), job.num_train) == (2, 1, 2)
    broken = data.replace("prompt: q", "prompt: p")
    with pytest.raises(DataError, match=r"p\.csv:2: data\.columns\.prompt: there is no 'p'"):
        prepare(read_config(project, [broken], jobs="numbers"))


def test_split_is_for_data_sets_and_not_for_files(project, lorafusion):
    code, _, err = lorafusion("check", project, "--set", "jobs.numbers.data.split=validation")
    assert code == 2 and "numbers.jsonl: got split 'validation'" in err


def test_held_out_files_do_not_take_the_split_of_a_data_set(tmp_path):
    data = DataConfig(path="hf://a/b", split="train[:90%]", subset="en")
    at = data.at("hf://c/d")
    assert (at.split, at.subset) == ("train[:90%]", "en")
    at = data.at("held/out.jsonl")
    assert (at.split, at.subset) == ("train", None)
    data = DataConfig(path=str(tmp_path), split="part")  # a folder that `datasets` saved
    assert data.at(str(tmp_path)).split == "part"
    assert data.at("held/out.jsonl").split == "train"


def test_a_source_may_move_but_its_weight_may_not_change(mixed):
    before = load_config(mixed)
    mixed.write_text(mixed.read_text().replace("data/more.csv", "data/moved.csv"))
    moved = load_config(mixed)
    (change,) = config_diff(before, moved)
    assert (change.key, change.kind) == ("jobs.mixed.data.sources.0.path", "path")
    mixed.write_text(mixed.read_text().replace("weight: 3.0", "weight: 2.0"))
    (change,) = config_diff(moved, load_config(mixed))
    assert (change.key, change.kind) == ("jobs.mixed.data.sources.0.weight", "refused")
    mixed.write_text(
        mixed.read_text().replace("        - {path: data/numbers.jsonl, weight: 1.0}\n", "")
    )
    changes = config_diff(moved, load_config(mixed))
    assert {change.kind for change in changes} == {"refused", "path"}
