"""Makes family_logits.npz: what transformers computes for the models of tiny_families.py.

Per model: the truth in float64, and the results in float32 and bfloat16 (as the upper halves of
float32). Run as `python -m tests.golden.make_family_logits` where torch and transformers are
installed; the committed file is from the versions in its `versions` entry.
"""

import contextlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

from tests.golden import tiny_families

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def nothing_narrowed():
    """Keeps float64 where transformers computes in float32 whatever the model's dtype."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def wide_to(self, *args, **kwargs):
        narrowing = self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return self if narrowing else to(self, *args, **kwargs)

    def wide_float(self):
        return self if self.dtype == torch.float64 else single(self)

    def wide_softmax(x, dim=None, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with (
        mock.patch.object(torch.Tensor, "to", wide_to),
        mock.patch.object(torch.Tensor, "float", wide_float),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


def logits(name: str, dtype: torch.dtype) -> list[np.ndarray]:
    values = dict(tiny_families.CONFIGS[name])
    config = transformers.AutoConfig.for_model(**values, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    tensors = {key: torch.from_numpy(value) for key, value in tiny_families.weights(name).items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    with torch.no_grad(), nothing_narrowed():
        return [
            model(torch.from_numpy(tokens)[None].long()).logits[0].to(torch.float64).numpy()
            for tokens in tiny_families.samples(name)
        ]


def main() -> None:
    arrays = {"versions": np.array([torch.__version__, transformers.__version__])}
    for name in tiny_families.CONFIGS:
        for label, dtype in _DTYPES.items():
            rows = np.concatenate(logits(name, dtype))
            if label != "float64":
                rows = rows.astype(np.float32)
            if label == "bfloat16":
                rows = (rows.view(np.uint32) >> 16).astype(np.uint16)
            arrays[f"{name}.{label}"] = rows
        print(name, np.abs(arrays[f"{name}.float64"]).max())
    np.savez_compressed(Path(__file__).with_name("family_logits.npz"), **arrays)


if __name__ == "__main__":
    main()
