"""Benchmarks the fused LoRA linear against the frozen one and XLA's best, in one process.

    lorafusion bench kernels [--quick] [--kernels] [--output docs/results/h100]
    lorafusion bench kernels --variants --quick --shape 0       variants of the products, sustained
    lorafusion bench kernels --tune TABLE.json --shape 0        every kernel's candidates, alone

Every ratio is over the frozen linear (X W and dY W^T) of the same run; calls take turns.
--peft-baseline adds rows that a PEFT benchmark wrote on the same GPU, over its own frozen linear.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from lorafusion_jax.errors import ConfigError

SINGLE = (
    (8192, 4096, (4096,)),
    (8192, 4096, (14336,)),
    (8192, 14336, (4096,)),
    (8192, 8192, (8192,)),
    (2048, 4096, (4096,)),
    (16384, 4096, (4096,)),
)
GROUPED = ((8192, 4096, (4096, 1024, 1024)), (8192, 4096, (14336, 14336)))
VARIANTS = ((16, 0.1, 1), (16, 0.0, 1), (64, 0.1, 1), (16, 0.1, 4), (16, 0.1, 8), (64, 0.1, 8))


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lorafusion bench kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="r=16, p=0.1, one adapter only")
    parser.add_argument("--kernels", action="store_true", help="print the time of every kernel")
    parser.add_argument("--implementations", default="frozen,xla_naive,xla_best,ours")
    parser.add_argument("--passes", default="fwd,bwd,fwdbwd")
    parser.add_argument("--shape", type=int, default=None, help="index of the only shape to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", action="store_true", help="compare variants of the products")
    parser.add_argument("--tune", type=Path, default=None, metavar="TABLE", help="table to write")
    parser.add_argument("--table", type=Path, default=None, help="table of tile sizes to use")
    parser.add_argument("--graphs", action="store_true", help="let XLA make CUDA graphs")
    parser.add_argument("--peft-baseline", type=Path, default=None, help="JSON to take rows from")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    return parser.parse_args(arguments)


def _cases(quick: bool, shape: int | None):
    from lorafusion_jax.bench.linears import Case

    shapes = SINGLE + GROUPED
    if shape is not None:
        shapes = shapes[shape : shape + 1]
    for r, p, adapters in VARIANTS[:1] if quick else VARIANTS:
        for tokens, k, ns in shapes:
            yield Case(tokens, k, ns, r, p, adapters)


def _label(ns: tuple[int, ...]) -> int | str:
    return ns[0] if len(ns) == 1 else "|".join(map(str, ns))


def _calls(names, wanted, sets):
    """Function and argument sets of each implementation, by pass and name."""
    from lorafusion_jax.bench.linears import passes

    calls: dict[str, dict] = {which: {} for which in wanted}
    for name in names:
        functions = passes(name)
        for which in wanted:
            if which == "bwd":
                arguments = [(functions["fwd"](o)[1], o) for o in sets]
            else:
                arguments = [(o,) for o in sets]
            calls[which][name] = (functions[which], arguments)
    return calls


def measure(case, names: list[str], wanted: list[str], rounds: int) -> list[dict]:
    """Returns one row per implementation and pass of a case."""
    from lorafusion_jax.bench.linears import make_operands
    from lorafusion_jax.bench.timing import sustained

    sets = [make_operands(case, seed) for seed in range(3)]
    flops = 2.0 * case.tokens * case.k * sum(case.ns)
    rows = []
    for which, calls in _calls(names, wanted, sets).items():
        times = sustained(calls, rounds=rounds)
        for name, ms in times.items():
            work = flops * (2 if which == "fwdbwd" else 1)
            rows.append(_where(case) | {
                "impl": name, "pass": which, "ms": round(ms, 4),
                "ratio_to_frozen": round(ms / times["frozen"], 4),
                "frozen_tflops": round(work / times["frozen"] / 1e9, 1),
            })  # fmt: skip
    return rows


def _where(case) -> dict:
    return {
        "tokens": case.tokens, "k": case.k, "n": _label(case.ns), "r": case.r, "p": case.p,
        "adapters": case.adapters,
    }  # fmt: skip


def _kernels(case, bytes_per_us: float) -> list[dict]:
    """Prints the time of every kernel; returns a row for each of ours and of the frozen linear."""
    from lorafusion_jax.bench.linears import make_operands, passes
    from lorafusion_jax.bench.roofline import kernel_rows
    from lorafusion_jax.bench.timing import kernel_times

    operands, times, frozen_us = make_operands(case, 0), [], 0.0
    for name in ("frozen", "ours"):
        times = kernel_times(passes(name)["fwdbwd"], (operands,))
        print(f"  {name}: {sum(time for _, time in times):.1f} us", flush=True)
        print("   ", "  ".join(f"{kernel[:28]} {time:.1f}" for kernel, time in times), flush=True)
        if name == "frozen":
            frozen_us = sum(time for _, time in times)
    rows = kernel_rows(case, times, bytes_per_us)
    for row in rows:
        print(f"    {row['impl']:<18} {100 * row['share_of_roofline']:.1f}% of the roofline")
    alone = {"impl": "kernel: frozen", "pass": "alone", "ms": round(frozen_us / 1e3, 5)}
    return [_where(case) | row for row in (alone, *rows)]


def _compare_variants(case, rounds: int) -> list[dict]:
    """Returns a row for the frozen linear, ours as shipped, and each variant."""
    from lorafusion_jax.bench.kernel_variants import variant_calls
    from lorafusion_jax.bench.linears import make_operands
    from lorafusion_jax.bench.timing import sustained

    sets = [make_operands(case, seed) for seed in range(3)]
    calls = _calls(["frozen", "ours"], ["fwdbwd"], sets)["fwdbwd"] | variant_calls(sets)
    times = sustained(calls, rounds=rounds)
    return [
        _where(case) | {
            "impl": name, "pass": "fwdbwd", "ms": round(ms, 4),
            "ratio_to_frozen": round(ms / times["frozen"], 4),
        }
        for name, ms in times.items()
    ]  # fmt: skip


_PEFT_NAMES = {"peft": "peft", "compile": "peft_compile"}


def peft_rows(path: Path) -> list[dict]:
    """Reads the rows of PEFT, plain and under torch.compile, from a baseline's JSON.

    Args:
        path: {"results": [{"case": [tokens, k, n, r, p], "methods": {name: {pass: ms}}}]}.

    Raises:
        ConfigError: the file is not that.
    """
    rows = []
    try:
        for record in json.loads(path.read_text())["results"]:
            tokens, k, n, r, p = record["case"]
            frozen = record["methods"]["frozen"]
            for theirs, ours in _PEFT_NAMES.items():
                times = record["methods"].get(theirs, {})
                for which in ("fwd", "bwd", "fwdbwd"):
                    if which in times:
                        rows.append({
                            "tokens": tokens, "k": k, "n": n, "r": r, "p": p, "adapters": 1,
                            "impl": ours, "pass": which, "ms": round(times[which], 4),
                            "ratio_to_frozen": round(times[which] / frozen[which], 4),
                        })  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no PEFT baseline in it ({type(error).__name__}: {error}); expected "
            "{results: [{case: [tokens, k, n, r, p], methods: {frozen, peft, compile: {fwdbwd}}}]}"
        ) from None
    return rows


def _measured(options) -> Iterator[list[dict]]:
    """Measures what was asked for, case by case."""
    from lorafusion_jax.bench.roofline import copy_bytes_per_us

    if options.peft_baseline:
        yield peft_rows(options.peft_baseline)
    bytes_per_us = 0.0
    if options.kernels:
        bytes_per_us = copy_bytes_per_us()
        print(f"copy bandwidth {bytes_per_us / 1e6:.2f} TB/s", flush=True)
    names, wanted = options.implementations.split(","), options.passes.split(",")
    for case in _cases(options.quick, options.shape):
        print(case, flush=True)
        if options.kernels:
            yield _kernels(case, bytes_per_us)
        if options.variants:
            yield _compare_variants(case, options.rounds)
        else:
            yield measure(case, names, wanted, options.rounds)


def _tune(options) -> None:
    from lorafusion_jax.bench.kernel_variants import tune, write_table

    entries = []
    for case in _cases(True, options.shape):
        print(case, flush=True)
        entries += tune(case)
        write_table(entries, options.tune)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; see the module's help."""
    options = _arguments(arguments)
    if options.peft_baseline:
        peft_rows(options.peft_baseline)  # a bad file is told of before anything is measured
    if not options.graphs:
        from lorafusion_jax.bench.timing import forbid_graphs

        forbid_graphs()
    elif options.kernels or options.tune:
        raise ConfigError("--graphs hides kernels from CUPTI: leave out --kernels and --tune")
    import jax

    if jax.default_backend() != "gpu":
        raise ConfigError("bench kernels needs a GPU: jax found only " + jax.default_backend())
    from lorafusion_jax.bench.results import write_results
    from pallas_kernels import tables

    with tables.using_table(options.table) if options.table else contextlib.nullcontext():
        if options.tune:
            _tune(options)
            return 0
        rows = []
        for found in _measured(options):
            for row in found:
                if "ratio_to_frozen" in row:
                    ratio = f"{row['ms']:8.4f} ms {row['ratio_to_frozen']:7.3f}"
                    print(f"  {row['impl']:<20} {row['pass']:<7} {ratio}", flush=True)
            rows += found
            if options.output:  # after every case: a benchmark cut short leaves what it has
                name = "kernel_variants" if options.variants else "kernels"
                write_results(name, rows, folder=options.output)
    return 0
