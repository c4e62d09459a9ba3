"""The same prompts through the base and through adapters, side by side in one batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorafusion_jax.config import SourceConfig
from lorafusion_jax.data import Record, prompt_text, read_source
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.generate import BASE_SLOT, generate
from lorafusion_jax.lora.bank import AdapterBank, attach_adapters, put_slot
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.models import Base
from lorafusion_jax.train.jobs import resolve_job
from lorafusion_jax.train.run_folder import RunFolder, write_text

_MAX_SAMPLE_TOKENS = 48


class Question(NamedTuple):
    """A held-out row of a job: what the model is given, and what the row says."""

    job: str
    prompt: str
    expected: str


def load_adapters(base: Base, directories: Sequence[Path]) -> AdapterBank:
    """Loads PEFT adapters into one bank of the base model, in order of their slots.

    Args:
        base: the model; its linears are given the adapters' stacks.
        directories: PEFT folders, one per slot.

    Raises:
        AdapterError: a folder holds no usable adapter, or one of another model.
    """
    loaded = [load_peft(directory, base.model) for directory in directories]
    paths = sorted({path for one in loaded for path in one.adapter})
    largest = max(one.spec.max_rank(one.adapter) for one in loaded)
    bank = attach_adapters(base.model, paths, len(loaded), largest)
    for slot, one in enumerate(loaded):
        bank = put_slot(bank, slot, one.spec, one.adapter)
    return bank


def adapter_folder(folder: RunFolder, job: str, which: str = "best") -> Path:
    """Returns a job's PEFT folder.

    Raises:
        AdapterError: the run has no such job, or its adapter is not written yet.
    """
    if job not in folder.jobs:
        raise AdapterError(f"no job {job!r} in {folder.path}; there are: {', '.join(folder.jobs)}")
    path = folder.adapter(job, which)
    if not path.is_dir():
        raise AdapterError(f"{path}: job {job} has no {which} adapter yet")
    return path


def held_out(folder: RunFolder, base: Base, job: str, rows: int) -> list[Question]:
    """Returns the first held-out rows of a job that ask for an answer."""
    config = folder.jobs[job]
    data, apart = config.data, config.eval.path
    resolved = resolve_job(config, data, base, folder.config.batching, folder.config.seed)
    records = [
        {record.line: record for record in _records(part, data.system)}
        for part in (data.parts if apart is None else (data.at(apart),))
    ]
    questions, samples = [], resolved.eval_samples
    for index in resolved.eval_indices:
        record = records[samples.source_of(index)][int(samples.lines[index])]
        if record.kind == "text":
            continue
        answer = record.messages[-1].content if record.kind == "chat" else record.completion
        questions.append(Question(job, prompt_text(record, base.tokenizer), answer))
        if len(questions) == rows:
            break
    return questions


def _records(part: SourceConfig, system: str | None) -> list[Record]:
    options = part.model_dump(exclude={"path", "weight"})
    return read_source(part.path, system=system, **options)


def side_by_side(
    base: Base, bank: AdapterBank | None, slots: dict[str, int], prompts: Sequence[str], **options
) -> list[dict[str, str]]:
    """Answers every prompt with every model in one batch.

    Args:
        base: the base model.
        bank: adapters.
        slots: slot by the name to show, `BASE_SLOT` for the base.
        prompts: texts.
        options: of `generate`.

    Returns:
        For each prompt, the answers by name.
    """
    pairs = [(prompt, slot) for prompt in prompts for slot in slots.values()]
    texts = generate(base, bank, [p for p, _ in pairs], [s for _, s in pairs], **options)
    count = len(slots)
    return [
        dict(zip(slots, texts[i * count : (i + 1) * count], strict=True))
        for i in range(len(prompts))
    ]


def write_samples(folder: RunFolder, base: Base, *, rows: int) -> None:
    """Answers held-out prompts with the base and the job's adapter; writes each job's samples.md.

    Args:
        folder: a run with adapters.
        base: its base model.
        rows: held-out rows per job; jobs without a held-out prompt are left out.
    """
    jobs = [name for name in folder.jobs if folder.adapter(name).is_dir()]
    questions = [q for name in jobs for q in held_out(folder, base, name, rows)]
    if not questions:
        return
    bank = load_adapters(base, [folder.adapter(name) for name in jobs])
    prompts = [q.prompt for q in questions for _ in range(2)]
    slots = [slot for q in questions for slot in (BASE_SLOT, jobs.index(q.job))]
    texts = generate(base, bank, prompts, slots, max_new_tokens=_MAX_SAMPLE_TOKENS)
    for name in dict.fromkeys(q.job for q in questions):
        parts = [f"## {name}\n"]
        for i, question in enumerate(questions):
            if question.job == name:
                parts.append(sample_text(question, texts[2 * i], texts[2 * i + 1]))
        write_text(folder.job(name) / "samples.md", "\n".join(parts))


def sample_text(question: Question, base: str, adapter: str) -> str:
    """Returns one row with its expected and both given answers, as Markdown."""
    prompt = question.prompt.strip().replace("\n", "\n    ")
    return (
        f"    {prompt}\n\n"
        f"- expected: {one_line(question.expected)}\n"
        f"- base: {one_line(base)}\n"
        f"- adapter: {one_line(adapter)}\n"
    )


def one_line(text: str, limit: int = 160) -> str:
    """Returns a text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
