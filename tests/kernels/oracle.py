"""Problems for the fused op and their truth in float64 numpy, written row by row from the paper."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora.spec import Routing


class Problem(NamedTuple):
    """Arguments of a forward and a backward pass."""

    x: jax.Array
    ws: tuple
    a: tuple
    b: tuple
    biases: tuple
    routing: Routing
    dys: tuple

    def forward_args(self):
        return self.x, self.ws, self.a, self.b, self.biases, self.routing

    def backward_args(self, ss):
        return self.x, self.ws, self.a, self.b, ss, self.routing, self.dys


class Results(NamedTuple):
    """Everything a pass and its gradient give."""

    ys: tuple
    ss: tuple
    dx: jax.Array
    da: tuple
    db: tuple


def make_problem(
    seed=0,
    *,
    tiles=(0, 1, -1, 0),
    tile_rows=8,
    k=48,
    ns=(40,),
    rank=4,
    rates=(0.1, 0.0),
    scales=(2.0, 0.5),
    dtype=jnp.float32,
    padding=(),
    biased=False,
    site=9,
):
    """Returns a random problem; `padding` lists the rows whose key is 0."""
    rng = np.random.default_rng(seed)
    rows, slots = len(tiles) * tile_rows, len(rates)

    def normal(*shape, scale=1.0, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype)

    keys = rng.integers(1, 2**32, rows, dtype=np.uint32)
    keys[list(padding)] = 0
    routing = Routing(
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(rates, jnp.float32),
        jnp.asarray(tiles, jnp.int32),
        jnp.asarray(keys),
        jnp.full((1,), site, jnp.uint32),
    )
    master = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return Problem(
        normal(rows, k),
        tuple(normal(k, n, scale=k**-0.5) for n in ns),
        tuple(normal(slots, rank, k, scale=k**-0.5, dtype=master) for _ in ns),
        tuple(normal(slots, rank, n, scale=rank**-0.5, dtype=master) for n in ns),
        tuple(normal(n) if biased else None for n in ns),
        routing,
        tuple(normal(rows, n) for n in ns),
    )


def keep_of_row(key: int, site: int, rate: float, columns: int) -> np.ndarray:
    """The keep mask of a row in Python integers, from the definition alone."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    start = (key + mix(site)) & 0xFFFFFFFF
    kept = np.empty(columns, bool)
    for c in range(columns):
        h = mix(start ^ ((((c // 64) * 16 + c % 16) * 0x9E3779B1) & 0xFFFFFFFF))
        kept[c] = (h >> (8 * ((c // 16) % 4))) & 255 >= round(256 * rate)
    return kept


def truth(p: Problem) -> Results:
    """Computes everything in float64, one row at a time, from operands as the kernels see them."""
    x = np.asarray(p.x, np.float64)
    seen = [np.asarray(jnp.asarray(v, p.x.dtype), np.float64) for v in (*p.a, *p.b)]
    a, b = seen[: len(p.a)], seen[len(p.a) :]
    ws, dys = ([np.asarray(v, np.float64) for v in vs] for vs in (p.ws, p.dys))
    keys, tiles = np.asarray(p.routing.row_key), np.asarray(p.routing.tile_adapter)
    ys = [x @ w for w in ws]
    if p.biases[0] is not None:
        ys = [y + np.asarray(bias, np.float64) for y, bias in zip(ys, p.biases, strict=True)]
    ss = [np.zeros((len(x), v.shape[1])) for v in a]
    dx = sum(dy @ w.T for dy, w in zip(dys, ws, strict=True))
    da, db = [np.zeros(v.shape) for v in a], [np.zeros(v.shape) for v in b]
    for t, key in enumerate(keys):
        slot = tiles[t // (len(keys) // len(tiles))]
        if slot < 0 or key == 0:
            continue
        rate = float(np.round(np.float32(p.routing.rate[slot]) * 256) / 256)
        keep = keep_of_row(int(key), int(p.routing.site[0]), rate, x.shape[1]) / (1 - rate)
        scale, dropped = float(p.routing.scale[slot]), x[t] * keep
        for i in range(len(ws)):
            ss[i][t] = scale * (a[i][slot] @ dropped)
            ys[i][t] += ss[i][t] @ b[i][slot]
            ds = scale * (b[i][slot] @ dys[i][t])
            db[i][slot] += np.outer(ss[i][t], dys[i][t])
            da[i][slot] += np.outer(ds, dropped)
            dx[t] += keep * (ds @ a[i][slot])
    return Results(tuple(ys), tuple(ss), dx, tuple(da), tuple(db))


def keep_of_rows(keys, site: int, rates, columns: int) -> np.ndarray:
    """The keep mask of many rows at once, in numpy's uint32."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    c = np.arange(columns, dtype=np.uint32)
    counter = (c // 64 * 16 + c % 16) * np.uint32(0x9E3779B1)
    start = np.asarray(keys, np.uint32) + mix(np.asarray([site], np.uint32))
    h = mix(start[:, None] ^ counter[None, :])
    byte = (h >> (c // 16 % 4 * 8)[None, :]) & np.uint32(255)
    return byte >= np.round(np.asarray(rates, np.float32) * 256).astype(np.uint32)[:, None]


def fast_truth(p: Problem, *, rounded: bool = False) -> Results:
    """The same as `truth`, adapter by adapter, for problems of thousands of rows.

    With `rounded`, S, dS, Y and dX are rounded to X's dtype where the kernels must: what is left is
    the error that no kernel can avoid.
    """
    dtype = p.x.dtype

    def seen(value):
        return np.asarray(jnp.asarray(value, dtype)).astype(np.float64)

    def round_(value):
        return value.astype(dtype).astype(np.float64) if rounded else value

    x, ws, dys = seen(p.x), [seen(w) for w in p.ws], [seen(dy) for dy in p.dys]
    a, b = [seen(v) for v in p.a], [seen(v) for v in p.b]
    keys, tiles = np.asarray(p.routing.row_key), np.asarray(p.routing.tile_adapter)
    slots = np.repeat(tiles, len(keys) // len(tiles))
    ys = [x @ w for w in ws]
    if p.biases[0] is not None:
        ys = [y + np.asarray(bias).astype(np.float64) for y, bias in zip(ys, p.biases, strict=True)]
    ss = [np.zeros((len(x), v.shape[1])) for v in a]
    dx = sum(dy @ w.T for dy, w in zip(dys, ws, strict=True))
    da, db = [np.zeros(v.shape) for v in a], [np.zeros(v.shape) for v in b]
    for slot in range(len(p.routing.rate)):
        rows = np.flatnonzero((slots == slot) & (keys != 0))
        rate, scale = np.asarray(p.routing.rate)[slot], float(p.routing.scale[slot])
        factor = 256 / (256 - float(np.round(np.float32(rate) * 256)))
        keep = keep_of_rows(
            keys[rows], int(p.routing.site[0]), np.full(len(rows), rate), x.shape[1]
        )
        dropped = np.where(keep, x[rows], 0.0)
        for i in range(len(ws)):
            s = round_(scale * factor * dropped @ a[i][slot].T)
            ds = round_(scale * factor * dys[i][rows] @ b[i][slot].T)
            ss[i][rows] = s
            ys[i][rows] += s @ b[i][slot]
            db[i][slot] = s.T @ dys[i][rows]
            da[i][slot] = ds.T @ dropped
            dx[rows] += np.where(keep, ds @ a[i][slot], 0.0)
    return Results(tuple(round_(y) for y in ys), tuple(ss), round_(dx), tuple(da), tuple(db))


def run(backend, p: Problem) -> Results:
    """Runs a backend module (or anything with `forward` and `backward`) on a problem."""
    ys, ss = backend.forward(*p.forward_args())
    return Results(ys, ss, *backend.backward(*p.backward_args(ss)))


def relative_error(actual, expected) -> float:
    """Frobenius norm of the difference over that of the truth; infinite if not finite."""
    actual, expected = (np.asarray(v).astype(np.float64) for v in (actual, expected))
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def errors(actual: Results, expected: Results) -> dict[str, float]:
    """Relative error of every array of two results, by name."""
    return {
        f"{name}[{i}]": relative_error(got, want)
        for name, gots, wants in zip(Results._fields, actual, expected, strict=True)
        for i, (got, want) in enumerate(
            zip(*((v if isinstance(v, tuple) else (v,)) for v in (gots, wants)), strict=True)
        )
    }
