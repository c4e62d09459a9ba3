"""Times training steps of PEFT under torch.compile, for `lorafusion bench training --baselines`.

    lorafusion bench training --lengths xsum --padded-batches batches.json    # for each mix
    python tests/bench/peft_training.py batches.json peft.json --layers 8
    lorafusion bench training --lengths xsum --layers 8 --baselines peft.json

Needs torch, transformers and peft, and nothing of this repository. One job at a time in batches of
4 samples padded to the longest, a global batch of two, as system (a): a step is timed at several
lengths, and every batch counts what lies between them. Weights are random bfloat16, LoRA too; the
decoder layers and the loss are compiled; no mask keeps attention from its fastest path.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
SAMPLES = 4


def loss_of(weight, hidden, labels):
    """Mean loss of the tokens that have a label."""
    logits = F.linear(hidden[:, :-1], weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Trainer:
    """A model with adapters, compiled layer by layer, and its optimizer."""

    def __init__(self, options, device):
        config = LlamaConfig(
            **SHAPES[options.model],
            num_hidden_layers=options.layers,
            max_position_embeddings=8192,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self.model = LlamaForCausalLM(config)
            lora = LoraConfig(
                r=options.r, lora_alpha=2 * options.r, lora_dropout=options.p,
                target_modules=TARGETS, bias="none",
            )  # fmt: skip
            inject_adapter_in_model(lora, self.model)
        self.model.to(torch.bfloat16).train()
        trained = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            trained += [parameter] if "lora_" in name else []
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
        self.loss = loss_of
        if not options.eager:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(loss_of, dynamic=False)
        self.device, self.vocabulary = device, config.vocab_size

    def batch(self, length):
        """Runs two batches of samples of this length, one global batch, and the update."""
        for _ in range(2):
            tokens = torch.randint(self.vocabulary, (SAMPLES, length), device=self.device)
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            (self.loss(self.model.lm_head.weight, hidden, tokens) / 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, length, repeat):
        """Seconds per batch."""
        for _ in range(2):
            self.batch(length)
        self.wait()
        start = time.perf_counter()
        for _ in range(repeat):
            self.batch(length)
        self.wait()
        return (time.perf_counter() - start) / (2 * repeat)

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def between(length, grid, times):
    """What lies between the two measured lengths around one."""
    if length <= grid[0]:
        return times[0]
    for i in range(1, len(grid)):
        if length <= grid[i]:
            share = (length - grid[i - 1]) / (grid[i] - grid[i - 1])
            return times[i - 1] + share * (times[i] - times[i - 1])
    return times[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("batches", help="JSON written by --padded-batches")
    parser.add_argument("output", help="JSON rows, for --baselines")
    parser.add_argument("--model", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    with open(options.batches) as file:
        mixes = json.load(file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(options, device)
    grid = sorted({length for mix in mixes.values() for length in mix["grid"]})
    times = []
    for length in grid:
        times.append(trainer.seconds(length, options.repeat))
        print(f"{SAMPLES} x {length:5d}  {1e3 * times[-1]:8.2f} ms", flush=True)
    rows = []
    for name, mix in mixes.items():
        seconds = padded = real = 0
        for lengths in mix["batches"]:
            # Fewer samples than 4 take their share of the time, as in system (a).
            seconds += between(max(lengths), grid, times) * len(lengths) / SAMPLES
            padded += max(lengths) * len(lengths)
            real += sum(lengths)
        row = {"system": "peft" if options.eager else "peft_compile", "lengths": name}
        row |= {"model": options.model, "layers": options.layers, "r": options.r, "p": options.p}
        row |= {"tokens_per_s": real / seconds, "padding": 1 - real / padded}
        if device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        rows.append(row | {"torch": torch.__version__})
        print(f"{name:<8} {row['tokens_per_s']:10,.0f} real tokens/s")
    with open(options.output, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
