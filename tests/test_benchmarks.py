"""The benchmarks run: short, on this machine, with no claim about their figures."""

import importlib.util
import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def load(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_overhead_compares_every_case(tmp_path):
    figures = load("overhead").main(["--quick", "--json", str(tmp_path / "figures.json")])
    assert len(figures) == 7
    assert all(0 < row["ratio"] < 100 for row in figures.values())
    assert json.loads((tmp_path / "figures.json").read_text())["figures"].keys() == figures.keys()


@pytest.mark.slow
@pytest.mark.parametrize("remat", [[], ["--remat"]], ids=["kept", "remat"])
def test_the_gpu_benchmark_runs_tiny_on_a_cpu(remat):
    figures = load("gpu").main(["--tiny", *remat])
    assert figures["tokens_per_second"] > 0
    assert figures["loss"] == pytest.approx(5.5, abs=0.6)
    assert figures["compiled_bytes"] > 4 * figures["parameters"]
