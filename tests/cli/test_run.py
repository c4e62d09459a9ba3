"""From the configuration to served adapters, by the commands a user types."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lorafusion_jax.cli import answers, compare, export, training
from lorafusion_jax.errors import AdapterError, ModelError
from lorafusion_jax.models import load_base
from lorafusion_jax.train.run_folder import open_run
from tests.cli.conftest import write_jsonl

JOBS = ("numbers", "chat", "plain")


@pytest.fixture(scope="module")
def base(trained):
    return load_base(open_run(trained[1]).config.base.model)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_output_has_the_documented_layout(trained):
    _, run = trained
    expected = {
        *("config.yaml", "config.resolved.yaml", "environment.json", "plan.json", "train.log"),
        *("events.jsonl", "summary.md", "loss.png", "utilisation.png"),
        "report.html",
        *(f"jobs/{job}/{name}" for job in JOBS for name in ("metrics.jsonl", "loss.png")),
        *(f"jobs/{job}/adapter/adapter_model.safetensors" for job in JOBS),
        *("jobs/numbers/samples.md", "jobs/chat/samples.md"),  # plain text asks for nothing
    }
    assert expected <= set(file_bytes(run))


def test_held_out_loss_falls(trained):
    _, run = trained
    for name in JOBS:
        lines = open_run(run).metrics(name)
        losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
        assert min(losses[1:]) < losses[0]


def test_samples_show_prompt_expected_and_both_answers(trained):
    text = (trained[1] / "jobs/numbers/samples.md").read_text()
    assert "German for" in text
    assert all(f"- {who}:" in text for who in ("expected", "base", "adapter"))


def test_same_command_again_changes_nothing_learnt(trained, lorafusion):
    config, run = trained
    before = {job: file_bytes(run / "jobs" / job / "adapter") for job in JOBS}
    metrics = {job: open_run(run).metrics(job) for job in JOBS}
    code, out, err = lorafusion("train", config, "--plain")
    assert code == 0, err
    assert ", 0 of them to do" in out and "compiling" not in out
    assert {job: file_bytes(run / "jobs" / job / "adapter") for job in JOBS} == before
    assert {job: open_run(run).metrics(job) for job in JOBS} == metrics


def test_changed_configuration_is_refused_with_the_difference(trained, lorafusion):
    config, run = trained
    before = file_bytes(run)
    code, _, err = lorafusion("train", config, "--set", "jobs.numbers.optim.lr=0.5")
    assert code == 2 and "jobs.numbers.optim.lr" in err and "0.5" in err
    assert file_bytes(run) == before


def test_results_of_a_run_become_the_table_of_the_readme(trained, tmp_path):
    from lorafusion_jax.bench import demo, report

    assert demo.main([str(trained[1])], root=tmp_path) == 0
    text = report.section("demo", tmp_path)
    assert "`make demo`" in text
    assert all(f"| {job} |" in text for job in JOBS)
    assert list(tmp_path.glob("*/demo_loss.png"))
    (results,) = tmp_path.glob("*/demo.json")
    assert all(row["run_tokens_per_s"] > 0 for row in json.loads(results.read_text())["rows"])


def test_unknown_job_is_refused(trained, lorafusion):
    config, run = trained
    for words in (["train", config, "--jobs", "nosuch"], ["export", run, "--job", "nosuch"]):
        code, _, err = lorafusion(*words)
        assert code == 2 and "no job 'nosuch'" in err and "numbers" in err


def test_shorthands_change_the_configuration(trained, tmp_path):
    from lorafusion_jax.cli.training import read_config

    config = read_config(trained[0], jobs="plain,chat", max_steps=7, output=tmp_path / "other")
    assert [job.name for job in config.jobs] == ["chat", "plain"]
    assert {job.train.max_steps for job in config.jobs} == {7}
    assert config.output == str(tmp_path / "other")


def test_status_and_plot_read_the_run(trained, lorafusion):
    run = trained[1]
    code, out, _ = lorafusion("status", run)
    assert code == 0 and "ended after" in out
    assert next(line for line in out.splitlines() if line.startswith("chat")).split()[1] == "3/3"
    (run / "utilisation.png").unlink()
    assert lorafusion("plot", run)[0] == 0
    assert (run / "utilisation.png").exists()


def test_eval_repeats_what_training_measured(trained, lorafusion):
    run = trained[1]
    code, out, _ = lorafusion("eval", run, "--job", "numbers", "--checkpoint", "last")
    assert code == 0
    shown = [line.split() for line in out.splitlines() if line.startswith("numbers")]
    lines = open_run(run).metrics("numbers")
    losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    assert [row[3] for row in shown] == [f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]


def test_generate_answers_side_by_side(trained, lorafusion):
    words = ["--base", "--job", "numbers", "--prompt", "German for one =", "--prompt", "two"]
    code, out, err = lorafusion("generate", trained[1], *words, "--max-new-tokens", "4")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.split()] == [
        *(">", "base", "numbers"),
        *(">", "base", "numbers"),
    ]


def test_export_copies_verifies_and_says_how_to_serve(trained, lorafusion, tmp_path):
    run = trained[1]
    code, out, err = lorafusion("export", run, "--out", tmp_path / "served", "--verify")
    assert code == 0, err
    for job in JOBS:
        copied, own = tmp_path / "served" / job, run / "jobs" / job / "adapter"
        assert file_bytes(copied) == file_bytes(own)
    assert "--max-loras 3 --max-lora-rank 8 " in out  # ranks 4 and 2
    assert f"numbers={tmp_path}/served/numbers" in out and "sglang" in out


def test_bfloat16_export_needs_a_folder_and_halves_the_file(trained, lorafusion, tmp_path):
    run = trained[1]
    words = ["export", run, "--job", "plain", "--dtype", "bfloat16"]
    assert lorafusion(*words)[0] == 2
    assert lorafusion(*words, "--out", tmp_path)[0] == 0
    name = "adapter_model.safetensors"
    whole, half = run / "jobs/plain/adapter" / name, tmp_path / "plain" / name
    assert half.stat().st_size < 0.7 * whole.stat().st_size


def test_merged_export_is_a_model_of_its_own(trained, lorafusion, tmp_path, base, monkeypatch):
    run, out = trained[1], tmp_path / "merged"
    words = ["export", run, "--job", "numbers", "--format", "merged", "--verify"]
    assert lorafusion(*words)[0] == 2  # where to?
    code, text, err = lorafusion(*words, "--out", out, "--max-shard-size", "20KB")
    assert code == 0 and f"vllm serve {out}/numbers" in text, err
    assert len(list((out / "numbers").glob("model-*.safetensors"))) > 1
    merged = load_base(out / "numbers")
    assert merged.tokenizer.encode("one") == base.tokenizer.encode("one")
    assert lorafusion(*words, "--out", tmp_path / "x", "--max-shard-size", "many")[0] == 2
    assert lorafusion("export", run, "--max-shard-size", "1GB")[0] == 2  # without any effect

    from lorafusion_jax.models import merged as module

    def wrong(directory, model, adapter, spec, **settings):
        return save(directory, model, adapter, replace(spec, alpha=spec.alpha * 1.1), **settings)

    save = module.save_merged
    monkeypatch.setattr(module, "save_merged", wrong)
    code, _, err = lorafusion(*words, "--out", tmp_path / "wrong")
    assert code == 2 and "differ from base and adapter" in err


def test_verification_catches_an_adapter_that_computes_something_else(trained, base, monkeypatch):
    """Negative control: a scale that is off by one percent in one of the two ways."""
    from lorafusion_jax.lora import bank
    from lorafusion_jax.lora.peft_io import load_peft

    loaded = load_peft(trained[1] / "jobs/numbers/adapter")
    difference, moved = compare.compare_with_merge(base, loaded)
    assert difference < 1e-5 < moved
    put_slot = bank.put_slot

    def off(*args):
        made = put_slot(*args)
        return made._replace(scale=made.scale * 1.01)

    monkeypatch.setattr(bank, "put_slot", off)
    assert compare.compare_with_merge(base, loaded)[0] > 1e-4


def test_damaged_adapter_is_refused(trained, lorafusion, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    path = run / "jobs/chat/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    code, _, err = lorafusion("export", run, "--verify")
    assert code == 2 and "use_dora" in err


def test_held_out_rows_are_those_training_left_out(trained, base):
    folder = open_run(trained[1])
    questions, passed_over = answers.held_out(folder, base, "chat", rows=5)
    assert len(questions) == 2 and not passed_over  # split: 2
    assert all(q.prompt.endswith("assistant\n") and q.expected for q in questions)
    assert answers.held_out(folder, base, "plain", rows=5) == ([], 0)


def test_prompts_that_do_not_fit_are_passed_over_and_said(trained, base):
    """The context leaves room for none of numbers' prompts and for the shorter ones of chat."""
    folder = open_run(trained[1])
    lengths = {
        name: sorted(len(q.tokens) for q in answers.held_out(folder, base, name, 9).questions)
        for name in ("numbers", "chat")
    }
    shortest, room = lengths["chat"][0], answers._MAX_SAMPLE_TOKENS
    tight = replace(base.config, max_position_embeddings=shortest + room)
    found, passed_over = answers.held_out(folder, replace(base, config=tight), "chat", 2)
    assert [len(q.tokens) for q in found] == [n for n in lengths["chat"] if n <= shortest]
    assert passed_over == len(lengths["chat"]) - len(found)


