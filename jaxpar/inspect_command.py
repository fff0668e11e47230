"""`jaxpar inspect`: what a step of the user's own, or of the demo's model, will do on a mesh, here or on a target."""

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import jaxpar
from jaxpar import train_command
from jaxpar.inspection.report import Inspection
from jaxpar.usage import UsageError

_NEEDED = ("init_fn", "loss_fn", "batch")


def inspect(options: argparse.Namespace) -> int:
    """Returns 0 once the report is printed; 1 if the step does not fit its target.

    Raises:
      UsageError: the options, or the module, can't be.
    """
    mesh = _make_mesh(options)
    module = _demo(options, mesh) if options.module is None else _load(options.module)
    rules = getattr(module, "rules", None)
    try:
        strategy = jaxpar.sharded(mesh, *(train_command.rules_for(mesh) if rules is None else rules))
        step = jaxpar.make_train_step(
            module.loss_fn,
            strategy,
            num_microbatches=options.microbatches,
            compute_dtype=None if options.dtype == "float32" else jnp.dtype(options.dtype),
        )
        report = jaxpar.inspect(step, strategy.abstract_state(module.init_fn), module.batch)
    except (ValueError, TypeError, jaxpar.AheadError) as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        # Code 1 is for what doesn't fit.
        raise UsageError(f"{options.module or 'the model'} fails with {type(error).__name__}: {error}") from error
    _print(report, options)
    return 0 if report.hbm_bytes is None or report.peak_bytes <= report.hbm_bytes else 1


def _print(report: Inspection, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(report.to_dict()))
    elif sys.stdout.isatty():
        Console().print(report)
    else:
        # Tables would wrap at a width that a file doesn't have.
        print(report)


def _make_mesh(options: argparse.Namespace) -> jax.sharding.Mesh:
    if options.target and options.fake_devices:
        raise UsageError("--target and --fake-devices are given; a target brings its own devices.")
    try:
        if options.target:
            jax.config.update("jax_platforms", "cpu")
            return jaxpar.make_mesh(options.mesh, target=options.target, slices=options.slices)
        devices = None if options.fake_devices is None else train_command.make_fake_devices(options.fake_devices)
        return jaxpar.make_mesh(options.mesh, devices=devices, slices=options.slices)
    except (jaxpar.MeshError, jaxpar.TargetError) as error:
        raise UsageError(str(error)) from error


def _load(name: str) -> types.ModuleType:
    """The user's module, by its name or file: its code is run.

    Raises:
      UsageError: there is none, it fails, or it lacks what is needed.
    """
    path = pathlib.Path(name)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.exists():
                raise UsageError(f"{name} is no file; give a Python file or module with init_fn, loss_fn and batch.")
            module = importlib.util.module_from_spec(spec)
            # As `python file.py` does: it finds what lies beside it, and dataclasses find it.
            sys.path.insert(0, str(path.resolve().parent))
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(name)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} can't be imported: {type(error).__name__}: {error}") from error
    missing = [needed for needed in _NEEDED if not hasattr(module, needed)]
    if missing:
        raise UsageError(
            f"{name} has no {', '.join(missing)}; it needs init_fn and loss_fn, as for make_train_step, batch, arrays "
            "or shapes, and if it likes rules, lists of rules."
        )
    return module


def _demo(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> Any:
    """The model of `jaxpar train`, with the sizes that the options give."""
    rows = {key: jax.ShapeDtypeStruct((options.batch_size, options.seq_len), "uint8") for key in ("x", "y")}
    init_fn = train_command.make_init_fn(options, train_command.read_sizes(options), mesh)
    return types.SimpleNamespace(init_fn=init_fn, loss_fn=train_command.loss_fn, batch=rows)
