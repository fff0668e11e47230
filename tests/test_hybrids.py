"""Meshes of two and three axes: `jaxpar train` on real text has one loss curve on all of them."""

import functools
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import jaxpar
from jaxpar import train_command
from jaxpar.__main__ import main

SMALL = ["--d-model", "32", "--seq-len", "16", "--batch-size", "32", "--steps", "4"]
TEXT = pathlib.Path(textwrap.__file__).read_text()
PAIRS = [f"{first}=2,{second}=4" for first, second in itertools.combinations(jaxpar.AXES, 2)]
TRIPLES = [
    "data=2,fsdp=2,model=2",
    "data=2,fsdp=2,stage=2",
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
# Every two axes meet in one of them.
SIXTEEN = [
    "data=2,fsdp=2,stage=2,model=2",
    "data=2,stage=2,context=2,model=2",
    "stage=2,expert=2,context=2,model=2",
    "data=4,expert=4",
    "fsdp=4,expert=4",
    "fsdp=4,context=4",
    "data=4,model=4",
    "stage=4,model=4",
]


def read_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def no_samples():
    """The curve is all that is asked for: what the model scores and writes would be two more compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "_conclude", lambda *_: None)
        yield


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


def curve_to_expect(alone, mesh):
    # A mixture's balance is that of the rows it sees at once: a stage microbatch.
    stages = ["--mesh", "stage=2"] * ("stage" in mesh and "expert" in mesh)
    return alone(*arguments_of(mesh), *stages)


# Microbatches beside fsdp and model: the one step that would be manual over data, but can't.
@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("mesh", "microbatches"), [*((mesh, "1") for mesh in [*PAIRS, *TRIPLES]), ("data=2,fsdp=2,model=2", "2")]
)
def test_every_pair_and_the_useful_triples_have_the_curve_of_one_device(mesh, microbatches, folder, alone):
    extra = [*arguments_of(mesh), "--microbatches", microbatches]
    out = folder / f"{mesh} {microbatches}"
    assert math.prod(int(part.split("=")[1]) for part in mesh.split(",")) == 8
    assert main(["train", *SMALL, *extra, "--text", str(folder / "text"), "--out", str(out), "--mesh", mesh]) == 0
    np.testing.assert_allclose(read_losses(out), curve_to_expect(alone, mesh), atol=1e-4, rtol=0)


# JAX starts with all the devices, not with those of the first curve alone.
@pytest.mark.slow
@pytest.mark.devices(2)
def test_sixteen_devices_have_the_curve_of_one(folder, alone):
    met = {pair for mesh in SIXTEEN for pair in itertools.combinations(re.findall("[a-z]+", mesh), 2)}
    assert met == set(itertools.combinations(jaxpar.AXES, 2))
    program = textwrap.dedent(
        """
        import json, sys
        import conftest  # the shortest way to machine code
        from jaxpar import train_command
        from jaxpar.__main__ import main

        # The curve is all that is asked for.
        train_command._conclude = lambda *_: None
        for arguments in json.loads(sys.argv[1]):
            assert main(["train", *arguments, "--fake-devices", "16"]) == 0, arguments
        """
    )
    arguments = [
        [*SMALL, *arguments_of(mesh), "--text", f"{folder}/text", "--out", f"{folder}/16 {mesh}", "--mesh", mesh]
        for mesh in SIXTEEN
    ]
    # The flags of this process's 8 devices are not the child's, who sets its own.
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    env["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mesh in SIXTEEN:
        curve = read_losses(folder / f"16 {mesh}")
        np.testing.assert_allclose(curve, curve_to_expect(alone, mesh), atol=1e-4, rtol=0, err_msg=mesh)
