"""Checks of what was exported: reload it, and compare its logits with another way to the same."""

from pathlib import Path
from typing import TYPE_CHECKING

from lorafusion_jax.cli.view import print_table
from lorafusion_jax.errors import AdapterError

if TYPE_CHECKING:
    from lorafusion_jax.lora.peft_io import LoadedAdapter
    from lorafusion_jax.models import Base

# Largest difference of logits, as a share of the largest logit, that float32 sums in another order
# explain; a wrong scale, target or transposition is far beyond it.
_TOLERANCE = 1e-3
# The same where merged weights were rounded to 16 bits.
_ROUNDED_TOLERANCE = 5e-2
_PROBE_TOKENS = 64


def check_adapters(model: str, paths: dict[str, Path]) -> None:
    """Reloads adapters, compares their logits with merged weights, and prints the differences.

    Raises:
        AdapterError: a folder does not fit the model, or computes something else than a merge of
            its weights.
    """
    from lorafusion_jax.cli.session import start_jax
    from lorafusion_jax.lora.peft_io import load_peft
    from lorafusion_jax.models import load_base

    start_jax()
    base = load_base(model, "float32")
    rows = []
    for name, path in paths.items():
        difference, moved = compare_with_merge(base, load_peft(path, base.model))
        rows.append((name, f"{difference:.1e}", f"{moved:.1e}"))
        if not difference <= _TOLERANCE:
            raise AdapterError(
                f"{path}: its logits differ from a manual merge by {difference:.1e} of the "
                f"largest one, expected at most {_TOLERANCE:.0e}"
            )
    print()
    print_table(("verified", "differs from a merge by", "differs from the base by"), rows)


def compare_with_merge(base: "Base", loaded: "LoadedAdapter") -> tuple[float, float]:
    """Compares an adapter's logits with those of merged weights, and with the base's.

    Args:
        base: the base model in float32.
        loaded: the adapter.

    Returns:
        Largest difference to the merged model and to the base, as shares of the largest logit.
    """
    import jax.numpy as jnp

    from lorafusion_jax.lora.bank import attach_adapters, multi_linears, put_slot

    tokens = _probe(base)
    adapter, spec = loaded.adapter, loaded.spec
    linears = multi_linears(base.model)
    largest = spec.max_rank(adapter)
    bank = put_slot(attach_adapters(base.model, list(adapter), 1, largest), 0, spec, adapter)
    plain, adapted = _logits(base, bank, tokens, -1), _logits(base, bank, tokens, 0)
    kernels = {path: linears[path].kernel[...] for path in adapter}
    for path, (a, b) in adapter.items():
        linears[path].kernel[...] = kernels[path] + spec.scale_of(path) * jnp.asarray(
            a
        ).T @ jnp.asarray(b)
    merged = _logits(base, bank, tokens, -1)
    for path, kernel in kernels.items():
        linears[path].kernel[...] = kernel
    largest = jnp.abs(merged).max()
    return float(jnp.abs(adapted - merged).max() / largest), float(
        jnp.abs(adapted - plain).max() / largest
    )


def check_merged(model: str, paths: dict[str, Path], adapters: "dict[str, LoadedAdapter]") -> None:
    """Reloads merged models, compares their logits with base and adapter, prints the differences.

    Raises:
        AdapterError: a merged model computes something else.
    """
    import jax.numpy as jnp

    from lorafusion_jax.cli.session import start_jax
    from lorafusion_jax.lora.bank import attach_adapters, put_slot
    from lorafusion_jax.models import load_base
    from lorafusion_jax.models.hf_weights import read_tensors

    start_jax()
    base = load_base(model, "float32")
    tokens = _probe(base)
    rows = []
    for name, path in paths.items():
        adapter, spec = adapters[name].adapter, adapters[name].spec
        bank = attach_adapters(base.model, list(adapter), 1, spec.max_rank(adapter))
        expected = _logits(base, put_slot(bank, 0, spec, adapter), tokens, 0)
        attach_adapters(base.model, (), 0, 1)
        merged = load_base(path, "float32")
        difference = float(jnp.abs(_plain_logits(merged, tokens) - expected).max())
        difference /= float(jnp.abs(expected).max())
        stored = min(t.dtype.itemsize for t in read_tensors(path).values())
        allowed = _TOLERANCE if stored == 4 else _ROUNDED_TOLERANCE
        rows.append((name, f"{difference:.1e}", f"{allowed:.0e}"))
        if not difference <= allowed:
            raise AdapterError(
                f"{path}: its logits differ from base and adapter by {difference:.1e} of the "
                f"largest one, expected at most {allowed:.0e}"
            )
    print()
    print_table(("verified", "differs from base and adapter by", "allowed"), rows)


def _probe(base: "Base"):
    import jax.numpy as jnp

    return jnp.arange(_PROBE_TOKENS, dtype=jnp.int32) * 7 % base.config.vocab_size


def _plain_logits(base: "Base", tokens):
    """The logits of one sample by the base alone."""
    import jax.numpy as jnp

    from lorafusion_jax.models import Segments

    count = tokens.shape[0]
    segments = Segments(jnp.zeros(count, jnp.int32), jnp.asarray([0, count], jnp.int32))
    hidden = base.model(tokens, jnp.arange(count, dtype=jnp.int32), segments)
    return base.model.logits(hidden)


def _logits(base: "Base", bank, tokens, slot: int):
    """Returns the logits of one sample with the adapter in a slot, -1 for none."""
    import jax.numpy as jnp

    from lorafusion_jax.lora.bank import lora_context, merge_adapters, split_adapters
    from lorafusion_jax.models import Decoder, Segments

    count = tokens.shape[0]
    segments = Segments(jnp.zeros(count, jnp.int32), jnp.asarray([0, count], jnp.int32))
    # Any row key but 0, which marks padding.
    lora = lora_context(
        bank, jnp.asarray([slot], jnp.int32), jnp.ones(count, jnp.uint32), train=False
    )
    model = merge_adapters(*split_adapters(base.model), bank)
    assert isinstance(model, Decoder)
    return model.logits(model(tokens, jnp.arange(count, dtype=jnp.int32), segments, lora))
