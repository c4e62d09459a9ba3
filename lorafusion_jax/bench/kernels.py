"""Benchmarks the fused LoRA linear against the frozen one and XLA's best, in one process.

    lorafusion bench kernels [--quick] [--kernels] [--output docs/results/h100]

Every ratio is over the frozen linear (X W and dY W^T) of the same run; calls take turns.
"""

import argparse
import os
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
    parser.add_argument("--output", type=Path, default=None, help="folder for kernels.json")
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
            rows.append({
                "tokens": case.tokens, "k": case.k, "n": _label(case.ns), "r": case.r,
                "p": case.p, "adapters": case.adapters, "impl": name, "pass": which,
                "ms": round(ms, 4), "ratio_to_frozen": round(ms / times["frozen"], 4),
                "frozen_tflops": round(work / times["frozen"] / 1e9, 1),
            })  # fmt: skip
    return rows


def _print_kernels(case) -> None:
    from lorafusion_jax.bench.linears import make_operands, passes
    from lorafusion_jax.bench.timing import kernel_times

    operands = make_operands(case, 0)
    for name in ("frozen", "ours"):
        times = kernel_times(passes(name)["fwdbwd"], (operands,))
        print(f"  {name}: {sum(time for _, time in times):.1f} us", flush=True)
        print("   ", "  ".join(f"{kernel[:28]} {time:.1f}" for kernel, time in times), flush=True)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; see the module's help."""
    options = _arguments(arguments)
    # CUPTI wants the same kernels in every call, so keep XLA from making CUDA graphs.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    import jax

    if jax.default_backend() != "gpu":
        raise ConfigError("bench kernels needs a GPU: jax found only " + jax.default_backend())
    from lorafusion_jax.bench.results import write_results

    rows = []
    for case in _cases(options.quick, options.shape):
        print(case, flush=True)
        if options.kernels:
            _print_kernels(case)
        names, wanted = options.implementations.split(","), options.passes.split(",")
        found = measure(case, names, wanted, options.rounds)
        for row in found:
            ratio = f"{row['ms']:8.4f} ms {row['ratio_to_frozen']:7.3f}"
            print(f"  {row['impl']:<10} {row['pass']:<7} {ratio}", flush=True)
        rows += found
        if options.output:  # after every case: a benchmark cut short leaves what it has
            write_results("kernels", rows, device=options.output.name, root=options.output.parent)
    return 0
