"""The step that a command is about: of the user's own module, of the demo's model, or of a ready one; with its mesh."""

import argparse
import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpar
from jaxpar import train_command
from jaxpar.mesh import nearest
from jaxpar.transformer import Sizes, Transformer
from jaxpar.usage import DEMO_SIZES, UsageError

_NEEDED = ("init_fn", "loss_fn", "batch")
# https://arxiv.org/abs/2307.09288, table 1 and its released configuration.
_READY = {"llama2-7b": Sizes(4096, 32, 32, 32, 11008, vocab=32000)}
_READY_LENGTH = 4096
# The names of the users' own files among the loaded modules.
_LOADED: set[str] = set()


def run_step(options: argparse.Namespace, mesh: jax.sharding.Mesh, report: Callable[..., Any]) -> Any:
    """Returns `report(step, state, batch)` of what the options name, its state as shapes.

    Raises:
      UsageError: the options, or the module, can't be.
    """
    name = options.module
    if name is not None:
        _refuse_sizes(
            options, DEMO_SIZES if name in _READY else [*DEMO_SIZES, "batch_size", "seq_len", "stage_microbatches"]
        )
    module = _demo(options, mesh) if name is None else _ready(options, mesh) if name in _READY else _load(name)
    rules = getattr(module, "rules", None)
    if rules and all(isinstance(rule, tuple) for rule in rules):
        # One list, as sharded(mesh, jaxpar.MEGATRON) takes it.
        rules = [rules]
    try:
        strategy = jaxpar.sharded(mesh, *(train_command.rules_for(mesh) if rules is None else rules))
        step = jaxpar.make_train_step(
            module.loss_fn,
            strategy,
            num_microbatches=options.microbatches,
            compute_dtype=None if options.dtype == "float32" else jnp.dtype(options.dtype),
        )
        return report(step, strategy.abstract_state(module.init_fn), module.batch)
    except (ValueError, TypeError, jaxpar.AheadError) as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        # Code 1 is for what doesn't fit.
        raise UsageError(f"{options.module or 'the model'} fails with {type(error).__name__}: {error}") from error


def make_mesh(options: argparse.Namespace, target: str | None) -> jax.sharding.Mesh:
    """Returns the mesh that the options ask for, of a target or of devices that are here.

    Raises:
      UsageError: there is none.
    """
    if target and options.fake_devices:
        raise UsageError("--target and --fake-devices are given; a target brings its own devices.")
    try:
        if target:
            jax.config.update("jax_platforms", "cpu")
            return jaxpar.make_mesh(options.mesh, target=target, slices=options.slices, slice_axis=options.slice_axis)
        devices = None if options.fake_devices is None else train_command.make_fake_devices(options.fake_devices)
        return jaxpar.make_mesh(options.mesh, devices=devices, slices=options.slices, slice_axis=options.slice_axis)
    except (jaxpar.MeshError, jaxpar.TargetError) as error:
        raise UsageError(str(error)) from error


@functools.cache
def _load(name: str) -> types.ModuleType:
    """The user's module, by its name or file: its code is run.

    Raises:
      UsageError: there is none, it fails, or it lacks what is needed.
    """
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.stem in sys.modules and path.stem not in _LOADED:
        raise UsageError(
            f"{name} has the name of the module {path.stem!r}, which is in use and would be hidden; rename the file."
        )
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.exists():
                raise UsageError(f"{name} is no file; give a Python file or module with init_fn, loss_fn and batch.")
            module = importlib.util.module_from_spec(spec)
            # As `python file.py` does: it finds what lies beside it, and dataclasses find it.
            sys.path.insert(0, str(path.resolve().parent))
            sys.modules[path.stem] = module
            _LOADED.add(path.stem)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(name)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UsageError(
                f"{name} is no module that Python finds here, nor a ready model{nearest(name, tuple(_READY))}; give a "
                f"Python file, as my_model.py, a module, or one of {', '.join(_READY)}."
            ) from error
        raise UsageError(f"{name} can't be imported: {type(error).__name__}: {error}") from error
    missing = [needed for needed in _NEEDED if not hasattr(module, needed)]
    if missing:
        raise UsageError(
            f"{name} has no {', '.join(missing)}; it needs init_fn and loss_fn, as for make_train_step, batch, arrays "
            "or shapes, and if it likes rules, lists of rules."
        )
    return module


def _refuse_sizes(options: argparse.Namespace, names: Iterable[str]) -> None:
    """What would be passed over in silence."""
    given = vars(options)
    for name in names:
        if given.get(name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} {given[name]} is given, but {options.module} has its own; leave that out, "
                "or MODULE: then the model of jaxpar train has any size."
            )


def _demo(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> Any:
    """The model of `jaxpar train`, with the sizes that the options give."""
    options = argparse.Namespace(**{**DEMO_SIZES, **vars(options)})
    rows = {key: jax.ShapeDtypeStruct((options.batch_size or 32, options.seq_len or 64), "uint8") for key in ("x", "y")}
    init_fn = train_command.make_init_fn(options, train_command.read_sizes(options), mesh)
    return types.SimpleNamespace(init_fn=init_fn, loss_fn=train_command.loss_fn, batch=rows)


def _ready(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> Any:
    """A model of known sizes: a row a chip, layers rematerialised, attention by a kernel where the mesh lets it."""
    size = lambda axis: mesh.shape.get(axis, 1)
    attend = jaxpar.ring_attention if size("context") > 1 else jaxpar.splash_attention
    attend = jax.nn.dot_product_attention if size("stage") > 1 else attend
    parts: dict[str, Any] = {"attend": functools.partial(attend, is_causal=True), "remat": "full", "is_tied": False}
    parts["stage_microbatches"] = train_command.stage_microbatches(options, mesh)
    init_fn = lambda rng: jaxpar.TrainState.create(
        Transformer(_READY[options.module], **parts, rngs=nnx.Rngs(rng)), optax.adamw(1e-3)
    )
    shards = size("data") * size("fsdp") * size("expert")
    rows = options.batch_size or max(mesh.size, shards * parts["stage_microbatches"] * options.microbatches)
    batch = {key: jax.ShapeDtypeStruct((rows, options.seq_len or _READY_LENGTH), "int32") for key in ("x", "y")}
    rules = [
        jaxpar.megatron(column=["head"]) if rule is jaxpar.MEGATRON else rule for rule in train_command.rules_for(mesh)
    ]
    return types.SimpleNamespace(init_fn=init_fn, loss_fn=train_command.loss_fn, batch=batch, rules=rules)
