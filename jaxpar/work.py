"""What a running step does, as far as it is known: its tokens, and its part of the chips' peak; changes with chips."""

import math
from typing import Any, NamedTuple

import jax

from jaxpar.step import Step
from jaxpar.tokens import count_tokens

# Dense products in bfloat16 without sparsity, operations a second, from NVIDIA's data sheet of each board; TPUs
# stand with all that prices them.
_GPU_PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Work(NamedTuple):
    """What one step does.

    Attributes:
      count: tokens of the global batch, or rows.
      unit: `tokens` or `rows`.
      peak_seconds: how long the model's operations take all chips at their peak: over the measured seconds it is the
        model FLOPs utilisation. None where the chip isn't known.
    """

    count: int
    unit: str
    peak_seconds: float | None = None


class Meter:
    """Tells the `Work` of a step's calls; what is the same for all batches of one shape is found once.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> step = jaxpar.make_train_step(lambda model, batch, rng: (batch["x"].mean(), {}), strategy)
    >>> Meter(step).measure(None, strategy.shard_batch({"x": jax.numpy.ones((16, 3))}))
    Work(count=16, unit='rows', peak_seconds=None)
    """

    def __init__(self, train_step: Step):
        self._step = train_step
        self._peak = peak_flops(train_step.strategy.mesh.devices.flat)
        self._found: dict[Any, Work] = {}

    def measure(self, state: Any, batch: Any) -> Work:
        """Returns what the step does with a batch that lies on the devices."""
        key = tuple([leaf.shape for leaf in jax.tree.leaves(batch)])
        if key not in self._found:
            engine = self._step.strategy.engine
            count, unit = count_tokens(batch, engine.example_dims)
            self._found[key] = Work(count, unit, self._peak and _model_flops(self._step, state, batch) / self._peak)
        return self._found[key]


def peak_flops(devices: Any) -> float | None:
    """Returns what the devices together can do in a second, matrix products in bfloat16; None if one isn't known."""
    kinds = [device.device_kind for device in devices]
    if all(kind in _GPU_PEAK_FLOPS for kind in kinds):
        return math.fsum(_GPU_PEAK_FLOPS[kind] for kind in kinds)
    if not all(kind.startswith("TPU") for kind in kinds):
        # The table takes a while to load.
        return None
    from jaxpar.estimation.chips import chip_of, read_figures

    chips = [chip_of(kind) for kind in kinds]
    return None if None in chips else math.fsum(read_figures()[chip]["peak_flops"].value for chip in chips if chip)


def _model_flops(step: Step, state: Any, batch: Any) -> int:
    from jaxpar.inspection.flops import count_products

    jaxpr = step.strategy.engine.trace(step.fn, state, batch)
    return sum(product.model_flops for product in count_products(jaxpr))
