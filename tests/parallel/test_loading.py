"""The base model is read stage by stage: whole on no device, and on the host neither."""

import weakref
from collections import defaultdict
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models import load_base, open_base, random_base
from lorafusion_jax.models.weights import LazyTensor, tensor_name
from lorafusion_jax.parallel.layout import Layout, even_layout
from lorafusion_jax.parallel.loading import InFiles, place_base
from lorafusion_jax.parallel.mesh import make_mesh
from lorafusion_jax.parallel.weights import Frozen
from lorafusion_jax.train.resume import _fingerprint_by_columns, base_fingerprint
from tests.golden import tiny_llama
from tests.models.test_golden_logits import write_model
from tests.parallel.mix import CONFIG
from tests.tolerance import assert_bit_equal

UNTIED = replace(CONFIG, num_hidden_layers=8, vocab_size=331, tie_word_embeddings=False)
MESHES = [(1, 4), (2, 2), *(pytest.param(*m, marks=pytest.mark.slow) for m in ((1, 8), (8, 1)))]


class Ledger:
    """Instrumented tensors: counts what of them is alive on the host, and on each device."""

    def __init__(self, base):
        self.alive = self.most = self.read = 0
        self.most_on_device = defaultdict(int)
        self._before = list(jax.live_arrays())  # kept, so that nothing new gets their ids
        tensors = {name: self._watched(t) for name, t in base.tensors.items()}
        self.largest = max(t.read().nbytes for t in base.tensors.values())
        self.total = sum(t.read().nbytes for t in base.tensors.values())
        self.base = replace(base, unread=tensors)

    def _watched(self, tensor: LazyTensor) -> LazyTensor:
        return replace(
            tensor,
            read=lambda: self._note(tensor.read()),
            read_rows=lambda start, stop: self._note(tensor.rows(start, stop)),
        )

    def _note(self, array: np.ndarray) -> np.ndarray:
        array = np.array(array)  # the file's own buffer may be shared
        self.alive += array.nbytes
        self.read += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._forget, array.nbytes)
        self.look_at_devices()
        return array

    def _forget(self, size: int) -> None:
        self.alive -= size

    def look_at_devices(self) -> None:
        """Takes note of what lies on each device now, beside what lay there before."""
        before, buffers = {id(array) for array in self._before}, defaultdict(dict)
        for array in jax.live_arrays():
            if id(array) not in before:
                for shard in array.addressable_shards:  # a shard is an array too: one buffer
                    data = shard.data
                    buffers[shard.device][data.unsafe_buffer_pointer()] = data.nbytes
        for device, found in buffers.items():
            held = sum(found.values())
            self.most_on_device[device] = max(self.most_on_device[device], held)


def random_files(tmp_path, config=UNTIED):
    """A random model's tensors, as they come from files."""
    loaded = random_base(config, 3)
    path = tmp_path / "model.safetensors"
    save_file({name: np.ascontiguousarray(t.read()) for name, t in loaded.tensors.items()}, path)
    from lorafusion_jax.models.hf_weights import read_tensors

    return loaded, replace(loaded, unread=read_tensors(tmp_path))


def bytes_by_device(frozen: Frozen) -> dict:
    found = defaultdict(int)
    for leaf in jax.tree.leaves(frozen):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    return dict(found)


def check_shares(ledger: Ledger, frozen: Frozen, stages: int) -> None:
    """Each device holds its stage's share and at no time much more; the host holds a tensor."""
    share = ledger.total / stages
    bound = 1.02 * share + ledger.largest / stages  # norms are on all, the vocabulary is filled up
    for device, size in bytes_by_device(frozen).items():
        assert size <= bound, f"{device} holds {size} bytes, a stage's share is {share:.0f}"
    for device, size in ledger.most_on_device.items():
        # The tensor that arrives, and what it becomes.
        assert size <= bound + 2 * ledger.largest, f"{device} held {size} bytes at a time"
    # The transfer's thread may let go of the tensor before a moment later.
    assert ledger.most <= 2 * ledger.largest, f"{ledger.most} bytes were on the host at a time"
    assert ledger.read <= ledger.total, "something was read twice"


@pytest.mark.parametrize(("data", "stage"), MESHES)
def test_each_stage_reads_its_own_weights(data, stage, tmp_path):
    loaded, opened = random_files(tmp_path)
    mesh, layout = make_mesh(data, stage, num_layers=8), even_layout(8, stage)
    ledger = Ledger(opened)
    frozen = place_base(ledger.base, layout, mesh)
    ledger.look_at_devices()
    check_shares(ledger, frozen, stage)
    assert_bit_equal(frozen, place_base(loaded, layout, mesh))