@pytest.mark.slow
def test_samples_never_cost_a_run_its_outputs(project, lorafusion, tiny_model, tmp_path):
    """Prompts longer than the context and empty ones; then an error that nobody foresaw."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    rows = [{"prompt": p, "completion": " yes"} for p in ("", "one two three four five six") * 4]
    write_jsonl(project.parent / "data/numbers.jsonl", rows)
    words = ("train", project, "--jobs", "numbers", "--set", f"base.model={model}")
    code, out, err = lorafusion(*words, "--plain", "--max-steps", "1")
    assert code == 0, err
    run = project.parent / "run"
    assert "2 held-out rows were passed over" in (run / "jobs/numbers/samples.md").read_text()
    assert (run / "report.html").exists() and "passed over" in out


@pytest.mark.parametrize("error", [ModelError("no room\nat all"), MemoryError()])
def test_an_error_of_the_samples_is_a_line(trained, base, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(answers, "write_samples", fail)
    training._answer(open_run(trained[1]), base, 2)
    out = capsys.readouterr().out
    assert out == f"samples  left out: {'no room' if str(error) else 'MemoryError'}\n"
    monkeypatch.setattr(answers, "write_samples", lambda *_, **__: 1 / 0)  # our own bugs are shown
    with pytest.raises(ZeroDivisionError):
        training._answer(open_run(trained[1]), base, 2)


@pytest.mark.parametrize("rank, served", [(1, 1), (4, 8), (16, 16), (17, 32), (200, 256)])
def test_serving_rank_is_one_that_vllm_takes(rank, served):
    lines = export.serve_commands("model", {"a": Path("x y")}, rank)
    assert f"--max-lora-rank {served} " in lines[0] and "'a=x y'" in lines[0]


def test_rank_beyond_the_servers_is_refused():
    with pytest.raises(AdapterError, match="513"):
        export.serve_commands("model", {"a": Path("x")}, 513)


def test_hub_base_is_served_by_its_name():
    vllm, sglang = export.serve_commands("hf://org/m@v1", {"a": Path("x")}, 8)
    assert vllm.startswith("vllm serve org/m --revision v1 --enable-lora")
    assert "--model-path org/m --revision v1 " in sglang


def test_gguf_base_is_served_from_its_original():
    lines = export.serve_commands("m.gguf", {"a": Path("x")}, 8)
    assert lines[0].startswith("#") and "vllm serve BASE " in lines[1]
