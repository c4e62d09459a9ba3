"""`lorafusion import`: what it prints fits the adapter, and a configuration gains the job."""

import numpy as np
import pytest

from lorafusion_jax.config import load_config
from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.peft_io import save_peft
from lorafusion_jax.lora.targets import LoraSpec

SPEC = LoraSpec(
    r=4,
    alpha=6.5,
    target_modules=("down", "up"),
    layers_to_transform=(0,),
    rank_pattern={"up": 2, "a.*": 3},
    use_rslora=True,
)
BROKEN = "jobs:\n  - {name: x, data: {path: y}}\nbase: {model: m}\noutput: o\n"


@pytest.fixture
def adapter(tmp_path):
    weights = {
        "model.layers.0.up": (np.ones((2, 5), np.float32), np.full((2, 6), 0.5, np.float32)),
        "model.layers.0.down": (np.ones((4, 5), np.float32), np.ones((4, 6), np.float32)),
    }
    return save_peft(tmp_path / "old sql", weights, SPEC, "some/base")


def test_import_says_what_the_adapter_is(lorafusion, adapter):
    code, out, _ = lorafusion("import", adapter, "--as", "sql")
    assert code == 0
    assert "base     some/base" in out
    assert "lora     r 4, alpha 6.5, scale 3.25 (alpha / sqrt(r)), dropout 0" in out
    assert "66 parameters in 2 modules, stored as float32" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("up "))
    assert row == ["up", "1", "2", "4.59619", "2.3"]


def test_the_printed_job_describes_the_adapter_exactly(lorafusion, adapter, tmp_path):
    _, out, _ = lorafusion("import", adapter, "--as", "sql", "--data", "new.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text("base: {model: m}\noutput: o\njobs:\n" + out.split("job section:\n\n")[1])
    (job,) = load_config(path).jobs
    assert job.name == "sql" and job.lora.init_from == str(adapter)
    described = LoraSpec.from_config(job.lora)
    assert described == SPEC and list(described.rank_pattern) == ["up", "a.*"]


def test_a_job_is_added_and_the_rest_of_the_file_stays(lorafusion, adapter, project):
    before = project.read_text()
    code, out, err = lorafusion("import", adapter, "--as", "more", "--append", project)
    assert (code, err) == (0, "") and "added    job more" in out
    assert project.read_text().startswith(before)
    assert [job.name for job in load_config(project).jobs] == ["numbers", "chat", "plain", "more"]


def test_the_defaults_of_a_file_do_not_change_the_job_that_is_added(lorafusion, tmp_path):
    spec = LoraSpec(r=4, alpha=8, target_modules=("up",))
    weights: Adapter = {
        "model.layers.0.up": (np.ones((4, 5), np.float32), np.ones((4, 6), np.float32))
    }
    folder, path = save_peft(tmp_path / "plain", weights, spec, "base"), tmp_path / "run.yaml"
    path.write_text(
        "base: {model: m}\noutput: o\n"
        "defaults:\n  lora: {exclude_modules: [up], layers_to_transform: 1, layers_pattern: layers,"
        " rank_pattern: {up: 2}, alpha_pattern: {up: 3}, use_rslora: true}\n"
        "jobs:\n  - {name: a, data: {path: b}}\n"
    )
    data = "data/\N{GRINNING FACE}.jsonl"
    code, _, err = lorafusion("import", folder, "--as", "c", "--data", data, "--append", path)
    assert (code, err) == (0, "")
    job = load_config(path).jobs[1]
    assert LoraSpec.from_config(job.lora) == spec
    assert job.data.path == str(tmp_path / data)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (BROKEN, "sql", "`jobs:` is the last section"),
        (
            "base: {model: m}\noutput: o\njobs: [{name: a, data: {path: b}}]\n",
            "sql",
            "last section",
        ),
        ("base: {model: m}\noutput: o\njobs:\n  - {name: sql, data: {path: b}}\n", "sql", "beside"),
    ],
)
def test_a_file_that_would_not_be_valid_stays_as_it_is(
    lorafusion, adapter, tmp_path, content, name, words
):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    code, _, err = lorafusion("import", adapter, "--as", name, "--append", path)
    assert code == 2 and words in err
    assert path.read_text() == content


def test_what_is_no_adapter_is_refused(lorafusion, tmp_path):
    code, _, err = lorafusion("import", tmp_path)
    assert code == 2 and "no adapter_config.json" in err
