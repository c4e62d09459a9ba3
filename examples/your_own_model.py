"""LoRA in your own Flax NNX model and your own training loop.

python examples/your_own_model.py [--steps N] [--output DIRECTORY]
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.lora import get_adapter, load_peft, save_peft, set_adapter


class Classifier(nnx.Module):
    """Any model of yours: it knows nothing of LoRA."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)])
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        return self.head(x)


def loss_of(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, x, y):
    """One step on the adapter's parameters, and on no others."""
    adapter = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(loss_of, argnums=adapter)(model, x, y)
    optimizer.update(model, gradients)
    return loss


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns the loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default=None, help="where to save the adapter")
    args = parser.parse_args(argv)
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.argmax(x[:, :3] * x[:, 3:6], axis=1)

    model = Classifier(nnx.Rngs(0))
    spec = lf.LoraSpec(r=4, alpha=8, dropout=0.1, exclude_modules=("head",))
    paths = lf.loraize(model, spec)  # in place; the outputs are unchanged so far
    print("adapted:", ", ".join(paths))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)

    model.eval()  # dropout off
    before = float(loss_of(model, x, y))
    model.train()
    for _ in range(args.steps):
        train_step(model, optimizer, x, y)
    model.eval()
    after = float(loss_of(model, x, y))
    print(f"loss {before:.3f} before, {after:.3f} after {args.steps} steps")

    if args.output is not None:
        save_peft(args.output, get_adapter(model), spec, None)
        again = Classifier(nnx.Rngs(0))
        lf.loraize(again, spec)
        set_adapter(again, load_peft(args.output).adapter)
        again.eval()
        assert float(loss_of(again, x, y)) == after
        print(f"saved to {args.output}; loaded again, it computes the same")
    return before, after


if __name__ == "__main__":
    main()
