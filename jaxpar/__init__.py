"""jaxpar: write the train step once in plain Flax, and parallelise it by changing one line."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpar import data as data
    from jaxpar import rules as rules
    from jaxpar import schedule as schedule
    from jaxpar import testing as testing
    from jaxpar.ahead import AheadError as AheadError
    from jaxpar.batch import BatchError as BatchError
    from jaxpar.batch import pad_batch as pad_batch
    from jaxpar.checkpoint import CheckpointError as CheckpointError
    from jaxpar.checkpoint import Checkpoints as Checkpoints
    from jaxpar.checkpoint import CheckpointWarning as CheckpointWarning
    from jaxpar.context import ring_attention as ring_attention
    from jaxpar.context import split_sequence as split_sequence
    from jaxpar.context import ulysses_attention as ulysses_attention
    from jaxpar.data_parallel import data_parallel as data_parallel
    from jaxpar.distributed import DistributedError as DistributedError
    from jaxpar.distributed import initialize as initialize
    from jaxpar.estimation.report import Estimate as Estimate
    from jaxpar.estimation.report import EstimationError as EstimationError
    from jaxpar.estimation.report import estimate as estimate
    from jaxpar.evaluation import EvalStep as EvalStep
    from jaxpar.evaluation import evaluate as evaluate
    from jaxpar.evaluation import make_eval_step as make_eval_step
    from jaxpar.expert import ExpertError as ExpertError
    from jaxpar.expert import ExpertKernels as ExpertKernels
    from jaxpar.expert import MoE as MoE
    from jaxpar.expert import MoELosses as MoELosses
    from jaxpar.expert import mixture_of_experts as mixture_of_experts
    from jaxpar.fit import FitError as FitError
    from jaxpar.fit import fit as fit
    from jaxpar.inspection.report import Inspection as Inspection
    from jaxpar.inspection.report import InspectionError as InspectionError
    from jaxpar.inspection.report import inspect as inspect
    from jaxpar.layout import Layout as Layout
    from jaxpar.layout import LayoutRow as LayoutRow
    from jaxpar.loss import LossError as LossError
    from jaxpar.loss import Weighted as Weighted
    from jaxpar.mesh import AXES as AXES
    from jaxpar.mesh import MeshError as MeshError
    from jaxpar.mesh import fake_devices as fake_devices
    from jaxpar.mesh import make_mesh as make_mesh
    from jaxpar.partition import WHOLE as WHOLE
    from jaxpar.partition import Leaf as Leaf
    from jaxpar.partition import PartitionError as PartitionError
    from jaxpar.pipeline import pipeline as pipeline
    from jaxpar.pipeline_loss import pipeline_loss as pipeline_loss
    from jaxpar.profiling import Profile as Profile
    from jaxpar.rules import EXPERT as EXPERT
    from jaxpar.rules import FSDP as FSDP
    from jaxpar.rules import MEGATRON as MEGATRON
    from jaxpar.rules import PIPELINE as PIPELINE
    from jaxpar.rules import ZERO1 as ZERO1
    from jaxpar.rules import experts as experts
    from jaxpar.rules import fsdp as fsdp
    from jaxpar.rules import megatron as megatron
    from jaxpar.rules import stages as stages
    from jaxpar.rules import zero1 as zero1
    from jaxpar.schedule import ScheduleError as ScheduleError
    from jaxpar.sequence import ContextError as ContextError
    from jaxpar.sequence import zigzag as zigzag
    from jaxpar.sequence import zigzag_order as zigzag_order
    from jaxpar.sharded import sharded as sharded
    from jaxpar.splash import SplashError as SplashError
    from jaxpar.splash import splash_attention as splash_attention
    from jaxpar.stack import PipelineError as PipelineError
    from jaxpar.state import StateError as StateError
    from jaxpar.state import TrainState as TrainState
    from jaxpar.step import DriftError as DriftError
    from jaxpar.step import RecompileWarning as RecompileWarning
    from jaxpar.step import Step as Step
    from jaxpar.strategy import Strategy as Strategy
    from jaxpar.targets import TargetError as TargetError
    from jaxpar.train import make_train_step as make_train_step

__version__ = "0.1.0"

_HOME = {
    "ahead": ("AheadError",),
    "batch": ("BatchError", "pad_batch"),
    "checkpoint": ("CheckpointError", "Checkpoints", "CheckpointWarning"),
    "context": ("ring_attention", "split_sequence", "ulysses_attention"),
    "data_parallel": ("data_parallel",),
    "distributed": ("DistributedError", "initialize"),
    "estimation.report": ("Estimate", "EstimationError", "estimate"),
    "evaluation": ("EvalStep", "evaluate", "make_eval_step"),
    "expert": ("ExpertError", "ExpertKernels", "MoE", "MoELosses", "mixture_of_experts"),
    "fit": ("FitError", "fit"),
    "inspection.report": ("Inspection", "InspectionError", "inspect"),
    "layout": ("Layout", "LayoutRow"),
    "loss": ("LossError", "Weighted"),
    "mesh": ("AXES", "MeshError", "fake_devices", "make_mesh"),
    "partition": ("WHOLE", "Leaf", "PartitionError"),
    "profiling": ("Profile",),
    "rules": ("EXPERT", "FSDP", "MEGATRON", "PIPELINE", "ZERO1", "experts", "fsdp", "megatron", "stages", "zero1"),
    "pipeline": ("pipeline",),
    "pipeline_loss": ("pipeline_loss",),
    "schedule": ("ScheduleError",),
    "sequence": ("ContextError", "zigzag", "zigzag_order"),
    "sharded": ("sharded",),
    "splash": ("SplashError", "splash_attention"),
    "stack": ("PipelineError",),
    "state": ("StateError", "TrainState"),
    "step": ("DriftError", "RecompileWarning", "Step"),
    "strategy": ("Strategy",),
    "targets": ("TargetError",),
    "train": ("make_train_step",),
}
_MODULES = ("data", "rules", "schedule", "testing")
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted([*_MODULE_OF, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Names load on first use: the pytest plugin, which every pytest run in an environment imports, must not import JAX.
    if name in _MODULES:
        return importlib.import_module(f"jaxpar.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxpar' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxpar.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """This package: a function keeps its name though the module it lives in has the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a package's attribute to each submodule it imports: jaxpar.sharded would become the module.
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
