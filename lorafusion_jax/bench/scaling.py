"""`lorafusion bench pipeline` for large meshes: 70B dimensions on 4 or 8 devices.

    lorafusion bench scaling --stages 4 --adapters 4,8 --gbs 16
    lorafusion bench scaling --predict

With `--predict` nothing is trained: the simulator says what to expect on up to 512 GPUs, with
stated assumptions.
"""

from lorafusion_jax.bench import pipeline


def main(arguments: list[str] | None = None) -> int:
    """Runs `lorafusion bench scaling`."""
    parser = pipeline.parser("lorafusion bench scaling", 4, "70b")
    parser.add_argument("--predict", action="store_true", help="simulate instead of training")
    # What is predicted to be fastest for 70B on four GPUs of 80 GB.
    parser.set_defaults(gbs=16, capacity=4096)
    given = parser.parse_args(arguments)
    if given.predict:
        from lorafusion_jax.bench.scaling_predict import predict

        return predict(given.out)
    return pipeline.run("scaling", given)
