"""The benchmarks run: short, on this machine, with no claim about their figures."""

import csv
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jaxpar[plan]'"
)


def load(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_overhead_compares_every_case(tmp_path):
    figures = load("overhead").main(["--quick", "--json", str(tmp_path / "figures.json")])
    assert len(figures) == 9
    assert all(0 < row["ratio"] < 100 for row in figures.values())
    assert json.loads((tmp_path / "figures.json").read_text())["figures"].keys() == figures.keys()


@pytest.mark.slow
def test_fit_is_compared_with_its_loop(tmp_path):
    # A process of its own: one device, and an option of XLA's that is read once.
    command = [sys.executable, str(FOLDER / "fit_overhead.py"), "--quick", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures.keys() == {"passed", "computed"}
    assert done.returncode == any(row["ratio"] > 1.01 for row in figures.values())
    assert all(0 < row["sure"][0] <= row["ratio"] <= row["sure"][1] < 1000 for row in figures.values())


@pytest.mark.slow
@pytest.mark.parametrize("remat", [[], ["--scan", "--remat", "dots"]], ids=["kept", "scan, remat"])
def test_the_gpu_benchmark_runs_tiny_on_a_cpu(remat):
    figures = load("gpu").main(["--tiny", *remat])
    assert figures["tokens_per_second"] > 0
    assert figures["loss"] == pytest.approx(5.5, abs=0.6)
    assert figures["compiled_bytes"] > 4 * figures["parameters"]


ROW = {
    "id": "tiny",
    "chip": "v5e",
    "topology": "4x4",
    "slices": "1",
    "layers": "2",
    "d_model": "256",
    "heads": "4",
    "kv_heads": "4",
    "head_dim": "128",
    "d_ff": "1024",
    "gated": "no",
    "vocab": "1024",
    "tied_embed": "yes",
    "parallel_block": "yes",
    "seq_len": "256",
    "per_device_batch": "2",
    "mesh": "fsdp=4,tensor=4,dcn_data=1",
    "remat": "full",
    "attention_kernel": "pallas_flash_attention(block 512)",
    "implied_step_s": "0.002",
}


@needs_compiler
@pytest.mark.slow
def test_a_table_of_published_steps_is_estimated_row_by_row(tmp_path, capsys, monkeypatch):
    rows = [
        ROW,
        {**ROW, "id": "two", "slices": "2", "mesh": "fsdp=16,dcn_data=2"},
        {**ROW, "id": "odd", "remat": "odd"},
    ]
    with (tmp_path / "table.csv").open("w") as file:
        table = csv.DictWriter(file, ROW)
        table.writeheader()
        table.writerows(rows)
    monkeypatch.setattr("sys.argv", ["published.py", "--table", str(tmp_path / "table.csv")])
    load("published").main()
    head, first, second, odd, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (head, first, second, odd)] == ["row", "tiny", "two", "odd"]
    assert "not estimated: remat is 'odd'; it is one of full" in odd
    assert re.fullmatch(r"mean absolute error [\d.]+ % over 2 rows; bare rule [\d.]+ %", last)
    monkeypatch.setattr("sys.argv", ["published.py", "--table", str(tmp_path / "table.csv"), "--where", "slices=2"])
    load("published").main()
    assert "over 1 rows" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["published.py", "--table", str(tmp_path / "table.csv"), "--where", "color=2"])
    with pytest.raises(SystemExit, match="columns \\['color'\\], which"):
        load("published").main()


def test_rooflines_decide_most_of_the_chosen_cases():
    ranking = load("ranking")
    decided = [ranking.pick_decided(case, choices) for case, choices in ranking.chosen_cases()]
    assert sum(len(choices) >= 3 for choices in decided) >= 10


@needs_compiler
@pytest.mark.slow
def test_a_ranking_case_is_in_order(capsys):
    ranking = load("ranking")
    case, choices = next(pair for pair in ranking.chosen_cases() if pair[0].name.startswith("few tokens, v5e"))
    assert ranking.compare(case, ranking.pick_decided(case, choices)) == (3, 3)
