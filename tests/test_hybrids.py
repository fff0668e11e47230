"""Meshes of two and three axes: `jaxpar train` on real text has one loss curve on all of them."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import jaxpar
from jaxpar.__main__ import main

SMALL = ["--d-model", "32", "--seq-len", "16", "--batch-size", "32", "--steps", "4"]
TEXT = "the quick brown fox jumps over the lazy dog, and so it goes on and on. " * 200
PAIRS = [f"{first}=2,{second}=4" for first, second in itertools.combinations(jaxpar.AXES, 2)]
TRIPLES = [
    "data=2,fsdp=2,model=2",
    "data=2,stage=2,model=2",
    "data=2,stage=2,context=2",
    "data=2,expert=2,model=2",
    "data=2,context=2,model=2",
    "fsdp=2,stage=2,model=2",
    "fsdp=2,expert=2,context=2",
    "fsdp=2,context=2,model=2",
    "stage=2,expert=2,model=2",
    "stage=2,context=2,model=2",
]
SIXTEEN = ["data=2,stage=2,context=2,model=2", "fsdp=4,expert=4"]


def read_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def arguments_of(mesh):
    # As few layers as the stages take: a run's time is its compile's.
    return ["--experts", "4"] * ("expert" in mesh) + ["--layers", "4" if "stage=4" in mesh else "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrids")
    (path / "text").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """A function that gives the curve of one device, without experts or with them, or of stages alone with them."""

    @functools.cache
    def curve(*extra):
        out = folder / "-".join(("alone", *extra))
        placed = ["--fake-devices", "2" if "--mesh" in extra else "1"]
        assert main(["train", *SMALL, *extra, "--text", str(folder / "text"), "--out", str(out), *placed]) == 0
        return read_losses(out)

    return curve


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [*PAIRS, *TRIPLES])
def test_every_pair_and_the_useful_triples_have_the_curve_of_one_device(mesh, folder, alone):
    extra = arguments_of(mesh)
    out = folder / mesh
    assert math.prod(int(part.split("=")[1]) for part in mesh.split(",")) == 8
    assert main(["train", *SMALL, *extra, "--text", str(folder / "text"), "--out", str(out), "--mesh", mesh]) == 0
    # A mixture's balance is that of the rows it sees at once: a stage microbatch.
    stages = ["--mesh", "stage=2"] * ("stage" in mesh and "expert" in mesh)
    np.testing.assert_allclose(read_losses(out), alone(*extra, *stages), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_sixteen_devices_have_the_curve_of_one(folder, alone):
    program = textwrap.dedent(
        """
        import sys
        from jaxpar.__main__ import main

        folder, *meshes = sys.argv[1:]
        for mesh in meshes:
            extra = ["--experts", "4"] * ("expert" in mesh) + ["--layers", "2"]
            arguments = [*SMALL, *extra, "--text", f"{folder}/text", "--out", f"{folder}/16 {mesh}", "--mesh", mesh]
            assert main(["train", *arguments, "--fake-devices", "16"]) == 0, mesh
        """
    ).replace("*SMALL", f"*{SMALL}")
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), *SIXTEEN], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mesh in SIXTEEN:
        curve = read_losses(folder / f"16 {mesh}")
        np.testing.assert_allclose(curve, alone(*arguments_of(mesh)), atol=1e-4, rtol=0, err_msg=mesh)
