"""Lets `python -m lorafusion_jax.cli` run the command."""

import sys

from lorafusion_jax.cli import main

sys.exit(main())
