"""Tile sizes: classes that refuse the impossible, tables, overrides."""

import json

import jax.numpy as jnp
import pytest

from pallas_kernels import tables, tuning
from pallas_kernels.lora import gemm
from pallas_kernels.tuning import (
    OPERATIONS,
    DownTiles,
    GemmTiles,
    GradDownTiles,
    GradUpTiles,
    Shape,
    candidates,
)

SHAPE = Shape(8192, 4096, (4096,), 16)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GemmTiles(stages=5), "shared memory"),
        (lambda: GemmTiles(stages=4, staged=4), "shared memory"),
        (lambda: GemmTiles(stages=3, absorb=True), "even number"),
        (lambda: GemmTiles(stages=1), "one slot"),
        (lambda: GemmTiles(staged=3), "1, 2 or 4"),
        (lambda: DownTiles(stages=3), "multiple of 2"),
        (lambda: GradUpTiles(panel=640), "spill"),
        (lambda: GradDownTiles(panel=100), "multiple of 128"),
    ],
)
def test_impossible_sizes_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_every_candidate_is_possible_and_the_heuristic_is_first():
    for op, (kind, heuristic) in OPERATIONS.items():
        for shape in (SHAPE, Shape(256, 64, (64, 8), 128), Shape(16384, 14336, (4096,), 64)):
            found = candidates(op, shape)
            assert found[0] == heuristic(shape) and all(isinstance(v, kind) for v in found)
            assert len(set(found)) == len(found)


def test_the_shipped_table_is_read_and_serves_its_bucket():
    entries = json.loads((tables._SHIPPED / "h100.json").read_text())["entries"]
    table = tables.read_table(tables._SHIPPED / "h100.json")
    assert len(table) == len(entries) > 0
    for row in entries:
        shape = Shape(row["rows"], row["k"], (row["n"],), row["rank"])
        assert table[tables.key_of(row["op"], shape)] == tables.choose(row["op"], shape)
    near = Shape(8000, 4096, (2048, 1024, 1000), 16)
    assert tables.key_of("dx", near) == tables.key_of("dx", SHAPE)
    small = Shape(128, 64, (64,), 8)
    assert tables.choose("dx", small) == OPERATIONS["dx"][1](small)


def test_ones_own_table_and_an_override_win(tmp_path):
    wanted, path = GemmTiles(width=4), tmp_path / "mine.json"
    path.write_text(json.dumps({"entries": [tables.entry("dx", SHAPE, wanted, 1.0)]}))
    with tables.using_table(path):
        assert tables.choose("dx", SHAPE) == wanted != tables.choose("base_up", SHAPE)
        with tables.using(dx=GemmTiles(stages=2)):
            assert tables.choose("dx", SHAPE).stages == 2
    assert tables.choose("dx", SHAPE) != wanted
    with pytest.raises(ValueError, match="down=GemmTiles"):
        tables.using(down=GemmTiles())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"entries": [{"op": "dx"}]}',
        '{"entries": [{"op": "dx", "rows": 8, "k": 8, "n": 8, "rank": 8, "sizes": {"stages": 9}}]}',
        '{"entries": [{"op": "no", "rows": 8, "k": 8, "n": 8, "rank": 8, "sizes": {}}]}',
    ],
)
def test_a_damaged_table_costs_one_warning(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with tables.using_table(path):
        with pytest.warns(UserWarning, match="not a table of tile sizes"):
            assert tables.choose("dx", SHAPE) == OPERATIONS["dx"][1](SHAPE)
        assert tables.choose("base_up", SHAPE) == OPERATIONS["base_up"][1](SHAPE)  # and no other


def test_atomic_sums_are_an_opt_in():
    assert not tables.choose("grad_up", SHAPE).atomic
    with tables.atomic_gradients():
        assert tables.choose("grad_up", SHAPE).atomic and tables.choose("grad_down", SHAPE).atomic
        assert isinstance(tables.choose("dx", SHAPE), GemmTiles)


def test_the_shipped_table_holds_what_was_measured():
    """So far only the heuristics' own choices were: whoever measures others changes this test."""
    for op, sizes in tables.read_table(tables._SHIPPED / "h100.json").items():
        shape = Shape(op[1], op[2], (op[3],), op[4])
        assert sizes == OPERATIONS[op[0]][1](shape)


@pytest.mark.parametrize(
    ("jobs", "tiles", "pays"),
    [
        (32, 1024, True),  # 32 blocks have a tile less: the pass hides behind the others' last one
        (64, 1024, False),  # two each, of which one does not
        (32, 1056, False),  # no block has a tile less
        (132, 1056, False),
    ],
)
def test_a_pass_is_absorbed_where_blocks_have_time_for_it(jobs, tiles, pays):
    work = tuning.Pass(jobs, job_us=40.0, alone_us=30.0)
    assert tuning.absorbing_pays(work, 8192, 4096, tiles) == pays


@pytest.mark.parametrize("tiles", [5, 1024, 1056, 3584])
@pytest.mark.parametrize("jobs", [1, 32, 64, 300])
def test_every_job_has_one_block(jobs, tiles, monkeypatch):
    """And blocks with a tile less come first."""
    found = []
    for block in range(132):
        monkeypatch.setattr(gemm.lax, "axis_index", lambda name, block=block: jnp.int32(block))
        mine = gemm.share_jobs(jobs, 4096, 4096, tiles, 132)
        found.append([int(mine.job(jnp.int32(turn))) for turn in range(int(mine.number))])
    assert sorted(job for own in found for job in own) == list(range(jobs))
    light = found[tiles % 132 :]
    assert max(map(len, found)) == max(map(len, light))
    assert all(own == sorted(own) for own in found)
