"""The benchmarks of layers and training: baselines compute the same, and a run writes rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.bench import layer, padded, schedule, training
from lorafusion_jax.bench.profile import Event, Profile, class_of
from lorafusion_jax.bench.results import read_baselines
from lorafusion_jax.bench.shapes import MODELS, layer_flops, model_shape
from lorafusion_jax.bench.systems import LINEARS, lora_linears, padded_batch
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.lora import linear
from lorafusion_jax.train.batch import JobRows, pack
from lorafusion_sched import Microbatch, Sample, Stretch

ROWS, TILE = 64, 16


def operands(rng, slots=1):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return (
        normal(ROWS, 32),
        (normal(32, 24), normal(32, 40)),
        (normal(slots, 4, 32), normal(slots, 4, 32)),
        (normal(slots, 4, 24), normal(slots, 4, 40)),
        jnp.full(slots, 0.5),
        jnp.zeros(slots),
        jnp.arange(ROWS // TILE, dtype=jnp.int32) % slots,
        jnp.arange(1, ROWS + 1, dtype=jnp.uint32),
        jnp.ones(1, jnp.uint32),
    )


@pytest.mark.parametrize("kind, slots", [("naive", 1), ("xla", 2), ("ungrouped", 2)])
def test_baselines_compute_the_same_without_dropout(rng, kind, slots):
    args = operands(rng, slots)
    ours = LINEARS["ours"](*args, biases=(None, None))
    theirs = LINEARS[kind](*args, biases=(None, None))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(theirs[0] - args[0] @ args[1][0]).max()) > 0.1  # LoRA does something


def test_linears_are_switched_for_what_is_traced_and_switched_back():
    @jax.jit
    def shared(x):  # like the layers' trace, which outlives a switch
        return linear.fused_multi_lora(x)

    before = linear.fused_multi_lora
    LINEARS["marker"] = lambda x: x + 1
    try:
        with lora_linears("marker"):
            assert shared(1.0) == 2.0
            LINEARS["marker"] = lambda x: x + 2
            with lora_linears("marker"):
                assert shared(1.0) == 3.0
    finally:
        del LINEARS["marker"]
    assert linear.fused_multi_lora is before


def test_a_padded_batch_is_a_packed_one_with_holes():
    """Same arrays as the planner's batch of one sample per stretch, but for tokens and weights."""
    samples = [Sample(0, 0, 20), Sample(0, 1, 32)]
    holes = padded_batch(
        [(0, samples[0]), (1, samples[1])], 32, tile=TILE, num_slots=2, ends=frozenset({1}),
        vocab_size=10,
    )  # fmt: skip

    class Data:
        def __getitem__(self, index):
            return np.zeros(samples[index].length, np.int32), np.ones(samples[index].length, bool)

    stretches = tuple(
        Stretch(f"job{i}", 0, (sample,), ends=i == 1) for i, sample in enumerate(samples)
    )
    rows = {f"job{i}": JobRows(i, i + 1, Data()) for i in range(2)}
    packed, _ = pack(Microbatch(stretches, 64), rows, tile=TILE, num_slots=2, max_segments=16)
    for name in ("positions", "segment_start", "segment_offsets", "tile_adapter", "batch_end"):
        np.testing.assert_array_equal(getattr(holes, name), getattr(packed, name), name)
    for name in ("loss_weight", "row_key"):
        where = [np.asarray(getattr(batch, name)) != 0 for batch in (holes, packed)]
        np.testing.assert_array_equal(*where, name)


def test_work_of_a_llama_layer():
    """By the formula of the table in the lab book, written out for 4 samples of 2048 tokens."""
    tokens, d, inner, kv = 8192, 4096, 14336, 1024
    frozen = 4 * tokens * (2 * d * d + 2 * d * kv + 3 * d * inner)
    attention = 3.5 * 2 * 4 * 2048**2 * d
    lora = 6 * tokens * 16 * (2 * 2 * d + 2 * (d + kv) + 3 * (d + inner))
    found = layer_flops(MODELS["llama-3.1-8b"], [2048] * 4, 16)
    assert found == pytest.approx(frozen + attention + lora)
    assert layer_flops(MODELS["llama-3.1-8b"], [2048] * 4, 0) == pytest.approx(frozen + attention)


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("mosaic_gpu_lora_base_up_kernel", "fused_gemm"),
        ("mosaic_gpu_lora_grad_down_kernel", "lora"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("loop_multiply_fusion_3", "elementwise"),
        ("loop_dynamic_update_slice_fusion_7", "slices"),
        ("ncclDevKernel_SendRecv", "exchange"),
        ("MemcpyD2D", "copy"),
    ],
)
def test_classes_of_kernels(kernel, kind):
    assert class_of(kernel) == kind


def test_a_profile_counts_what_runs_side_by_side_once_as_busy():
    events = [
        Event("gpu 0", "nvjet_a", 0, 4e6),
        Event("gpu 0", "ncclDevKernel", 1e6, 2e6),  # beside the product
        Event("gpu 0", "nvjet_b_1", 6e6, 2e6),
        Event("gpu 1", "nvjet_b_2", 0, 10e6),
    ]
    found = Profile(events, 0.010)
    assert found.by_class(2) == {"ms_gemm": 4.0, "ms_exchange": 0.5, "ms_idle": 1.0}
    lines = [line.split() for line in found.heaviest(2, 2).splitlines()]
    assert lines == [["3.000", "ms", "nvjet_b"], ["1.000", "ms", "nvjet_a"]]
    waits = [line.split() for line in found.waits(2).splitlines()]
    assert waits == [["0.500", "ms", "idle", "before", "0.2", "nvjet_b"]]
    assert Profile([], 1.0).by_class(2) == {}


