"""`jaxpar inspect`: a user's own module and the demo's model, here and on targets, and each error in one line."""

import json

import pytest

from jaxpar.__main__ import main

pytestmark = pytest.mark.devices(8)

MODULE = """
import jax, jaxpar, optax
from flax import nnx
from jax.sharding import PartitionSpec as P

init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.adam(1e-3))
loss_fn = lambda model, batch, rng: ((model(batch["x"]) ** 2).mean(), {})
batch = {"x": jax.ShapeDtypeStruct((64, 64), "float32")}
"""
ARGUMENTS = ["--mesh", "data=8", "--fake-devices", "8"]


@pytest.fixture
def module(tmp_path):
    """Returns what writes a module with more lines at its end, and gives its path."""

    def write(more=""):
        path = tmp_path / "mine.py"
        path.write_text(MODULE + more)
        return str(path)

    return write


def test_a_module_of_the_users_own_is_inspected(module, capsys):
    assert main(["inspect", module(), *ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert "weights and gradients       data  14.2 KiB  14.2 KiB  1.00" in out
    assert "(mine.py:7)" in out


def test_its_rules_and_the_options_are_used(module, capsys):
    rules = 'rules = [[("kernel$", P("fsdp")), (".*", P())]]'
    more = ["--mesh", "fsdp=8", "--fake-devices", "8", "--microbatches", "2", "--json"]
    assert main(["inspect", module(rules), *more]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["strategy"] == "sharded({'fsdp': 8}, 1 list of rules)"
    assert data["param_bytes"] == 4 * (64 * 32 // 8 + 32)
    assert {product["times"] for product in data["products"]} == {2}


def test_the_demos_model_needs_no_code(capsys):
    assert main(["inspect", "--mesh", "fsdp=4,model=2", "--fake-devices", "8", "--layers", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mesh"] == {"fsdp": 4, "model": 2}
    assert any("transformer.py" in one["source"] and one["times"] == 3 for one in data["collectives"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py", *ARGUMENTS], "nothing.py is no file; give a Python file or module with init_fn, loss_fn"),
        (["no_such_module", *ARGUMENTS], "no_such_module is no module that Python finds here, nor a ready model; give"),
        (["lama2-7b", *ARGUMENTS], "nor a ready model (nearest: 'llama2-7b'); give a Python file, as my_model.py"),
        (["copy.py", *ARGUMENTS], "copy.py has the name of the module 'copy', which is in use and would be hidden"),
        (["json", *ARGUMENTS], "json has no init_fn, loss_fn, batch; it needs"),
        (["--mesh", "data=3", "--fake-devices", "8"], "Mesh axes {'data': 3} use 3 devices, but 8 are available"),
        (["--mesh", "data=3", "--target", "v7-3"], "target 'v7-3' has the chip 'v7'"),
        (["--target", "v5e-16", "--fake-devices", "8"], "--target and --fake-devices are given"),
        (["--mesh", "data=8", "--fake-devices", "8", "--slices", "2"], "slices=2, but the devices lie on 1"),
        (["--mesh", "data=8", "--fake-devices", "8", "--batch-size", "9"], "9 examples, which do not divide by 8"),
        (["llama2-7b", *ARGUMENTS, "--layers", "2"], "--layers 2 is given, but llama2-7b has its own"),
        (["json", *ARGUMENTS, "--seq-len", "128"], "--seq-len 128 is given, but json has its own"),
        (["json", *ARGUMENTS, "--experts", "0"], "--experts 0 is given, but json has its own"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("jaxpar: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_module_finds_itself_and_what_lies_beside_it(module, tmp_path, capsys):
    (tmp_path / "beside_mine.py").write_text("WIDTH = 64\n")
    more = (
        "import dataclasses, beside_mine\n@dataclasses.dataclass\nclass Sizes:\n    width: 'int' = beside_mine.WIDTH\n"
    )
    assert main(["inspect", module(more), *ARGUMENTS]) == 0
    assert "weights and gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("raise SystemExit(0)", "can't be imported: SystemExit: 0"),
        ("import no_such_part", "mine.py can't be imported: ModuleNotFoundError: No module named 'no_such_part'\n"),
        ("def init_fn(rng): raise KeyError('width')", "fails with KeyError: 'width'"),
    ],
)
def test_a_module_that_leaves_or_fails_is_not_what_fits_or_does_not(module, more, message, capsys):
    assert main(["inspect", module(more), *ARGUMENTS]) == 2
    assert message in capsys.readouterr().err


def test_a_module_that_fails_is_named(module, capsys):
    assert main(["inspect", module("1 / 0"), *ARGUMENTS]) == 2
    assert "mine.py can't be imported: ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("length", "code", "verdict"), [(1024, 0, "fits"), (2048, 1, "does NOT fit")])
def test_a_target_gives_its_verdict_as_the_exit_code(length, code, verdict, capsys):
    wide = ["--d-model", "4096", "--heads", "32", "--kv-heads", "32", "--layers", "32", "--batch-size", "256"]
    arguments = ["--mesh", "fsdp=256", "--target", "v5e-256", "--dtype", "bfloat16", "--seq-len", str(length), *wide]
    assert main(["inspect", *arguments]) == code
    assert f"of 15.8 GiB: {verdict}" in capsys.readouterr().out
