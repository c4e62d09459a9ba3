"""Times one decoder layer, forward and backward, and its parts, in one process.

    lorafusion bench layer [--model llama-3.1-8b] [--rows 4 --length 2048] [--parts layer,...]

layer      frozen (forward and dX), naive LoRA, XLA's formula, fused without groups, fused linears
           with activations apart, ours
remat      ours under each rematerialisation policy, with the bytes kept and those predicted
attention  cuDNN and XLA, with and without the guard that keeps NaN in its sample, both modes
head       LM head and cross-entropy over two plain products
fused      each kernel that does an element-wise pass and a LoRA pass at once, alone, over the two
           that it stands for (by itself: it turns CUDA graphs off, for the GPU's clock per kernel)

Calls take turns; `ratio_to_frozen` is over `frozen` of the same part (for `head`: its products; for
`fused`: the separate kernels).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorafusion_jax.errors import ConfigError

PARTS = ("layer", "remat", "attention", "head")
ALONE = "fused"


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lorafusion bench layer", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, default=4, help="samples in the microbatch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baselines", type=Path, default=None, help="JSON rows of other programs")
    parser.add_argument("--output", type=Path, default=None, help="folder of layer.json")
    return parser.parse_args(arguments)


class Bench:
    """The operands that all parts share: samples of equal length in one row."""

    def __init__(self, options: argparse.Namespace):
        import jax
        import jax.numpy as jnp

        from lorafusion_jax.bench.shapes import model_shape
        from lorafusion_jax.models.attention import Demands, Segments

        self.options, self.config = options, model_shape(options.model, 1)
        self.dtype = jnp.dtype(options.dtype)
        self.tokens = options.rows * options.length
        row = jnp.arange(self.tokens, dtype=jnp.int32)
        cuts = jnp.minimum(jnp.arange(17, dtype=jnp.int32) * options.length, self.tokens)
        self.positions = row % options.length
        demands = Demands(longest=options.length)
        self.segments = Segments(row - self.positions, cuts, demands)
        self.keys = iter(jax.random.split(jax.random.key(0), 64))

    def normal(self, *shape: int, scale: float = 1.0):
        """Random normal numbers in the dtype of the benchmark."""
        import jax

        return (scale * jax.random.normal(next(self.keys), shape)).astype(self.dtype)

    def row(self, impl: str, ms: float, floor: float, **more) -> dict:
        """A results row."""
        from lorafusion_jax.bench.shapes import H100_PEAK, layer_flops

        options = self.options
        lora = not impl.startswith("frozen")
        work = layer_flops(self.config, [options.length] * options.rows, options.r if lora else 0)
        return {
            "impl": impl, "tokens": self.tokens, "ms": ms, "tokens_per_s": 1e3 * self.tokens / ms,
            "mfu": 1e3 * work / ms / H100_PEAK, "ratio_to_frozen": ms / floor,
            "model": options.model, "r": options.r, "p": options.p, "adapters": options.adapters,
        } | more  # fmt: skip


def _layer_operands(bench: Bench):
    """The frozen layer, its adapters, and how rows are routed to them."""
    import jax.numpy as jnp

    from lorafusion_jax.lora.bank import (
        attach_adapters,
        lora_context,
        multi_linears,
        split_adapters,
    )
    from lorafusion_jax.models.weights import random_decoder

    options = bench.options
    model = random_decoder(bench.config, 0, bench.dtype)
    bank = attach_adapters(model, list(multi_linears(model)), options.adapters, options.r)
    ones = jnp.ones(options.adapters, jnp.float32)

    def filled(stacks):
        return {
            path: bench.normal(*stack.shape, scale=0.02).astype(jnp.float32)
            for path, stack in stacks.items()
        }

    rate = options.p * ones
    bank = bank._replace(a=filled(bank.a), b=filled(bank.b), scale=2 * ones, rate=rate)
    tiles = bench.tokens // options.tile
    slots = jnp.arange(tiles, dtype=jnp.int32) * options.adapters // tiles
    keys = jnp.arange(1, bench.tokens + 1, dtype=jnp.uint32)
    graphdef, frozen = split_adapters(model)
    return graphdef, frozen, bank, lora_context(bank, slots, keys, train=True)


def _layer_program(bench: Bench, operands, kind: str | None, remat: Any = "none"):
    """A compiled forward and backward pass of the layer, and its arguments; kind None is frozen."""
    import jax

    from lorafusion_jax.bench.systems import lora_linears
    from lorafusion_jax.lora.bank import merge_adapters
    from lorafusion_jax.models.decoder import layer_site, run_layer
    from lorafusion_jax.models.rotary import LayerView, rotary_tables

    graphdef, frozen, bank, context = operands
    view = LayerView(rotary_tables(bench.config, bench.positions).of(False))
    x, dy = (bench.normal(bench.tokens, bench.config.hidden_size) for _ in range(2))

    def run(x, dy, a, b, frozen, view, segments, context):
        def forward(x, a, b):
            model: Any = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))
            lora = None if kind is None else context
            return run_layer(
                model.model.layers[0], x, view, segments, lora, layer_site(0), remat=remat
            )

        y, pull = jax.vjp(forward, x, a, b)
        gradients = pull(dy)
        return (y, gradients[0]) if kind is None else (y, gradients)

    arguments = (x, dy, bank.a, bank.b, frozen, view, bench.segments, context)
    with lora_linears(kind or "ours"):
        return jax.jit(run).lower(*arguments).compile(), arguments


def layer_rows(bench: Bench) -> list[dict]:
    """The layer by implementation."""
    from lorafusion_jax.bench.timing import sustained

    kinds: dict[str, str | None] = {"frozen": None}
    if bench.options.adapters == 1:
        kinds["xla_naive"] = "naive"
    kinds |= {"xla_formula": "xla", "ours_ungrouped": "ungrouped"}
    kinds |= {"ours_separate": "separate", "ours": "ours"}
    operands = _layer_operands(bench)
    programs = {name: _layer_program(bench, operands, kind) for name, kind in kinds.items()}
    calls = {name: (program, [arguments]) for name, (program, arguments) in programs.items()}
    times = sustained(calls, rounds=bench.options.rounds)
    return [bench.row(name, ms, times["frozen"], part="layer") for name, ms in times.items()]


def remat_rows(bench: Bench) -> list[dict]:
    """Ours by rematerialisation policy: time, and bytes as XLA and as the planner count them."""
    import jax

    from lorafusion_jax.bench.systems import compiled_bytes
    from lorafusion_jax.bench.timing import sustained
    from lorafusion_jax.models.decoder import REMAT_POLICIES
    from lorafusion_jax.train.memory import Step, kept_bytes

    operands = _layer_operands(bench)
    step = Step(
        bench.config, bench.tokens, bench.options.adapters, bench.options.r,
        itemsize=bench.dtype.itemsize, kernels=jax.default_backend() == "gpu",
        tile=bench.options.tile,
    )  # fmt: skip
    programs = {name: _layer_program(bench, operands, "ours", name) for name in REMAT_POLICIES}
    calls = {name: (program, [arguments]) for name, (program, arguments) in programs.items()}
    times = sustained(calls, rounds=bench.options.rounds)
    return [
        bench.row(
            "ours",
            ms,
            times["none"],
            part="remat",
            remat=name,
            mib=compiled_bytes(programs[name][0]) / 2**20,
            kept_mib_planned=kept_bytes(step, name) / 2**20,  # pyright: ignore[reportArgumentType]
        )
        for name, ms in times.items()
    ]


def attention_rows(bench: Bench) -> list[dict]:
    """Attention by implementation, with and without the guard; the deterministic mode's choice."""
    import jax

    from lorafusion_jax.bench.timing import sustained
    from lorafusion_jax.models import attention_cudnn, attention_xla
    from lorafusion_jax.models.attention import attention
    from lorafusion_jax.models.attention_xla import Scoring
    from lorafusion_jax.train.programs import REPEATABLE

    config, segments = bench.config, bench.segments
    scoring = Scoring(config.head_dim**-0.5)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    q, dout = (bench.normal(bench.tokens, heads[0], config.head_dim) for _ in range(2))
    k, v = (bench.normal(bench.tokens, heads[1], config.head_dim) for _ in range(2))

    def xla_unguarded(q, k, v):
        return attention_xla.attend(q, k, v, segments.start, scoring)

    def cudnn_unguarded(q, k, v):
        return attention_cudnn.attend(q, k, v, segments.offsets, scoring, bench.options.length)

    def cudnn_unbounded(q, k, v):
        return attention_cudnn.attend(q, k, v, segments.offsets, scoring)

    functions: dict[str, tuple[Callable, dict | None]] = {
        "xla": (partial(attention, segments=segments, implementation="xla"), None),
        "xla_unguarded": (xla_unguarded, None),
    }
    if attention_cudnn.refusal(q, k, segments, scoring) is None:
        cudnn = partial(attention, segments=segments, implementation="cudnn")
        functions["cudnn"] = (cudnn, None)
        functions["cudnn_repeatable"] = (cudnn, REPEATABLE)
        functions["cudnn_unguarded"] = (cudnn_unguarded, None)
        functions["cudnn_unbounded"] = (cudnn_unbounded, None)

    def program(function: Callable, options: dict | None):
        def run(q, k, v, dout):
            out, pull = jax.vjp(function, q, k, v)
            return out, pull(dout)

        return jax.jit(run).lower(q, k, v, dout).compile(compiler_options=options)

    calls = {name: (program(*what), [(q, k, v, dout)]) for name, what in functions.items()}
    times = sustained(calls, rounds=bench.options.rounds)
    floor = times.get("cudnn_unguarded", times["xla_unguarded"])
    return [bench.row(name, ms, floor, part="attention") for name, ms in times.items()]


