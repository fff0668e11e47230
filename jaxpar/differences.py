"""How far a step's results are from one device's: each value's difference, and which of them are rounding noise."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpar.state import TrainState, is_key, named_leaves

# The share of the gradient's norm below which a leaf's is rounding noise.
NOISE = 1e-12


class Difference(NamedTuple):
    """How far one value is from one device's after one step."""

    step: int
    what: str
    size: float
    got: Any
    expected: Any


def largest_move(before: TrainState, after: TrainState) -> float:
    """How far a step moved the parameter that it moved furthest."""
    pairs = zip(named_leaves(before.params, "params"), jax.tree.leaves(after.params), strict=True)
    return max(measure_difference(0, path, np.asarray(old), np.asarray(new)).size for (path, old), new in pairs)


def find_differences(step: int, got: tuple[Any, Any], expected: tuple[Any, Any]) -> list[Difference]:
    """How far each metric, parameter and model state is from one device's."""
    values = []
    for metrics, state in (got, expected):
        metrics = {f"metrics/{name}": value for name, value in metrics.items()}
        leaves = [*named_leaves(metrics), *named_leaves(state.params, "params")]
        leaves += [(f"model_state/{path}", leaf) for path, leaf in named_leaves(state.model_state) if not is_key(leaf)]
        values.append(dict([*leaves, ("step", state.step)]))
    ours, theirs = values
    # One device counts skipped steps always, the step only where one can be.
    if "metrics/skipped" not in ours:
        theirs.pop("metrics/skipped")
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise AssertionError(f"The step's metrics and state differ in {odd}; let loss_fn give the same on any mesh.")
    return [measure_difference(step, what, np.asarray(ours[what]), np.asarray(theirs[what])) for what in ours]


def measure_difference(step: int, what: str, got: np.ndarray, expected: np.ndarray) -> Difference:
    """The largest difference of one value: absolute, or relative where the value is above 1."""
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    got, expected = got.astype(wide), expected.astype(wide)
    sizes = np.abs(got - expected) / np.maximum(1, np.abs(expected))
    # NaN is no agreement, not with NaN either: a diverged run shows nothing.
    sizes = np.where(np.isnan(sizes), np.inf, sizes)
    worst = np.unravel_index(np.argmax(sizes), sizes.shape) if sizes.size else ()
    return Difference(
        step, what, *(float(np.abs(sizes[worst])), got[worst], expected[worst]) if sizes.size else (0.0, 0, 0)
    )


def relative_norms(gradients: Any) -> dict[str, float]:
    """Each leaf's share of the global gradient norm."""
    norms = {path: float(np.linalg.norm(np.asarray(leaf).ravel())) for path, leaf in named_leaves(gradients, "params")}
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    # A step without any gradient says nothing of which leaves have none.
    return {path: norm / total if total else 1.0 for path, norm in norms.items()}


def find_noise(norms: list[dict[str, float]]) -> tuple[str, ...]:
    """The parameters whose gradient was rounding noise at every step."""
    return tuple(path for path in norms[0] if all(norm[path] < NOISE for norm in norms))


def with_params(state: TrainState, source: TrainState, paths: tuple[str, ...]) -> TrainState:
    """The state with the parameters of these paths taken from another, laid out as before."""
    if not paths:
        return state
    values = dict(named_leaves(source.params, "params"))
    leaves = [
        jax.device_put(np.asarray(values[path]), leaf.sharding) if path in paths else leaf
        for path, leaf in named_leaves(state.params, "params")
    ]
    return dataclasses.replace(state, params=jax.tree.unflatten(jax.tree.structure(state.params), leaves))
