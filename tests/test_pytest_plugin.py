"""The plugin as a project outside this one gets it: by its entry point alone, in a run of its own."""

import pytest

from jaxpar import testing
from jaxpar.pytest_plugin import STRATEGIES

pytest_plugins = ["pytester"]

COUNT_DEVICES = "import jax\ndef test_count(): assert len(jax.devices()) == {count}, len(jax.devices())\n"
NO_JAX = """
import sys
def pytest_unconfigure(config):
    assert "jax" not in sys.modules, "the plugin imported jax"
"""
# name: environment, arguments, ini lines, the number of devices that a test then sees
SETTINGS = {
    "the option": ({}, ["--fake-devices=4"], "", 4),
    "the ini file": ({}, [], "fake_devices = 3", 3),
    "the option before the ini file": ({}, ["--fake-devices=2"], "fake_devices = 3", 2),
    "XLA_FLAGS before the option": (
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
        ["--fake-devices=4"],
        "",
        5,
    ),
    "JAX_NUM_CPU_DEVICES before the option": ({"JAX_NUM_CPU_DEVICES": "6"}, ["--fake-devices=4"], "", 6),
    "the option with JAX_PLATFORMS=cpu": ({"JAX_PLATFORMS": "cpu"}, ["--fake-devices=4"], "", 4),
}


def first_is_fast(cases):
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "XLA_FLAGS", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


def run(pytester, *args, **files):
    """Runs pytest on its own in a new folder, on one CPU device unless the arguments ask for more."""
    if files:
        pytester.makepyfile(**files)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs", "--strict-markers", *args)


# One of them shows that the option is read; a run of its own takes two seconds.
@pytest.mark.parametrize("setting", first_is_fast(SETTINGS))
def test_a_run_has_the_devices_asked_for(pytester, monkeypatch, setting):
    environment, args, ini, count = SETTINGS[setting]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pytester.makeini(f"[pytest]\n{ini}\n")
    run(pytester, *args, test_it=COUNT_DEVICES.format(count=count)).assert_outcomes(passed=1)


@pytest.mark.slow
def test_each_process_of_xdist_has_the_devices_asked_for(pytester):
    code = COUNT_DEVICES.format(count=4)
    run(pytester, "-n", "2", "--fake-devices=4", test_one=code, test_two=code).assert_outcomes(passed=2)


def test_devices_are_set_before_a_conftest_starts_jax(pytester):
    conftest = "import jax\nCOUNT = len(jax.devices())\n"
    result = run(
        pytester,
        "--fake-devices=4",
        conftest=conftest,
        test_it="from conftest import COUNT\ndef test(): assert COUNT == 4",
    )
    result.assert_outcomes(passed=1)


def test_devices_are_set_though_another_plugin_has_imported_jax(pytester):
    run(
        pytester, "-p", "early", "--fake-devices=4", early="import jax\n", test_it=COUNT_DEVICES.format(count=4)
    ).assert_outcomes(passed=1)


def test_a_jax_that_another_plugin_started_is_a_named_error(pytester):
    result = run(pytester, "-p", "early", "--fake-devices=4", early="import jax\njax.devices()\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*another plugin has already started JAX, with 1 devices; set JAX_NUM_CPU_DEVICES=4*")


@pytest.mark.parametrize("platforms", first_is_fast(["cuda", "tpu", "cuda,cpu"]))
def test_real_devices_are_left_alone(pytester, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    test = f"""
        import os
        def test_environment():
            assert os.environ["JAX_PLATFORMS"] == {platforms!r}
            assert "JAX_NUM_CPU_DEVICES" not in os.environ
    """
    run(pytester, "--fake-devices=4", conftest=NO_JAX, test_it=test).assert_outcomes(passed=1)


@pytest.mark.parametrize("args", first_is_fast([("--fake-devices=8",), (), ("--markers",), ("--fixtures",)]))
def test_jax_is_not_imported_for_tests_that_do_not_ask(pytester, args):
    result = run(pytester, *args, conftest=NO_JAX, test_it="def test(): pass\n")
    assert result.ret == 0
    assert "imported jax" not in result.stderr.str() + result.stdout.str()


def test_collecting_tests_that_ask_does_not_import_jax(pytester):
    test = """
        import pytest
        @pytest.mark.devices(8)
        def test_strategy(jaxpar_strategy, jaxpar_mesh): pass
    """
    result = run(pytester, "--collect-only", "-q", conftest=NO_JAX, test_it=test)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"test_it.py::test_strategy?{name}?" for name in STRATEGIES])


@pytest.mark.parametrize("text", first_is_fast(["0", "-1", "many"]))
def test_a_count_that_can_not_be_is_a_usage_error(pytester, text):
    pytester.makeini(f"[pytest]\nfake_devices = {text}\n")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(f"*fake devices are '{text}'; give a whole number, 1 or more*")


def test_a_test_that_needs_more_devices_is_skipped_with_both_numbers(pytester):
    test = """
        import pytest
        @pytest.mark.devices(4)
        def test_four(): pass
        @pytest.mark.devices(8)
        def test_eight(): raise AssertionError("ran")
        @pytest.mark.devices(8)
        class TestClass:
            @pytest.mark.devices(2)
            def test_the_most_counts(self): raise AssertionError("ran")
        def test_mesh(jaxpar_mesh): jaxpar_mesh("data=2,model=4")
        def test_small_mesh(jaxpar_mesh):
            assert dict(jaxpar_mesh("model=2").shape) == {"model": 2}
            assert dict(jaxpar_mesh(data=-1, model=2).shape) == {"data": 2, "model": 2}
            assert dict(jaxpar_mesh().shape) == {"data": 4}
    """
    result = run(pytester, "--fake-devices=4", test_it=test)
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines(
        [
            "SKIPPED*the test needs 8 devices, but there are 4; run pytest --fake-devices=8",
            "SKIPPED*a mesh of data=2,model=4 needs 8 devices, but there are 4; run pytest --fake-devices=8",
        ]
    )


def test_a_skip_names_the_flag_that_set_the_number(pytester, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    test = "import pytest\n@pytest.mark.devices(2)\ndef test(): pass\n"
    result = run(pytester, test_it=test)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines("*needs 2 devices, but there is 1; XLA_FLAGS says so: ask it for 2, or unset it*")


def test_a_wrong_mark_fails_and_says_how_to_write_it(pytester):
    marks = ["devices", "devices()", "devices('8')", "devices(True)", "devices(8, 4)", "devices(count=8)"]
    tests = [f"@pytest.mark.{mark}\ndef test_{number}(): pass\n" for number, mark in enumerate(marks)]
    result = run(pytester, test_it="import pytest\n" + "".join(tests))
    result.assert_outcomes(errors=len(marks))
    result.stdout.fnmatch_lines(["*give one whole number, as devices(8).*"] * len(marks))


def test_the_strategies_are_the_table_of_testing():
    assert tuple(testing.strategies(8)) == STRATEGIES


def test_strategies_use_the_devices_marked_and_skip_where_they_do_not_fit(pytester):
    test = """
        import pytest
        @pytest.mark.devices(2)
        def test_two(jaxpar_strategy):
            assert jaxpar_strategy.mesh.size == (1 if "'data': 1}" in jaxpar_strategy.name else 2)
        def test_all(jaxpar_strategy):
            assert jaxpar_strategy.mesh.size in (1, 4)
    """
    result = run(pytester, "--fake-devices=4", test_it=test)
    result.assert_outcomes(passed=14, skipped=2)
    result.stdout.fnmatch_lines(
        "SKIPPED*strategy 'data_model' needs an even number of devices, 4 or more, but there are 2*"
    )
