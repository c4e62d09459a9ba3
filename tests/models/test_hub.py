"""Hub ids, with a cache made by hand and no network."""

import socket

import pytest
from flax import nnx

from lorafusion_jax.config import config_from_dict
from lorafusion_jax.errors import ModelError
from lorafusion_jax.models import load_base
from lorafusion_jax.models.hub import HubId, hub_id, local_model
from tests.models.test_golden_logits import write_model
from tests.tolerance import assert_bit_equal

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of a cache that is the only place the hub's library may look at."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def add_model(cache):
    """Puts a model into the cache as the library lays it out."""
    folder = cache / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return write_model(snapshot, "tied")


def test_a_cached_model_loads_by_its_id(cache):
    snapshot = add_model(cache)
    base = load_base("hf://org/tiny")
    assert (base.name, base.path, base.reference) == ("org/tiny", "hf://org/tiny", "org/tiny")
    local = load_base(snapshot)
    assert local.reference == str(snapshot)
    assert_bit_equal(nnx.state(base.model), nnx.state(local.model))
    assert local_model(f"hf://org/tiny@{COMMIT}") == snapshot


def test_offline_and_not_cached(cache):
    with pytest.raises(ModelError, match=r"hf://org/other: .*cache.*HF_HUB_OFFLINE"):
        load_base("hf://org/other")
    add_model(cache)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        local_model("hf://org/tiny@v2")


def test_nothing_else_is_looked_for_on_the_hub(cache):
    """Opt-in: a name that the cache has, but without hf:// before it, is a path."""
    add_model(cache)
    with pytest.raises(ModelError, match=r"no such model.*hf://ORG/NAME"):
        load_base("org/tiny")
    assert hub_id("org/tiny") is None and hub_id("/data/hf") is None


def test_the_hub_cannot_be_reached(cache, monkeypatch):
    """Online by its settings, in a place without a network."""

    def no_network(*args, **kwargs):
        raise socket.gaierror("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"hf://org/other: .*cannot be reached"):
        local_model("hf://org/other")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hf://org/name", HubId("org/name", None)),
        ("hf://org/name-1.5B@refs/pr/1", HubId("org/name-1.5B", "refs/pr/1")),
    ],
)
def test_ids(text, expected):
    assert hub_id(text) == expected


@pytest.mark.parametrize(
    "text", ["hf://name", "hf://", "hf://a/b/c", "hf://../x", "hf://a/b@", "hf://a/..@x y"]
)
def test_what_is_no_id_is_refused(text):
    with pytest.raises(ModelError, match="expected hf://ORGANISATION/NAME"):
        hub_id(text)


def test_a_configuration_keeps_the_id(tmp_path):
    raw = {
        "base": {"model": "hf://org/tiny@v1"},
        "output": "run",
        "jobs": [{"name": "a", "data": {"path": "a.jsonl"}}],
    }
    config = config_from_dict(raw, folder=tmp_path)
    assert config.base.model == "hf://org/tiny@v1" and config.output == str(tmp_path / "run")
