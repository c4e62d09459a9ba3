"""Checks a PEFT folder with PEFT itself; needs torch, transformers and peft only.

    python check_peft.py ADAPTER BASE [--expect LOGITS.json] [--resave FOLDER]

Loads the adapter on the Hugging Face directory BASE with every warning an error, compares its
logits with those of a merge by hand and, if given, with {"tokens": [...], "logits": [[...]]} of
another implementation; and saves it again with PEFT. Prints one line of JSON with the largest
differences; leaves with 1 if one is too large.
"""

import argparse
import json
import warnings
from pathlib import Path

import peft
import safetensors.torch
import torch
from peft_curve import load_base  # beside this script


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens])).logits[0].double()


def merge_by_hand(merged, adapter):
    """Makes every targeted W a W + scale * B A from the files alone, without PEFT."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = merged.get_submodule(path).weight
        alpha = next((v for k, v in config["alpha_pattern"].items() if k in path), None)
        r = a.shape[0]
        scale = (alpha or config["lora_alpha"]) / (r**0.5 if config["use_rslora"] else r)
        delta = scale * (b.to(weight.dtype) @ a.to(weight.dtype))
        weight.data += delta
    return merged


def load_strictly(base, adapter):
    """Loads the adapter onto the base, in place, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 2026-11: PEFT 0.21 asks transformers 5.23 for a property that it renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = peft.PeftModel.from_pretrained(base, adapter)
    return model.to(base.dtype).eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--expect", type=Path)
    parser.add_argument("--resave", type=Path)
    args = parser.parse_args()
    expected = json.loads(args.expect.read_text()) if args.expect else None
    tokens = expected["tokens"] if expected else list(range(3, 23))

    model = load_strictly(load_base(args.base, torch.float32), args.adapter)
    truth = logits_of(load_strictly(load_base(args.base, torch.float64), args.adapter), tokens)
    base = load_base(args.base, torch.float64)
    before = logits_of(base, tokens)
    merged = logits_of(merge_by_hand(base, args.adapter), tokens)
    figures = {
        "adapter_effect": (truth - before).abs().max().item(),
        "merge_error": (truth - merged).abs().max().item(),
        "peft_float32_error": (truth - logits_of(model, tokens)).abs().max().item(),
    }
    ok = figures["adapter_effect"] > 1e-3 and figures["merge_error"] < 1e-9
    if expected:
        ours = torch.tensor(expected["logits"], dtype=torch.float64)
        figures["our_error"] = (truth - ours).abs().max().item()
        ok = ok and figures["our_error"] <= 2 * figures["peft_float32_error"]
    if args.resave:
        model.save_pretrained(args.resave)
    print(json.dumps({"ok": ok, **figures}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
