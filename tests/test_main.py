"""The command line: the same curve on every mesh, and one clear line for what can't be."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jaxpar
from jaxpar import doctor, train_command, train_report
from jaxpar.__main__ import main

pytestmark = pytest.mark.devices(8)

SMALL = ["train", "--d-model", "32", "--layers", "1", "--seq-len", "16", "--batch-size", "16", "--steps", "3"]
EIGHT = ["--fake-devices", "8"]
PYPROJECT = pathlib.Path(jaxpar.__file__).parent.parent / "pyproject.toml"

LONG = "the cat sat on the mat. " * 100

PLACEMENTS = {
    "one device": ["--fake-devices", "1"],
    "data=8": ["--mesh", "data=8", *EIGHT],
    "model=8": ["--mesh", "model=8", *EIGHT],
    "fsdp=8": ["--mesh", "fsdp=8", *EIGHT],
    "fsdp=2,model=4": ["--mesh", "fsdp=2,model=4", *EIGHT],
    "data=2,model=4": ["--mesh", "data=2,model=4", *EIGHT],
    "pmap": ["--pmap", *EIGHT],
}

BAD_ARGUMENTS = {
    "no command": (["--"], "the following arguments are required: command"),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "unknown option": (["train", "--stps", "3"], "unrecognized arguments: --stps 3"),
    "unknown axis": (["train", "--mesh", "modle=8", *EIGHT], "Mesh axis 'modle' is unknown (nearest: 'model')"),
    "axis without size": (["train", "--mesh", "data", *EIGHT], "write axis=size, as in 'data=2,model=4'"),
    "axis twice": (["train", "--mesh", "data=8,data=1", *EIGHT], "gives axis 'data' twice: 8 and 1"),
    "empty mesh": (["train", "--mesh", "", *EIGHT], "Mesh '' has the part ''"),
    "too few devices used": (
        ["train", "--mesh", "data=3,model=2", *EIGHT],
        "Mesh axes {'data': 3, 'model': 2} use 6 devices, but 8 are available",
    ),
    "too many devices used": (
        ["train", "--mesh", "data=16"],
        "use 16 devices, but 8 are available; sizes must multiply to the device count. To try it without them: ",
    ),
    "rest that does not divide": (["train", "--mesh", "data=3,model=-1", *EIGHT], "use 3, which do not divide 8"),
    "layers over the mesh": (
        ["train", "--mesh", "stage=8", *EIGHT],
        "--layers 2 does not divide by 8, the size of mesh axis 'stage'; give 8.",
    ),
    "an expert axis without experts": (
        ["train", "--mesh", "expert=8", *EIGHT],
        "--mesh axis 'expert' of size 8 has no experts to split; give --experts 8, or a multiple.",
    ),
    "experts over the mesh": (
        ["train", "--mesh", "data=2,expert=4", "--experts", "6", *EIGHT],
        "--experts 6 does not divide by 4, the size of mesh axis 'expert'; give 8, or 4.",
    ),
    "stage microbatches without stages": (
        ["train", "--stage-microbatches", "4", *EIGHT],
        "--stage-microbatches 4 needs stages: give --mesh stage=2, or leave it out.",
    ),
    "fewer stage microbatches than stages": (
        ["train", "--mesh", "data=2,stage=4", "--layers", "4", "--stage-microbatches", "2", *EIGHT],
        "--stage-microbatches 2 leaves some of 4 stages idle; give 4 or more, better 16.",
    ),
    "rows of stage microbatches": (
        ["train", "--mesh", "data=4,stage=2", "--stage-microbatches", "3", *EIGHT],
        "--batch-size 32 does not divide by 4 data shards x 3 microbatches = 12; give 36, or 24.",
    ),
    "axis that splits nothing": (
        ["train", "--mesh", "fsdp=7", "--fake-devices", "7", "--batch-size", "28"],
        "Mesh axis 'fsdp' of size 7 splits no leaf",
    ),
    "pmap and a mesh": (["train", "--pmap", "--mesh", "data=8"], "argument --mesh: not allowed with argument --pmap"),
    "fake devices too late": (["train", "--fake-devices", "16"], "JAX has already started with 8"),
    "no fake devices": (["train", "--fake-devices", "0"], "'0' is given; a whole number, from 1 to 1024, is needed"),
    "rows": (
        ["train", "--batch-size", "30", *EIGHT],
        "--batch-size 30 does not divide by 8 data shards x 1 microbatches = 8; give 32, or 24.",
    ),
    "rows of microbatches": (
        ["train", "--pmap", "--microbatches", "8", *EIGHT],
        "--batch-size 32 does not divide by 8 data shards x 8 microbatches = 64; give 64.",
    ),
    "no microbatch": (["train", "--microbatches", "0"], "--microbatches: '0' is given; a whole number, from 1 to"),
    "heads over the mesh": (
        ["train", "--heads", "4", "--mesh", "model=8", *EIGHT],
        "--heads 4 does not divide by 8, the size of mesh axis 'model'; give 8.",
    ),
    "sequence over the mesh": (
        ["train", "--seq-len", "20", "--mesh", "context=8", *EIGHT],
        "--seq-len 20 does not divide by 8, the size of mesh axis 'context'; give 24, or 16.",
    ),
    "heads": (["train", "--heads", "7"], "--d-model 128 does not divide into --heads 7 of even size"),
    "odd heads": (["train", "--d-model", "24"], "give a multiple of 16."),
    "key/value heads": (
        ["train", "--kv-heads", "3"],
        "--kv-heads 3: each serves as many query heads; give one of 1, 2, 4, 8.",
    ),
    "steps backwards": (["train", "--profile", "3..2"], "'3..2' is given; the first and the last step, as 10..20, are"),
    "no range": (
        ["train", "--profile", "3"],
        "argument --profile: '3' is given; the first and the last step, as 10..20",
    ),
    "profile into nothing": (["train", "--profile", "2..3"], "--profile needs a folder to write to; give --out DIR"),
    "profile too late": (
        ["train", "--profile", "2..9", "--steps", "8", "--out", "run"],
        "--profile 2..9 goes beyond --steps 8; give steps of the run",
    ),
    "no step": (["train", "--steps", "0"], "argument --steps: '0' is given; a whole number, 1 or more, is needed"),
    "negative steps": (["train", "--steps", "-3"], "'-3' is given"),
    "steps in words": (["train", "--steps", "many"], "'many' is given"),
    "negative seed": (["train", "--seed", "-1"], "'-1' is given; a whole number, from 0 to 4294967295, is needed"),
    "learning rate": (["train", "--learning-rate", "nan"], "'nan' is given; a finite number above 0 is needed"),
    "dtype": (["train", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    "huge model": (["train", "--d-model", "8" + "0" * 30], "a whole number, from 1 to 1048576, is needed"),
    "no such text": (["train", "--text", "nowhere"], "Text 'nowhere' does not exist; give a file or a folder."),
    "empty path": (["train", "--text", ""], "argument --text: '' is given; the path of a file or folder is needed"),
    "zero byte in a path": (["train", "--out", "a\0b"], "argument --out: 'a\\x00b' is given"),
    "empty text": (["train", "--text", "empty"], "gives 0 bytes to train on and 0 held out, from 0 text files"),
    "tiny text": (["train", "--text", "tiny"], "each part needs at least 65; give more text."),
    "text shorter than a row": (["train", "--seq-len", "1000000", "--text", "long"], "needs at least 1,000,001"),
    "out is a file": (
        ["train", "--out", "tiny"],
        "--out 'tiny' can't be written: File exists: 'tiny'; give another folder.",
    ),
    "out below a file": (["train", "--out", "tiny/x"], "--out 'tiny/x' can't be written: Not a directory"),
    "log is a folder": (
        ["train", "--out", "folder"],
        "can't be written: Is a directory: 'folder/log.jsonl'; give another folder.",
    ),
    "doctor takes nothing": (["doctor", "well"], "unrecognized arguments: well"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a few odd files; samples are short in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "_SAMPLE_BYTES", 20)
    (tmp_path / "empty").touch()
    (tmp_path / "tiny").write_text("hello")
    (tmp_path / "long").write_text(LONG)
    (tmp_path / "folder" / "log.jsonl").mkdir(parents=True)
    return tmp_path


class Run(NamedTuple):
    losses: list[float]
    out: str

    @property
    def sample(self):
        return self.out.partition("a sample")[2]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_losses(folder):
    return [row["loss"] for row in read_log(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses of the small run with nothing asked of it but its text, and what it printed."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "long").write_text(LONG)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(train_command, "_SAMPLE_BYTES", 20)
        assert main([*SMALL, "--text", str(folder / "long"), "--out", str(folder)]) == 0
    return Run(read_losses(folder), out.getvalue())


@pytest.fixture
def untrained(monkeypatch):
    """Everything is as in a run of two steps, but that nothing is computed."""

    def run_steps(job, listeners):
        for step in (1, 2):
            for listener in listeners:
                listener({"step": step, "loss": 1 / step, "tokens_per_second": 8.0})

    monkeypatch.setattr(train_command, "_run_steps", run_steps)
    monkeypatch.setattr(train_command, "_score", lambda job, state: (0.25, 64))
    monkeypatch.setattr(train_command, "_sample", lambda job, state: (b"the cat", b" sat"))


def run_process(*arguments, timeout=600, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jaxpar", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | environment,
    )


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_gets_one_line_and_code_2_before_any_compile(case, here, capsys, monkeypatch):
    arguments, message = BAD_ARGUMENTS[case]
    monkeypatch.setattr(jaxpar.Strategy, "init", lambda *arguments: pytest.fail("a compile began"))
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("jaxpar: ")
    assert message in err


def test_several_that_are_launched_do_not_train_into_one_folder(here, capsys, monkeypatch):
    monkeypatch.setenv("JAXPAR_PROCESSES", "2")
    assert main(["train"]) == 2
    assert "jaxpar train runs in one process, but 2 are launched; leave jaxpar launch out" in capsys.readouterr().err


def test_a_run_reports_what_it_did(plain):
    for part in ("data=8, 8 cpu devices", "parameters", "a device holds", "tokens/s", "nats per byte", "a sample"):
        assert part in plain.out
    assert f"step 3  loss {plain.losses[-1]:.4f}" in plain.out
    # 16 bytes of text and 20 that the model makes, of which two or more may be one character.
    assert 16 < len(plain.sample.splitlines()[-1]) <= 16 + 20


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["fsdp=2,model=4", "pmap"])
def test_every_placement_gives_the_same_losses_and_the_same_sample(placement, here, capsys, plain):
    assert main([*SMALL, *PLACEMENTS[placement], "--text", "long", "--out", "run"]) == 0
    np.testing.assert_allclose(read_losses(here / "run"), plain.losses, atol=1e-5, rtol=0)
    assert Run([], capsys.readouterr().out).sample == plain.sample


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_one_another(here, plain):
    for seed in ("0", "1"):
        assert main([*SMALL, "--text", "long", "--out", seed, "--seed", seed]) == 0
    assert read_losses(here / "0") == plain.losses
    assert np.abs(np.subtract(read_losses(here / "1"), plain.losses)).min() > 1e-3


@pytest.mark.parametrize("extra", [pytest.param(["--pmap"], marks=pytest.mark.slow), ["--mesh", "data=2,context=4"]])
def test_microbatches_change_no_loss(extra, here, plain):
    assert main([*SMALL, "--text", "long", "--out", "run", "--microbatches", "2", *extra]) == 0
    np.testing.assert_allclose(read_losses(here / "run"), plain.losses, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(here, plain):
    assert main([*SMALL, "--text", "long", "--out", "run", "--dtype", "bfloat16"]) == 0
    assert read_losses(here / "run") != plain.losses
    np.testing.assert_allclose(read_losses(here / "run"), plain.losses, atol=1e-2, rtol=0)


def test_the_log_has_a_row_a_step_and_the_curve_lies_beside_it(here, untrained):
    pytest.importorskip("matplotlib", reason="needs matplotlib, as jaxpar[plot] installs it")
    assert main(["train", "--text", "long", "--out", "new/run"]) == 0
    assert read_log(here / "new/run") == [
        {"step": 1, "loss": 1.0, "tokens_per_second": 8.0},
        {"step": 2, "loss": 0.5, "tokens_per_second": 8.0},
    ]
    assert (here / "new/run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_draws_no_curve_leaves_the_one_that_is_there(here, capsys, monkeypatch):
    (here / "run").mkdir()
    (here / "run/loss.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(train_command, "loss_fn", lambda model, batch, rng: (model(batch["x"]).mean() * np.nan, {}))
    assert main([*SMALL, "--text", "long", "--out", "run"]) == 1
    assert (here / "run/loss.png").read_bytes() == b"of an earlier run"


def test_without_matplotlib_the_log_is_written_and_a_line_says_what_is_missing(here, capsys, monkeypatch, untrained):
    monkeypatch.setattr(train_report.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--text", "long", "--out", "run"]) == 0
    assert "There will be no loss.png, which matplotlib draws: pip install 'jaxpar[plot]'" in capsys.readouterr().out
    assert len(read_log(here / "run")) == 2
    assert not (here / "run/loss.png").exists()


def test_on_a_terminal_there_is_one_live_line_and_a_profile_if_asked_for(here, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    assert main([*SMALL, "--text", "long", "--out", "run", "--profile", "2..3"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\x1b[2K") > 0
    assert "3/3" in err
    assert "tokens/s" in err
    assert "step 1  loss" not in out
    assert len(list((here / "run/profile").rglob("*.xplane.pb"))) == 1


def test_elsewhere_there_is_a_line_for_each_tenth(here, capsys, untrained):
    assert main(["train", "--text", "long", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert "step 1  loss 1.0000  8 tokens/s\nstep 2  loss 0.5000  8 tokens/s\n" in out
    assert err == ""


def test_a_loss_that_is_no_number_ends_the_run_with_code_1(here, capsys, monkeypatch):
    monkeypatch.setattr(train_command, "loss_fn", lambda model, batch, rng: (model(batch["x"]).mean() * np.nan, {}))
    assert main([*SMALL, "--text", "long"]) == 1
    assert "Step 1 gave loss nan, grad_norm nan. Try a lower --learning-rate.\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("default::jaxpar.CheckpointWarning")
def test_a_checkpoint_that_is_passed_over_is_told_in_one_plain_line(here, capsys):
    run = [*SMALL, "--text", "long", "--checkpoint", "run", "--checkpoint-every", "1"]
    assert main(run) == 0
    (here / "run" / "3" / "more").touch()
    capsys.readouterr()
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert "\nstep 3  loss" in out
    assert re.fullmatch(r"jaxpar: Checkpoint 3 must not .*/run/3/more is not .* An older one, 2, is taken\.\n", err)


def test_an_interrupted_run_keeps_its_log(here, capsys, monkeypatch, untrained):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "_score", interrupt)
    assert main(["train", "--text", "long", "--out", "run"]) == 130
    assert capsys.readouterr().err == "jaxpar: interrupted\n"
    assert len(read_log(here / "run")) == 2


def test_the_first_step_which_compiles_is_left_out_of_the_speed():
    rows = [{"tokens_per_second": speed} for speed in (1.0, 10.0, 30.0)]
    assert train_report.tokens_per_second(rows) == pytest.approx(15)
    assert train_report.tokens_per_second(rows[:1]) == 1


def test_help_and_version_import_no_jax():
    code = "import sys, jaxpar.__main__ as m\ntry: m.main(sys.argv[1:])\nfinally: sys.exit('jax' in sys.modules)"
    for arguments, expected in ((["--help"], "train"), (["train", "--help"], "--mesh"), (["--version"], "jaxpar 0.")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        assert expected in done.stdout


def test_the_console_script_is_this_command():
    scripts = [entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "jaxpar"]
    assert [entry.load() for entry in scripts] == [main]


def test_without_arguments_it_says_what_there_is(capsys, monkeypatch):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    listed = re.findall(r"^ +(\w+)", err, re.MULTILINE)
    assert {"train", "inspect", "estimate", "checkpoint", "launch", "doctor"} <= set(listed)


@pytest.mark.parametrize(
    ("installed", "platforms", "backend", "told"),
    [
        ("0.0.42", "", "cpu", ["cpu"]),
        ("0.0.42", "", "gpu", ["cuda"]),
        ("0.0.42", "cpu", "cpu", []),
        (None, "", "cpu", []),
    ],
)
def test_doctor_tells_what_quiets_libtpu_where_there_is_no_tpu(
    capsys, monkeypatch, installed, platforms, backend, told
):
    others = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: installed if name == "libtpu" else others(name))
    monkeypatch.setattr(doctor, "read_pins", list)
    monkeypatch.setattr(doctor.jax, "default_backend", lambda: backend)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert main(["doctor"]) == 0
    assert re.findall(r"JAX_PLATFORMS=(\w+) spares that", capsys.readouterr().out) == told


def test_doctor_says_all_is_well_where_it_is(capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^jax +{re.escape(jax.__version__)} +>=0.10 +jaxpar$", out, re.MULTILINE)
    assert f"  {jax.device_count()} x " in out
    assert "JAX_ENABLE_X64=0  Arrays are float64 by default" in out
    assert out.endswith("All is well.\n")


def test_doctor_names_a_violated_pin(capsys, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1.2" if name == "optax" else version(name))
    assert main(["doctor"]) == 1
    assert "optax is 0.1.2, but jaxpar needs >=0.2.8: pip install -U 'optax>=0.2.8'" in capsys.readouterr().out


def test_doctor_names_what_is_not_installed(capsys, monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "chex" else installed(name))
    assert main(["doctor"]) == 1
    assert "chex is not installed, but jaxpar needs >=0.1.92" in capsys.readouterr().out


def test_doctor_reads_the_pins_as_pyproject_has_them(monkeypatch):
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements if name == "jaxpar" else [])
    pins = {pin.name: pin for pin in doctor.read_pins()}
    assert {f"{name}{pin.needs}" for name, pin in pins.items() if name != "python"} == set(requirements)
    assert all(pin.holds for pin in pins.values())


def test_doctor_says_why_jax_does_not_start(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no such platform\nat all")

    monkeypatch.setattr(doctor.jax, "devices", fail)
    assert main(["doctor"]) == 1
    assert "  none: no such platform at all\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "needs", "holds"),
    [
        ("0.10.2", ">=0.10", True),
        ("0.9.9", ">=0.10", False),
        ("0.10", ">=0.10.0", True),
        ("0.12.0.1", "<=0.12.0", False),
        ("0.10.2", "<=0.10.2,>=0.10.1", True),
        ("0.0.42.3", "==0.0.42.*", True),
        ("0.0.43", "==0.0.42.*", False),
        ("1.4.5", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("2.0", "!=2.0.0", False),
        ("0.11.0rc1", ">=0.10", True),
        ("3", "", True),
    ],
)
def test_versions_compare_by_their_numbers(version, needs, holds):
    assert doctor.satisfies(version, needs) is holds


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "JAX takes 75% of each GPU's memory when it starts"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "JAX takes 50% of each GPU's memory"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "Nothing is set aside: memory grows"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "Nothing is set aside: memory grows"),
    ],
)
def test_doctor_says_what_jax_takes_of_a_gpu(environment, message):
    assert message in doctor._describe_memory(environment, "gpu")


@pytest.mark.slow
@pytest.mark.devices(8)
def test_every_placement_gives_the_same_curve(here, monkeypatch):
    # What comes after the steps is another test's.
    monkeypatch.setattr(train_command, "_HELD_OUT_BYTES", 1)
    sizes, in_a_process = ["--d-model", "64", "--seq-len", "16"], "data=2,model=4"
    arguments = ["train", *sizes, "--steps", "30", "--out"]
    for name, placement in PLACEMENTS.items():
        if name == in_a_process:
            done = run_process(*arguments, name, *placement)
            assert done.returncode == 0, done.stderr
        else:
            assert main([*arguments, name, *placement]) == 0
    curves = {name: read_losses(here / name) for name in PLACEMENTS}
    for name, curve in curves.items():
        assert len(curve) == 30
        np.testing.assert_allclose(curve, curves["one device"], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.slow
def test_with_its_defaults_it_ends_below_2_2_nats_per_byte():
    done = run_process("train", timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    held_out = float(re.search(r"held out: ([\d.]+) nats per byte", done.stdout).group(1))
    assert held_out < 2.2


@pytest.mark.slow
def test_fake_devices_without_the_cpu_platform_are_refused():
    done = run_process("train", *EIGHT, JAX_PLATFORMS="cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Fake devices are CPU devices, but JAX_PLATFORMS=cuda rules CPUs out; unset it." in done.stderr
