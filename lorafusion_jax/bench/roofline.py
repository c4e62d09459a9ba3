"""What a fused kernel must move and multiply, and the least time that takes on an H100."""

from lorafusion_jax.bench.linears import Case

BYTES_PER_US = 3.0e6  # measured copy bandwidth of an H100 80GB HBM3, reads and writes together
FLOP_PER_US = 989e6  # dense bfloat16 peak


def work(case: Case) -> dict[str, tuple[float, float]]:
    """Returns bytes and floating point operations of each kernel; partial sums not counted."""
    t, k, n, r = case.tokens, case.k, sum(case.ns), case.r
    ranks = r * len(case.ns)
    s = 2 * t * ranks
    x, dy, w = 2 * t * k, 2 * t * n, 2 * k * n
    a, b = 4 * case.adapters * ranks * k, 4 * case.adapters * r * n
    return {
        "down": (x + s + a / 2, 2.0 * t * k * ranks),
        "base_up": (x + w + dy + s + b / 2, 2.0 * t * n * (k + r)),
        "grad_up": (dy + 2 * s + b / 2 + b, 4.0 * t * n * r),
        "grad_down": (x + s + a, 2.0 * t * k * ranks),
        "dx": (dy + w + x + s + a / 2, 2.0 * t * k * (n + ranks)),
    }


def floor_us(case: Case) -> dict[str, float]:
    """Returns the least microseconds of each kernel, by memory or tensor cores."""
    return {
        op: max(moved / BYTES_PER_US, flop / FLOP_PER_US)
        for op, (moved, flop) in work(case).items()
    }


def kernel_rows(case: Case, times: list[tuple[str, float]]) -> list[dict]:
    """Returns a row per fused kernel of a call: its time, bytes moved and share of the roofline."""
    rows, floors = [], floor_us(case)
    for op, (moved, _) in work(case).items():
        us = sum(value for name, value in times if f"lora_{op}_" in name)
        if us:
            rows.append({
                "impl": f"kernel: {op}", "pass": "alone", "ms": round(us / 1e3, 5),
                "megabytes": round(moved / 1e6, 2), "share_of_roofline": round(floors[op] / us, 4),
            })  # fmt: skip
    return rows