def test_refusals(tmp_path):
    for arguments in ("--systems abz", "--lengths nosuch", "--model nosuch --lengths xsum"):
        with pytest.raises(ConfigError, match=r"--\w+ "):
            training.main(arguments.split())
    with pytest.raises(ConfigError, match="--parts nosuch"):
        layer.main(["--parts", "nosuch"])
    path = tmp_path / "rows.json"
    for text, reason in (
        ("[", "rows.json"),
        ("3", "a list"),
        ('[{"system": "x"}]', "lacks lengths"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_baselines(path, ("system", "lengths"))
    assert model_shape("llama-3.1-8b", 2).num_hidden_layers == 2


@pytest.mark.slow
def test_a_run_writes_rows_and_keeps_those_of_other_mixes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        schedule, "MOMENTS", {"xsum": (60, 20), "cnn": (60, 20), "wikisum": (60, 20)}
    )
    baselines = tmp_path / "peft.json"
    peft = {"model": "tiny", "system": "peft_compile", "lengths": "xsum", "layers": 1}
    peft["tokens_per_s"] = 3.0
    baselines.write_text(json.dumps([peft, peft | {"lengths": "cnn"}]))
    folder = tmp_path / "cpu"
    folder.mkdir()
    stale = {"system": "d_lorafusion", "lengths": "xsum", "model": "tiny", "layers": 1}
    stale |= {"deterministic": False, "tokens_per_s": 1.0}
    others = [stale | {"lengths": "mix"}, stale | {"layers": 2}, stale | {"deterministic": True}]
    old = [*others, stale, peft | {"tokens_per_s": 2.0}]
    (folder / "training.json").write_text(json.dumps({"rows": old}))
    arguments = (
        "--lengths xsum --systems e --model tiny --layers 1 --capacity 256 --microbatches 2"
        f" --batches 1 --dtype float32 --tile 16 --output {folder} --baselines {baselines}"
    )
    assert training.main(arguments.split()) == 0
    rows = json.loads((folder / "training.json").read_text())["rows"]
    # Ratios are of one process: what another measured of the same case goes.
    assert rows[:4] == [*others, peft] and len(rows) == 5
    ours = rows[4]
    assert (folder / "training_tokens.png").stat().st_size > 5000
    assert ours["system"] == "e_ours" and ours["layers"] == 1 and ours["remat"] == "none"
    assert 0 < ours["tokens_per_s"] and 0 <= ours["padding"] < 1 and ours["compile_seconds"] > 0
    assert 0.7 < ours["planned_gib"] / ours["peak_gib"] < 1.4
    parts = [ours[f"{part}_ms"] for part in ("padding", "optimizer", "host", "plan")]
    assert all(part >= 0 for part in parts) and ours["update_ms"] > 0 < ours["plan_ms"]
    whole = ours["loop_ms"] + ours["plan_ms"]
    assert ours["overhead"] == pytest.approx(sum(parts) / whole)
    assert ours["seconds"] == pytest.approx(ours["loop_ms"] * ours["microbatches"] / 1e3)


def test_other_programs_get_the_batches_of_system_a(tmp_path):
    path = tmp_path / "batches.json"
    for lengths in ("xsum", "het", "xsum"):
        words = f"--lengths {lengths} --batches 2 --padded-batches {path}"
        assert training.main(words.split()) == 0
    found = json.loads(path.read_text())
    assert list(found) == ["xsum", "het"]
    jobs = schedule.jobs_of("het", training.GBS, 0, jobs=training.JOBS, batches=2)
    batches = found["het"]["batches"]
    assert sum(map(sum, batches)) == sum(s.length for j in jobs for b in j.batches for s in b)
    assert max(map(len, batches)) == padded.SAMPLES and len(batches) == training.JOBS * 2 * 2
    longest = max(map(max, batches))
    assert found["het"]["grid"][-1] >= longest > found["het"]["grid"][-2]


@pytest.mark.slow
def test_all_systems_and_all_parts_of_a_layer_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        schedule, "MOMENTS", {"xsum": (60, 20), "cnn": (90, 20), "wikisum": (60, 20)}
    )
    monkeypatch.setattr(padded, "PADDED_LENGTHS", (128, 256))
    common = f"--model tiny --dtype float32 --tile 16 --output {tmp_path / 'cpu'}"
    run = "--lengths het --capacity 512 --microbatches 4 --batches 2 --profile --deterministic"
    assert training.main(f"{run} {common}".split()) == 0
    rows = json.loads((tmp_path / "cpu/training.json").read_text())["rows"]
    assert [row["system"] for row in rows] == list(training.SYSTEMS.values())
    assert layer.main(f"--rows 2 --length 128 --rounds 1 {common}".split()) == 0
    rows = json.loads((tmp_path / "cpu/layer.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(layer.PARTS)
