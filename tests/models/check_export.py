"""Checks exported folders with PEFT and transformers; needs torch, transformers and peft only.

    python -m tests.models.check_export BASE GIVEN --adapter A [--uniform U] [--merged M]

GIVEN is a .npz of another implementation: `tokens` [T], `logits` [T, V] of the adapter on the base,
and the gradient of the mean loss of predicting each next token, by PEFT's names of parameters. A,
and U as another form of it, must load in PEFT with warnings as errors, and M in transformers.
Prints one line of JSON: the largest differences to A's logits and gradients in float64, and what
PEFT itself errs in float32.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from tests.golden.make_family_logits import nothing_narrowed


@torch.no_grad()
def logits_of(model, tokens) -> torch.Tensor:
    with nothing_narrowed():
        return model(torch.tensor([tokens])).logits[0].double()


def load(folder: Path, dtype: torch.dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def gradient_of(model, tokens) -> dict[str, torch.Tensor]:
    """Gradients of the adapter, without dropout."""
    with nothing_narrowed():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])).backward()
    return {
        name.replace(".default", ""): parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapted(base: Path, adapter: Path, dtype: torch.dtype):
    model = load(base, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 2026-11: PEFT 0.21 asks transformers 5.23 for a property that it renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("given", type=Path)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--uniform", type=Path)
    parser.add_argument("--merged", type=Path)
    args = parser.parse_args()
    given = dict(np.load(args.given))
    tokens, ours = given.pop("tokens").tolist(), torch.from_numpy(given.pop("logits")).double()

    def error(logits: torch.Tensor) -> float:
        return (truth - logits).abs().max().item()

    def gradient_error(gradient) -> float:
        assert gradient.keys() == slope.keys(), sorted(gradient.keys() ^ slope.keys())[:3]
        return max((gradient[name] - slope[name]).abs().max().item() for name in slope)

    wide, narrow = (adapted(args.base, args.adapter, d) for d in (torch.float64, torch.float32))
    truth, slope = logits_of(wide, tokens), gradient_of(wide, tokens)
    figures = {
        "largest_logit": truth.abs().max().item(),
        "adapter_effect": error(logits_of(load(args.base, torch.float64), tokens)),
        "our_float32_error": error(ours),
        "peft_float32_error": error(logits_of(narrow, tokens)),
        "largest_gradient": max(value.abs().max().item() for value in slope.values()),
        "our_gradient_error": gradient_error(
            {name: torch.from_numpy(value).double() for name, value in given.items()}
        ),
        "peft_gradient_error": gradient_error(gradient_of(narrow, tokens)),
    }
    if args.uniform is not None:
        uniform = adapted(args.base, args.uniform, torch.float64)
        figures["uniform_error"] = error(logits_of(uniform, tokens))
    if args.merged is not None:
        figures["merged_error"] = error(logits_of(load(args.merged, torch.float64), tokens))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
