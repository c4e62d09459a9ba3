"""What a fused kernel must move and multiply, and the least time that takes on a device."""

from lorafusion_jax.bench.linears import Case

FLOP_PER_US = 989e6  # dense bfloat16 peak of Hopper


def copy_bytes_per_us(gibibytes: int = 1) -> float:
    """Measures the device's bandwidth: bytes read and written per us by a copy of that size."""
    import jax
    import jax.numpy as jnp

    from lorafusion_jax.bench.timing import kernel_times

    x = jnp.ones(gibibytes << 29, jnp.bfloat16)
    # Not a plain copy, which XLA would leave to the driver.
    times = kernel_times(jax.jit(lambda x: -x), (x,))
    return 2 * x.nbytes / sum(us for _, us in times)


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


def floor_us(case: Case, bytes_per_us: float) -> dict[str, float]:
    """Returns the least microseconds of each kernel, by memory or tensor cores."""
    return {
        op: max(moved / bytes_per_us, flop / FLOP_PER_US)
        for op, (moved, flop) in work(case).items()
    }


def kernel_rows(case: Case, times: list[tuple[str, float]], bytes_per_us: float) -> list[dict]:
    """Returns a row per fused kernel of a call: its time, bytes moved and share of the roofline."""
    rows, floors = [], floor_us(case, bytes_per_us)
    for op, (moved, _) in work(case).items():
        us = sum(value for name, value in times if f"lora_{op}_" in name)
        if us:
            rows.append({
                "impl": f"kernel: {op}", "pass": "alone", "ms": round(us / 1e3, 5),
                "megabytes": round(moved / 1e6, 2), "share_of_roofline": round(floors[op] / us, 4),
            })  # fmt: skip
    return rows
