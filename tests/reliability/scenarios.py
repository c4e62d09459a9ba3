"""The scenarios that a release is judged by: what may happen, where it is tried, what it weighs.

A test that shows a scenario carries `@pytest.mark.scenario("A3")`; `scoreboard` counts them. One
test may show several scenarios, and one scenario may need several tests: all of them must pass.
"""

from typing import NamedTuple


class Scenario(NamedTuple):
    """One thing that may happen.

    Attributes:
        id: such as A3.
        text: what happens.
        places: where it is tried: C one CPU device, V eight virtual ones, G one GPU, G2 two.
        weight: 3 decides a release, 2 is important, 1 is polish.
    """

    id: str
    text: str
    places: tuple[str, ...]
    weight: int

    @property
    def needs_gpu(self) -> bool:
        """Nothing but a GPU can show it."""
        return all(place.startswith("G") for place in self.places)

    @property
    def wants_gpu(self) -> bool:
        """A GPU shows more of it than a CPU."""
        return any(place.startswith("G") for place in self.places)


SECTIONS = {
    "A": "Checkpoints, crashes, storage",
    "B": "Determinism and resume",
    "C": "Isolation and equivalence",
    "D": "Kernels",
    "E": "Scheduler",
    "F": "Untrusted input",
    "G": "Resources and operation",
}

_TABLE = """
A1 | C | 3 | kill -9 at random moments, 20 restarts in one run
A2 | C | 3 | death at each named point of a save, and while pruning
A3 | C | 3 | a bit flips in a checkpoint, 50 draws over all its files
A4 | C | 3 | checkpoint files cut, emptied, deleted; foreign files; no manifest
A5 | C | 3 | SIGTERM while compiling, in a step, waiting for data, saving; and twice
A6 | C | 3 | disk full while saving, synchronously and in the background, and while writing metrics
A7 | C | 2 | output folder read-only or vanished
A8 | C | 3 | two trainers on one output folder
A9 | C | 3 | resume with changed configuration, data, rank, jobs, model or dtype
A10 | C | 2 | retention never removes the only verified step
A11 | C | 2 | saves back to back, over an unfinished one, of an existing or older step
A12 | V | 2 | restore on another device count or mesh
A13 | C | 2 | checkpoint, plan and configuration of an older release
A14 | C | 1 | verify-checkpoint on good, damaged and half-written folders
B1 | C,V | 3 | two identical runs of four adapters with dropout
B2 | C,V | 3 | stop at each step and resume: same bits
B3 | C | 3 | stop inside a global batch and resume: same bits
B4 | C | 3 | data order is a function of seed, job, epoch and index only
B5 | G | 3 | two runs and three resumes of 20 steps with dropout on a GPU: same bits
B6 | G | 3 | kernels repeated 200 times beside other work: same bits
B7 | C,G | 3 | dropout masks alone, packed, re-ordered, recomputed, resumed
B8 | C,G | 2 | losses of 20 steps equal the stored ones
B9 | C | 3 | the planner's output in fresh processes, whatever the hash seed
C1 | C,V,G | 3 | together against alone; ranks, alphas, dropouts, rates, batches differ
C2 | C,G | 3 | a neighbour's content changes
C3 | C,G | 3 | NaN or infinity in one adapter's weights, gradient or loss; skip, freeze, stop
C4 | C | 3 | an adapter is absent from a step
C5 | C | 3 | clipping and loss normalisation are each adapter's own
C6 | C | 3 | slots permuted; a slot used again
C7 | C,G | 3 | ranks beyond an adapter's own stay zero
C8 | C | 2 | a job ends, is cancelled or joins in a running process
C9 | C,G | 2 | base weights keep their bits and have no gradient
C10 | C,G | 3 | samples packed in one row do not see each other
C11 | V,G2 | 3 | 2, 4, 8 pipeline stages against one
C12 | V | 3 | a forward pass sees the update of the batch before, on every stage
D1 | C,G | 3 | each operation and gradient against the float64 truth, odd shapes
D2 | C,G | 3 | every pattern of empty adapters
D3 | C,G | 3 | NaN in padded rows and uninitialised output
D4 | C | 3 | races: none reported, and one when a wait is removed
D5 | G | 2 | memory sanitizers on the kernels
D6 | C,G | 2 | inputs from 1e-4 to 1e4, alpha/r from 1/64 to 64
D7 | C | 3 | gradients against finite differences
D8 | C,G | 3 | wrong calls of an operation
D9 | C | 2 | unsupported device, missing plugin, damaged tuning table
D10 | C | 2 | kernels lower for their targets without a GPU
D11 | C,V,G | 2 | jit, vmap, scan, remat, donation, shard_map change nothing
E1 | C | 3 | 10,000 random problems are planned legally
E2 | C | 3 | 1,000 broken schedules are all refused
E3 | C | 2 | plans are never worse than first-fit decreasing and mostly optimal for few samples
E4 | C | 3 | planner limits: overlong, empty, one job, 1,000 jobs, 100,000 samples
E5 | C | 2 | planner budget and interruption
E6 | C | 2 | schedule file damaged, of another version, for other data
F1 | C | 3 | JSONL: cut, bad UTF-8, BOM, CRLF, NUL, NaN, duplicate keys, deep nesting, huge lines
F2 | C | 3 | samples: empty, overlong, impossible ids, nothing to learn
F3 | C | 3 | configuration: unknown key, wrong type, NaN, duplicate job, impossible mesh
F4 | C | 3 | names that would leave the folder or clash; symlinked output
F5 | C | 3 | safetensors: lies in the header, overlaps, holes, overflow, cuts
F6 | C | 3 | PEFT folders: wrong rank, modules, shapes, NaN, alpha 0, rsLoRA, other types
F7 | C | 2 | export, import, export: the same bytes
F8 | C | 2 | no code is executed and nothing is fetched
G1 | G | 2 | GPU out of memory while compiling or in a step
G2 | C,G | 2 | no leak of memory, files, threads or programs over 500 steps
G3 | V | 2 | a collective or loader is stuck
G4 | V | 3 | steps in flight are bounded on eight virtual devices
G5 | C | 2 | a data loader dies, raises or returns too little
G6 | C | 2 | metrics files after kill -9, resume and a broken pipe
G7 | C | 1 | goodput: the parts add up to the wall time
G8 | C | 2 | loss spike: skipped, bounded, then stopped
G9 | C | 3 | wheel, README and examples on a fresh machine
G10 | C | 2 | soak: 2,000 steps, kills, full disk, NaN job, late jobs, a cancel
"""


def _read(line: str) -> Scenario:
    name, places, weight, text = line.split(" | ")
    return Scenario(name, text, tuple(places.split(",")), int(weight))


SCENARIOS = {s.id: s for s in map(_read, _TABLE.strip().splitlines())}
