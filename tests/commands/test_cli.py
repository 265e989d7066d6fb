"""The console command: what it lists, what it imports, what it says to a misspelt name."""

import importlib.util
import subprocess
import sys

import pytest

from mamba_jax import cli


def test_help_lists_every_command_in_a_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in cli.COMMANDS.items():
        assert sum(line.split() == [name, *about.split()] for line in lines) == 1


def test_without_a_command_the_help_goes_to_stderr(capsys):
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "generate" in output.err


@pytest.mark.parametrize(("name", "near"), [("generat", "generate"), ("trian", "train")])
def test_an_unknown_command_suggests_the_nearest(name, near, capsys):
    assert cli.main([name, "--help"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f'"{name}"; did you mean "{near}"?' in error


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_commands_exist(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("arguments", [["--help"]] + [[name, "--help"] for name in cli.COMMANDS])
def test_help_needs_no_jax(arguments):
    program = f"""
import sys
from mamba_jax import cli
try:
    status = cli.main({arguments!r})
except SystemExit as exit:  # argparse leaves this way
    status = exit.code
assert status == 0, status
assert not {{"jax", "flax", "orbax", "matplotlib"}} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage" in ran.stdout


def test_module_and_console_command_are_the_same():
    ran = subprocess.run(
        [sys.executable, "-m", "mamba_jax", "nonsense"], capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.startswith('error: unknown command "nonsense"')
