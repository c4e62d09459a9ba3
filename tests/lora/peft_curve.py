"""The loss curves of `curve.py` by torch and PEFT, one adapter at a time.

Needs torch, transformers and peft only (any Python they run on):

    python peft_curve.py PREPARED OUTPUT.json
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers


def load_base(path, dtype):
    """The base model, computing in `dtype` throughout but for the rotary table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # which would go through float32
            module.forward = norm_in_own_dtype.__get__(module)
    return model.eval()


def norm_in_own_dtype(self, x):
    """RMSNorm without a detour through float32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def learning_rates(optimizer, optim, steps):
    """transformers' schedule of the same name."""
    if optim["schedule"] == "constant":
        return transformers.get_constant_schedule(optimizer)
    assert optim["schedule"] == "cosine"
    return transformers.get_cosine_schedule_with_warmup(optimizer, optim["warmup_steps"], steps)


def batch_loss(model, batch):
    """Mean cross-entropy over the supervised tokens of a global batch, sample by sample."""
    total, count = 0.0, 0
    for tokens, supervised in batch:
        ids = torch.tensor([tokens])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses = -log_probs.gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(supervised[1:])
        total, count = total + losses[mask].sum(), count + int(mask.sum())
    return total / count


def curve(prepared, name, dtype):
    """Trains one adapter; returns the loss of every step."""
    recipe = json.loads((prepared / name / "recipe.json").read_text())
    optim = recipe["optim"]
    base = load_base(prepared / "base", dtype)
    model = peft.PeftModel.from_pretrained(base, prepared / name / "adapter", is_trainable=True)
    model = model.to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, optim["lr"], optim["betas"], optim["eps"], optim["weight_decay"]
    )
    schedule = learning_rates(optimizer, optim, len(recipe["batches"]))
    losses = []
    for batch in recipe["batches"]:
        optimizer.zero_grad()
        loss = batch_loss(model, batch)
        loss.backward()
        if optim["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(params, optim["max_grad_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main():
    prepared, output = Path(sys.argv[1]), Path(sys.argv[2])
    names = sorted(path.parent.name for path in prepared.glob("*/recipe.json"))
    result = {
        "made_by": "tests/lora/peft_curve.py",
        "inputs": (prepared / "inputs.sha256").read_text(),
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers, peft)},
        "losses": {
            name: {
                "float32": curve(prepared, name, torch.float32),
                "float64": curve(prepared, name, torch.float64),
            }
            for name in names
        },
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
