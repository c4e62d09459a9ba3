"""Train an adapter, export it for PEFT, and read it back.

python examples/export_to_peft.py OUTPUT [--model DIRECTORY] [--steps N]
"""

import argparse
import json
import tempfile
from pathlib import Path

from tiny_base import load_or_make

import lorafusion_jax as lf
from lorafusion_jax.lora import load_peft, save_peft

ROWS = [
    {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))}
    for n in range(1, 9)
]


def main(argv: list[str] | None = None) -> Path:
    """Returns the PEFT folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="the PEFT folder to write")
    parser.add_argument("--model", help="Hugging Face directory or .gguf file")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)

    base = load_or_make(args.model)
    trainer = lf.MultiTrainer(base, output=tempfile.mkdtemp(), tokens_per_microbatch=256)
    trainer.add_job(
        "count",
        ROWS,
        lora=lf.LoraConfig(r=8, alpha=16),
        optim=lf.AdamW(lr=1e-2),
        train=lf.TrainConfig(max_steps=args.steps, global_batch_size=4),
        eval=lf.EvalConfig(split=0),
    )
    folder = trainer.fit()["count"].adapter.save_peft(args.output)

    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size} bytes")
    config = json.loads((folder / "adapter_config.json").read_text())
    print("target_modules", config["target_modules"])

    # Read strictly, checked against the model, and written again: the same bytes.
    loaded = load_peft(folder, base.model)
    copy = save_peft(
        Path(tempfile.mkdtemp()) / "copy",
        loaded.adapter,
        loaded.spec,
        loaded.base_model_name_or_path,
    )
    for path in folder.iterdir():
        assert path.read_bytes() == (copy / path.name).read_bytes()
    print("read back and written again: byte for byte the same")
    print(f"with PEFT:  PeftModel.from_pretrained(base_model, {str(folder)!r})")
    return folder


if __name__ == "__main__":
    main()
