"""Makes logits.npz: what transformers computes for the models of tiny_llama.py.

Per model and sample: the truth in float64, and the results in float32 and bfloat16. Run as
`python tests/golden/make_logits.py` where torch and transformers are installed; the committed file
is from the versions in its `versions` entry.
"""

from pathlib import Path

import numpy as np
import tiny_llama
import torch
import transformers

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def logits(name: str, dtype: torch.dtype) -> list[np.ndarray]:
    config = transformers.LlamaConfig(**tiny_llama.CONFIGS[name], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).to(dtype)
    tensors = {key: torch.from_numpy(value) for key, value in tiny_llama.weights(name).items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    with torch.no_grad():
        return [
            model(torch.from_numpy(tokens)[None].long()).logits[0].to(torch.float64).numpy()
            for tokens in tiny_llama.samples(name)
        ]


def main() -> None:
    arrays = {"versions": np.array([torch.__version__, transformers.__version__])}
    for name in tiny_llama.CONFIGS:
        for label, dtype in _DTYPES.items():
            rows = np.concatenate(logits(name, dtype))
            arrays[f"{name}.{label}"] = rows.astype(np.float64 if label == "float64" else "f4")
    np.savez_compressed(Path(__file__).with_name("logits.npz"), **arrays)


if __name__ == "__main__":
    main()
