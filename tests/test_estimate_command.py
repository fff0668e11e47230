"""`jaxpar estimate`: one pod and several, prices and charts, and each error in one line (with the compiler: slow)."""

import importlib.util
import json

import pytest
from test_estimation import make_estimate

from jaxpar import estimate_command
from jaxpar.__main__ import main
from jaxpar.usage import UsageError

pytestmark = pytest.mark.devices(8)

SMALL = ["--mesh", "fsdp=-1", "--dtype", "bfloat16", "--layers", "2", "--d-model", "256", "--batch-size", "64"]


def fails(capsys, *arguments):
    assert main(["estimate", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_target_is_needed_and_named(capsys):
    assert "--target" in fails(capsys)
    assert "names no pod; give one, as v5e-256, or several" in fails(capsys, "--target", ",")
    assert "those known are v4, v5e, v5p, v6e" in fails(capsys, "--target", "v5x-16")
    assert "v5e comes in slices of 4, 8" in fails(capsys, "--target", "v5e-12")


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ("v5e", "--price has 'v5e'; write chips and dollars an hour"),
        ("v5p=2", "--price has the chip 'v5p', but --target names v5e-16 alone"),
        ("v9=2", "--price has the chip 'v9'; those known are"),
    ],
)
def test_prices_are_a_number_for_each_chip(capsys, price, message):
    assert message in fails(capsys, "--target", "v5e-16", "--price", price)


@pytest.fixture
def estimates(monkeypatch):
    """Stands in for the compiler: what it would say of each target."""
    told = {"v5e-16": make_estimate(), "v5p-16": make_estimate(peak_bytes=2**40)}

    def estimate(options, target, prices):
        if target not in told:
            raise UsageError(f"no {target}")
        return told[target]

    monkeypatch.setattr(estimate_command, "_estimate", estimate)


def test_several_pods_make_one_table(estimates, capsys):
    assert main(["estimate", "--target", "v5e-16,v5p-16"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["v5e-16", "yes"], ["v5p-16", "NO"]]
    for word in ("Held the same: the batch.", "task", "compatibility", "security", "2025-"):
        assert word in out
    assert main(["estimate", "--target", "v5e-16,v5p-16", "--json"]) == 0
    assert [each["fits"] for each in json.loads(capsys.readouterr().out)] == [True, False]


def test_pods_with_batches_of_their_own_are_told(estimates, capsys, monkeypatch):
    own = {"v5e-16": make_estimate(), "v5p-16": make_estimate(tokens=3)}
    monkeypatch.setattr(estimate_command, "_estimate", lambda options, target, prices: own[target])
    assert main(["estimate", "--target", "v5e-16,v5p-16"]) == 0
    out = capsys.readouterr().out
    assert "Held the same: a chip's rows, one unless" in out
    assert "3 tokens" in out


def test_what_can_be_estimated_nowhere_is_an_error(estimates, capsys):
    assert main(["estimate", "--target", "v4-16,v6e-16"]) == 2
    assert "no v4-16" in capsys.readouterr().err


def test_what_fits_nowhere_is_code_1(estimates, capsys):
    assert main(["estimate", "--target", "v5p-16"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_a_chart_shows_time_and_memory(estimates, capsys, tmp_path):
    path = tmp_path / "chart.png"
    assert main(["estimate", "--target", "v5e-16,v5p-16", "--chart", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_what_a_chart_needs_is_found_out_before_the_compiles(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate_command, "_estimate", lambda *args: pytest.fail("compiled"))
    assert "there is no folder" in fails(capsys, "--target", "v5e-16", "--chart", str(tmp_path / "no" / "chart.png"))
    assert "can't be written: a folder" in fails(capsys, "--target", "v5e-16", "--chart", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--chart needs matplotlib: pip install 'jaxpar[plot]'" in fails(
        capsys, "--target", "v5e-16", "--chart", str(tmp_path / "chart.png")
    )


@pytest.mark.slow
def test_the_demo_and_a_ready_model_need_no_code(capsys):
    assert main(["estimate", *SMALL, "--target", "v5e-16,v6e-16,v5e-13", "--price", "v5e=2", "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)
    assert (first["target"], first["dollars_an_hour"], first["price"]["source"]) == ("v5e:4x4", 32.0, "as given")
    assert first["tokens"] == 64 * 64
    assert second["seconds"] < first["seconds"]
    assert "13 chips" in third["error"]
    llama = [
        "estimate",
        "llama2-7b",
        "--dtype",
        "bfloat16",
        "--target",
        "v5e-64",
        "--mesh",
        "fsdp=16,model=4",
        "--json",
    ]
    assert main(llama) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    assert 0.2 < report["mfu"] < 0.7
    assert report["fastest"] < report["seconds"] < report["slowest"]
