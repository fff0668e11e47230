"""`jaxpar checkpoint`: what checkpoints a folder holds, what each needs, and whether every file of them is whole."""

import argparse
import json
import math
import pathlib
from typing import Any

from jaxpar.checkpoint import CheckpointError, describe_checkpoint
from jaxpar.layout import format_bytes
from jaxpar.manifest import ManifestError, check_manifest
from jaxpar.saved_files import step_of, width_of
from jaxpar.tables import Table, align
from jaxpar.usage import UsageError


def list_checkpoints(options: argparse.Namespace) -> int:
    """Returns 0 once the checkpoints are listed; 1 if one of them is damaged.

    Raises:
      UsageError: there is no such folder, or it holds none.
    """
    directory = pathlib.Path(options.directory)
    if not directory.is_dir():
        raise UsageError(f"{directory} is no folder; give one that holds checkpoints.")
    steps = sorted(step for path in directory.iterdir() if (step := step_of(path.name)) is not None)
    folders = [directory / str(step) for step in steps]
    if not folders:
        raise UsageError(
            f"{directory} holds no checkpoints; give the folder that Checkpoints or --checkpoint was given."
        )
    found = [_describe(folder, options.verify) for folder in folders]
    if options.json:
        print(json.dumps(found))
    else:
        heads = ("step", "bytes", "digest", "state", "leaves", "saved by", "")
        print("\n".join(align(Table(heads, [_row(each) for each in found]))))
    return 1 if any(each["error"] for each in found) else 0


def _describe(folder: pathlib.Path, verify: bool) -> dict[str, Any]:
    """What is told of a checkpoint, as plain data."""
    try:
        told = describe_checkpoint(folder)
        if verify:
            check_manifest(folder)
    except CheckpointError as error:
        return {"step": int(folder.name), "error": str(error).rstrip(".")}
    except ManifestError as error:
        return {"step": int(folder.name), "error": f"{error}; {error.remedy}"}
    size = sum(math.prod(shape) * width_of(dtype) for shape, dtype in told["leaves"].values())
    return {
        "step": int(folder.name),
        "bytes": told["bytes"],
        "digest": told["digest"],
        "state_bytes": size,
        "leaves": len(told["leaves"]),
        "devices": told["devices"],
        "processes": told["processes"],
        "verified": verify,
        "error": None,
    }


def _row(told: dict[str, Any]) -> tuple[str, ...]:
    if told["error"]:
        return (str(told["step"]), "-", "-", "-", "-", "-", told["error"])
    return (
        str(told["step"]),
        format_bytes(told["bytes"]),
        told["digest"][:12],
        format_bytes(told["state_bytes"]),
        str(told["leaves"]),
        f"{told['devices']} devices, {told['processes']} process{'es' * (told['processes'] > 1)}",
        "whole" if told["verified"] else "not verified",
    )
