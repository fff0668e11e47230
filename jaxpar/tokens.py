"""What of a batch is counted when a step's speed is told; changes with what a token is."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def count_tokens(batch: Any, example_dims: int = 1) -> tuple[int, str]:
    """Returns how many tokens a batch holds, or rows, where it holds none, and which of both.

    Tokens are the places of the largest leaf of whole numbers with two dims.

    Args:
      batch: arrays or shapes.
      example_dims: how many leading dims count the examples: as the engine's that placed it.

    >>> count_tokens({"x": jnp.zeros((8, 16), int)}), count_tokens({"x": jnp.zeros((8, 16))})
    ((128, 'tokens'), (8, 'rows'))
    """
    shapes = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)]
    whole = [shape for shape, dtype in shapes if len(shape) == example_dims + 1 and jnp.issubdtype(dtype, jnp.integer)]
    if whole:
        return max(math.prod(shape) for shape in whole), "tokens"
    return max((math.prod(shape[:example_dims]) for shape, _ in shapes if shape), default=1), "rows"
