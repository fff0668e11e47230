"""jaxpar: write the train step once in plain Flax, and parallelise it by changing one line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpar import rules as rules, testing as testing
    from jaxpar.batch import BatchError as BatchError, pad_batch as pad_batch
    from jaxpar.data_parallel import DriftError as DriftError, data_parallel as data_parallel
    from jaxpar.evaluation import evaluate as evaluate, make_eval_step as make_eval_step
    from jaxpar.layout import Layout as Layout, LayoutRow as LayoutRow
    from jaxpar.loss import LossError as LossError, Weighted as Weighted
    from jaxpar.mesh import AXES as AXES, MeshError as MeshError, fake_devices as fake_devices, make_mesh as make_mesh
    from jaxpar.partition import WHOLE as WHOLE, Leaf as Leaf, PartitionError as PartitionError
    from jaxpar.rules import (
        FSDP as FSDP,
        MEGATRON as MEGATRON,
        ZERO1 as ZERO1,
        fsdp as fsdp,
        megatron as megatron,
        zero1 as zero1,
    )
    from jaxpar.sharded import sharded as sharded
    from jaxpar.state import StateError as StateError, TrainState as TrainState
    from jaxpar.strategy import RecompileWarning as RecompileWarning, Step as Step, Strategy as Strategy
    from jaxpar.train import make_train_step as make_train_step

__version__ = "0.1.0"

_HOME = {
    "batch": ("BatchError", "pad_batch"),
    "data_parallel": ("DriftError", "data_parallel"),
    "evaluation": ("evaluate", "make_eval_step"),
    "layout": ("Layout", "LayoutRow"),
    "loss": ("LossError", "Weighted"),
    "mesh": ("AXES", "MeshError", "fake_devices", "make_mesh"),
    "partition": ("WHOLE", "Leaf", "PartitionError"),
    "rules": ("FSDP", "MEGATRON", "ZERO1", "fsdp", "megatron", "zero1"),
    "sharded": ("sharded",),
    "state": ("StateError", "TrainState"),
    "strategy": ("RecompileWarning", "Step", "Strategy"),
    "train": ("make_train_step",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted([*_MODULE_OF, "rules", "testing"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Names load on first use: the pytest plugin, which every pytest run in an environment imports, must not import JAX.
    if name in ("rules", "testing"):
        return importlib.import_module(f"jaxpar.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxpar' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxpar.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