def test_a_model_that_was_whole_anywhere_is_caught(tmp_path):
    """The twin: loading it on one device first, or keeping what was read, does not pass."""
    _, opened = random_files(tmp_path)
    mesh, layout = make_mesh(1, 4, num_layers=8), even_layout(8, 4)

    def refused(change) -> str:
        ledger = Ledger(opened)
        frozen, kept = change(ledger)
        ledger.look_at_devices()
        with pytest.raises(AssertionError) as error:
            check_shares(ledger, frozen, 4)
        del kept
        return str(error.value)

    def whole_on_the_first_device(ledger):
        first = InFiles(ledger.base.unread, opened.dtype)
        paths = [
            ".".join(map(str, path))
            for path, _ in _flat(opened.model)
            if tensor_name(path)[0] in ledger.base.unread
        ]
        kept = [first.whole(path, jax.devices()[:1]) for path in paths]
        return place_base(opened, layout, mesh), kept

    def whole_on_the_host(ledger):
        kept = {name: tensor.read() for name, tensor in ledger.base.unread.items()}
        return place_base(opened, layout, mesh), kept

    def all_on_one_stage(ledger):
        one = make_mesh(1, 1, num_layers=8)
        return place_base(ledger.base, even_layout(8, 1), one), None

    assert "at a time" in refused(whole_on_the_first_device)
    assert "on the host" in refused(whole_on_the_host)
    assert "a stage's share" in refused(all_on_one_stage)


def _flat(model):
    from flax import nnx

    return nnx.to_flat_state(nnx.state(model))


def test_uneven_stages_and_a_share_of_filling(tmp_path):
    """Empty places are zeros; 5 rows over 4 stages leave the last one none."""
    config = replace(CONFIG, num_hidden_layers=5, vocab_size=5)
    loaded, opened = random_files(tmp_path, config)
    mesh, layout = make_mesh(1, 4, num_layers=5), Layout((2, 1, 1, 1))
    frozen = place_base(opened, layout, mesh)
    assert_bit_equal(frozen, place_base(loaded, layout, mesh))
    table = np.asarray(frozen.embedding)
    assert table.shape[0] == 8 and not table[5:].any() and table[:5].any()
    places = np.split(np.asarray(frozen.layers[1]["mlp.up_proj.kernel"]), 4)
    assert [bool(part.any()) for part in places] == [True, False, False, False]


@pytest.mark.parametrize("name", ["tied", "untied_odd"])
def test_an_opened_model_is_the_loaded_one(name, tmp_path):
    directory = write_model(tmp_path, name)
    opened, loaded = open_base(directory, "bfloat16"), load_base(directory, "bfloat16")
    assert (opened.name, opened.path, opened.dtype) == (loaded.name, loaded.path, loaded.dtype)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(_state(opened)))
    for fingerprint in (base_fingerprint, _fingerprint_by_columns):
        assert fingerprint(opened) == fingerprint(loaded)
        assert fingerprint(opened) != fingerprint(open_base(directory, "float32"))
    mesh, layers = make_mesh(1, 2, num_layers=2), even_layout(2, 2)
    assert_bit_equal(*(place_base(base, layers, mesh) for base in (opened, loaded)))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_gguf_file_is_read_by_stages_too(quantized, tmp_path):
    pytest.importorskip("gguf")
    from tests.models.test_gguf import write_gguf

    path = write_gguf(tmp_path / "model.gguf", "tied", quantized=quantized)
    loaded = load_base(path)
    ledger = Ledger(open_base(path))
    mesh, layers = make_mesh(1, 2, num_layers=2), even_layout(2, 2)
    frozen = place_base(ledger.base, layers, mesh)
    check_shares(ledger, frozen, 2)
    assert_bit_equal(frozen, place_base(loaded, layers, mesh))


def _state(base):
    from flax import nnx

    return nnx.state(base.model)


def test_an_opened_model_is_checked(tmp_path):
    directory = write_model(tmp_path, "tied")
    tensors = tiny_llama.weights("tied")
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, directory / "model.safetensors")
    with pytest.raises(ModelError, match="ties the output head"):
        open_base(directory)
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing: model\.norm\.weight"):
        open_base(directory)
