"""The console command: what it lists, what it imports, and its error for a misspelt name."""

import contextlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import mamba_jax
from mamba_jax import paths
from mamba_jax.cli import main, train_arguments
from mamba_jax.config import default_config, freeze
from mamba_jax.errors import command


def test_help_lists_every_command_in_a_line(capsys):
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in main.COMMANDS.items():
        assert sum(line.split() == [name, *about.split()] for line in lines) == 1


def test_without_a_command_the_help_goes_to_stderr(capsys):
    assert main.main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "generate" in output.err


@pytest.mark.parametrize(("name", "near"), [("generat", "generate"), ("trian", "train")])
def test_an_unknown_command_suggests_the_nearest(name, near, capsys):
    assert main.main([name, "--help"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f'"{name}"; did you mean "{near}"?' in error


@pytest.mark.parametrize("module", [module for module, _ in main.COMMANDS.values()])
def test_commands_exist(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("arguments", [["--help"]] + [[name, "--help"] for name in main.COMMANDS])
def test_help_needs_no_jax(arguments):
    program = f"""
import sys
from mamba_jax.cli import main
try:
    status = main.main({arguments!r})
except SystemExit as exit:  # argparse leaves this way
    status = exit.code
assert status == 0, status
assert not {{"jax", "flax", "orbax", "matplotlib"}} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage" in ran.stdout


ROOT = pathlib.Path(main.__file__).parents[2]
PROGRAMS = [
    *(["-m", module] for module, _ in main.COMMANDS.values()),
    *([str(ROOT / "launch" / script)] for script in ("sweep.py", "inference.py")),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[-1].rpartition("/")[2])
def test_ctrl_c_during_imports_is_one_line(program, tmp_path):
    """Every command imports argparse; this one raises Ctrl-C in the import."""
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


# --- ~ is the home folder -------------------------------------------------------------------------

HOME = "/home/somebody"
LINES = {  # as typed → as the command gets it
    "--output_dir=~/out": f"--output_dir={HOME}/out",
    "--output_dir ~/out": f"--output_dir {HOME}/out",
    "--config.log_dir=~/logs": f"--config.log_dir={HOME}/logs",
    "--config.data.data_dir ~": f"--config.data.data_dir {HOME}",
    "--resume=~/run/step_2 --dry_run": f"--resume={HOME}/run/step_2 --dry_run",
    "--ensemble ~/a ~/b --chat": f"--ensemble {HOME}/a {HOME}/b --chat",
    "run ~/run --out ~/page.html": f"run {HOME}/run --out {HOME}/page.html",
    "compare --json ~/a ~/b": f"compare --json {HOME}/a {HOME}/b",
    "--output_dir=./~/out": "--output_dir=./~/out",
    "--output_dir=out~": "--output_dir=out~",
    "--prompt=~/text --stop ~/": "--prompt=~/text --stop ~/",  # text is not a path
    "--config.sample_prompt ~/x": "--config.sample_prompt ~/x",
}


@pytest.mark.parametrize("line", LINES)
def test_a_tilde_is_the_home_folder_in_paths_alone(line, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    given = []
    assert command(lambda argv: given.append(argv) or 0)(line.split()) == 0
    assert given == [LINES[line].split()]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_flag_that_takes_a_path_is_expanded(name, capsys, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    subcommands = ["flops", "run", "compare"] if name == "report" else [None]
    for subcommand in subcommands:
        with contextlib.suppress(SystemExit):  # argparse leaves this way
            main.main([word for word in (name, subcommand, "--help") if word])
        printed = capsys.readouterr().out
        assert "usage" in printed
        for flag in re.findall(r"--(\w+)[ =](?:DIR|FILE|PATH)\b", printed):
            assert paths.expand(flag, "~/x") == f"{HOME}/x", flag


def test_fields_of_a_config_file_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = default_config()
    config.update(output_dir="~/out", log_dir="~/logs", tensorboard_dir="~/runs")
    config.data.update(cache_dir="~/cache", tokenizer="~/tokenizer.json")
    config.data.mixture = ({"data_dir": "~/texts"}, {"dataset": "~/rows"})
    config.sample_prompt = "~/"
    run = freeze(config)
    assert run.output_dir == f"{tmp_path}/out" and run.log_dir == f"{tmp_path}/logs"
    assert run.tensorboard_dir == f"{tmp_path}/runs" and run.sample_prompt == "~/"
    data = run.data
    assert data.mixture[0].data_dir == f"{tmp_path}/texts"
    assert data.mixture[1].dataset == f"{tmp_path}/rows"
    assert data.cache_dir == f"{tmp_path}/cache" and data.tokenizer == f"{tmp_path}/tokenizer.json"

    file = pathlib.Path(tmp_path, "own.json")
    file.write_text('{"output_dir": "~/out"}')
    assert train_arguments.read([f"--config={file}"]).config.output_dir == f"{tmp_path}/out"
    assert not os.path.exists("~")


def test_version_names_packages_and_devices():
    ran = subprocess.run(
        [sys.executable, "-m", "mamba_jax", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    first, python, packages, *devices = ran.stdout.splitlines()
    assert first == f"mamba_jax {mamba_jax.__version__}" and ran.returncode == 0
    assert python.startswith(f"Python {sys.version.split()[0]} on ")
    assert f"jax {jax.__version__}, jaxlib " in packages and "orbax-checkpoint " in packages
    assert devices == ["1 x cpu"]


def test_version_without_a_working_device_says_why(monkeypatch):
    def fail():
        raise RuntimeError("no such driver\nand more")

    monkeypatch.setattr(jax, "devices", fail)
    assert main.version().splitlines()[-1] == "no device: no such driver"


def test_a_closed_pipe_is_not_an_error():
    shell = f"{sys.executable} -m mamba_jax train --help_config | head -n 1"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert ran.stdout.startswith("--config.name=") and ran.stderr == ""
    assert ran.returncode == 0
