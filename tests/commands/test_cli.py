"""The console command: what it lists, what it imports, what it says to a misspelt name."""

import importlib.util
import os
import pathlib
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


ROOT = pathlib.Path(cli.__file__).parents[1]
PROGRAMS = [
    *(["-m", module] for module, _ in cli.COMMANDS.values()),
    *([str(ROOT / "launch" / script)] for script in ("sweep.py", "inference.py")),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[-1].rpartition("/")[2])
def test_ctrl_c_during_imports_is_one_line(program, tmp_path):
    """Every command imports argparse; this one presses Ctrl-C meanwhile."""
    press = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "argparse.py").write_text(press)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_a_program_that_uses_the_package_keeps_its_hook():
    program = "import sys, mamba_jax; assert sys.excepthook is sys.__excepthook__"
    subprocess.run([sys.executable, "-c", program, "-m", "mamba_jax"], check=True)


def test_module_and_console_command_are_the_same():
    ran = subprocess.run(
        [sys.executable, "-m", "mamba_jax", "nonsense"], capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.startswith('error: unknown command "nonsense"')
