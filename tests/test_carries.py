"""What scans carry: constrained where it enters, with no value changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.carries import split_carries

ROWS = 4


def scan_twice(x, w):
    """Returns what two scans give, which carry arrays of one shape, one of them in what is jitted."""
    run = lambda x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w)
    first, sums = run(x)
    second, _ = jax.jit(run)(2 * x)
    return first - 3 * second, sums


WAYS = {
    "bare": scan_twice,
    "rematerialised": jax.checkpoint(scan_twice),
    "jitted": jax.jit(scan_twice),
    "a row at a time": jax.vmap(lambda x, w: scan_twice(x[None], w), in_axes=(0, None)),
}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_stay_as_they_are(way):
    # As many layers as rows, to be told apart.
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(ROWS, 3)), rng.normal(size=(ROWS, 3, 3))
    seen = []

    def split(x, w):
        return split_carries(
            lambda: WAYS[way](x, w), ROWS, lambda x: seen.append(x.shape) or jax.lax.optimization_barrier(x)
        )()

    for fn in (lambda fn: fn, lambda fn: jax.grad(lambda *args: fn(*args)[0].sum(), argnums=(0, 1))):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(fn(WAYS[way]))(x, w), jax.jit(fn(split))(x, w))
    assert len(seen) == 4
    assert {shape[0] for shape in seen} == {ROWS}
    assert (ROWS, 3, 3) not in seen


def test_what_enters_in_slices_or_has_no_rows_is_left():
    seen = []
    scan = lambda: jax.lax.scan(lambda x, w: (x + w, None), jnp.zeros(3), jnp.ones((ROWS, 3)))[0]
    split_carries(scan, ROWS, lambda x: seen.append(x) or x)()
    assert seen == []


def test_a_reference_that_a_scan_closes_over_is_left():
    def count():
        seen = jax.new_ref(jnp.zeros((ROWS, 3)))

        def body(x, w):
            seen[...] += x
            return x * w, None

        return jax.lax.scan(body, jnp.ones((ROWS, 3)), jnp.arange(1.0, 4))[0] + seen[...]

    np.testing.assert_array_equal(split_carries(count, ROWS, jax.lax.optimization_barrier)(), count())