def head_rows(bench: Bench) -> list[dict]:
    """Loss and dX of the frozen head, over its two products."""
    import jax
    import jax.numpy as jnp

    from lorafusion_jax.bench.systems import compiled_bytes
    from lorafusion_jax.bench.timing import sustained
    from lorafusion_jax.train.loss import TokenLosses, token_losses
    from lorafusion_jax.train.step import loss_chunk

    config, chunk = bench.config, loss_chunk(bench.config.vocab_size, bench.tokens)
    x = bench.normal(bench.tokens, config.hidden_size)
    head = bench.normal(config.vocab_size, config.hidden_size, scale=config.hidden_size**-0.5)
    labels = jax.random.randint(next(bench.keys), (bench.tokens,), 0, config.vocab_size)
    weight = jnp.full(bench.tokens, 1 / bench.tokens, jnp.float32)

    def products(x, head, labels, weight):
        def one(start):
            rows = jax.lax.dynamic_slice_in_dim(x, start * chunk, chunk)
            return (rows @ head.T) @ head

        return jax.lax.map(one, jnp.arange(bench.tokens // chunk))

    def loss(x, head, labels, weight):
        losses: TokenLosses = token_losses(x, head, labels, weight, chunk)
        return losses.weighted.sum()

    arguments = (x, head, labels, weight)
    programs = {
        "frozen_products": jax.jit(products).lower(*arguments).compile(),
        "ours": jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(),
    }
    calls = {name: (program, [arguments]) for name, program in programs.items()}
    times = sustained(calls, rounds=bench.options.rounds)
    floor = times["frozen_products"]
    return [
        bench.row(
            name, ms, floor, part="head", chunk=chunk, mib=compiled_bytes(programs[name]) / 2**20
        )
        for name, ms in times.items()
    ]


_ROWS: dict[str, Callable[[Bench], list[dict]]] = {
    "layer": layer_rows,
    "remat": remat_rows,
    "attention": attention_rows,
    "head": head_rows,
}


def _fused(options: argparse.Namespace) -> int:
    """The part that goes by itself."""
    from lorafusion_jax.bench.timing import forbid_graphs

    forbid_graphs()
    import jax

    from lorafusion_jax.bench.layer_fused import fused_rows
    from lorafusion_jax.bench.results import write_results

    if jax.default_backend() != "gpu":
        raise ConfigError("--parts fused needs a GPU: jax found only " + jax.default_backend())
    rows = fused_rows(Bench(options))
    if options.output:
        write_results("layer_fused", rows, folder=options.output)
    return 0


def main(arguments: list[str]) -> int:
    """Runs the benchmark; see the module's help."""
    options = _arguments(arguments)
    parts = options.parts.split(",")
    if not (parts == [ALONE] or set(parts) <= set(PARTS)):
        expected = f"some of {','.join(PARTS)}, or {ALONE} by itself"
        raise ConfigError(f"--parts {options.parts}: expected {expected}")
    if options.rows > 16 or options.length % options.tile:
        raise ConfigError("expected up to 16 --rows, and a --length that is a multiple of --tile")
    if parts == [ALONE]:
        return _fused(options)
    from lorafusion_jax.bench.results import RESULTS, device_name, read_baselines, write_results

    rows = []
    if options.baselines:
        rows = read_baselines(options.baselines, ("impl", "tokens", "ms"))
    bench, folder = Bench(options), options.output or RESULTS / device_name()
    for part in parts:
        for row in _ROWS[part](bench):
            rows.append(row)
            what = f"{row['part']:<10} {row['impl']:<18} {row.get('remat', ''):<10}"
            print(f"{what} {row['ms']:9.3f} ms {row['ratio_to_frozen']:7.3f}", flush=True)
        write_results("layer", rows, folder=folder)
    return 0
