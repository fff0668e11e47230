"""The README's Python runs, its commands are well-formed, and its table names what the package has."""

import pathlib
import re

import pytest

import jaxpar

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.devices(8)
def test_the_api_screen_runs_as_it_stands(capsys):
    [screen] = [text for kind, text in BLOCKS if kind == "python"]
    names = {}
    exec(compile(screen, str(README), "exec"), names)
    assert set(names["metrics"]) == {"accuracy"}
    assert "params/up/kernel" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(re.findall(r"jaxpar\.(\w+)", README.read_text()))))
def test_every_name_that_the_readme_uses_is_public(name):
    assert name in jaxpar.__all__


def test_the_two_commands_each_make_their_environment():
    commands = [text.strip() for kind, text in BLOCKS if kind == "bash"]
    assert len(commands) == 2
    assert all(command.startswith("python -m venv .venv && .venv/bin/pip install -e ") for command in commands)
