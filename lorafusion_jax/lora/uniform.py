"""One rank and one scale for an adapter of patterns, for servers that know no patterns.

vLLM reads `r` and `lora_alpha` of adapter_config.json, and ignores `rank_pattern` and
`alpha_pattern`: a patterned adapter would be served with wrong scales and no warning. Rows of zeros
and a factor in B say the same without patterns.
"""

from collections import Counter
from dataclasses import replace

import numpy as np

from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.targets import LoraSpec


def uniform_adapter(adapter: Adapter, spec: LoraSpec) -> tuple[Adapter, LoraSpec]:
    """Returns the same adapter without patterns.

    A and B are padded with zeros to the largest rank, and what a module's scale differs from the
    common one goes into its B. Nothing is rounded where the quotient of the scales is a power of
    two; elsewhere B is rounded once more to float32.

    Args:
        adapter: (A [r, in], B [r, out]) by module path, each of its own rank.
        spec: its patterns.

    Returns:
        The adapter, all of one rank, and its description.
    """
    scales = {path: spec.scale_of(path) for path in adapter}
    rank, common = spec.max_rank(adapter), Counter(scales.values()).most_common(1)[0][0]
    alpha = common * rank
    if alpha != int(alpha):  # some readers take alpha for a whole number
        common, alpha = 1.0, rank
    targets = spec.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = tuple(adapter)  # nor do all know expressions

    def padded(rows) -> np.ndarray:
        return np.pad(np.asarray(rows, np.float32), [(0, rank - rows.shape[0]), (0, 0)])

    same = {}
    for path, (a, b) in adapter.items():
        folded = np.asarray(b, np.float64) * (scales[path] / common)
        same[path] = padded(a), padded(folded.astype(np.float32))
    return same, replace(
        spec,
        r=rank,
        alpha=int(alpha),
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=targets,
    )
