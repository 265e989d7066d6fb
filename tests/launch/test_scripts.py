"""The templates for clusters and clouds: shellcheck, what they call, and that flags exist."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from mamba_jax.cli import train_arguments

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
    *sorted(ROOT.glob("launch/*.sh")),
    *sorted(ROOT.glob("scripts/*.sh")),
    ROOT / "launch/slurm.sbatch",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, "--external-sources", script], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("cwd", [".", "launch"])
def test_the_launcher_runs_from_the_project_and_from_inside_launch(cwd):
    script = "./launch/train_background.sh" if cwd == "." else "./train_background.sh"
    done = subprocess.run(
        [script, "--config=configs/quickstart.py", "--sed=1"],
        cwd=ROOT / cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2  # it found the config, and then the mistake
    assert done.stderr.startswith('error: unknown flag --sed; did you mean "--seed"?')


def test_the_launcher_reports_a_missing_python(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/train_background.sh", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "env"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [tmp_path / "launch/train_background.sh"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no Python found")


# --- SkyPilot -------------------------------------------------------------------------------------


def test_the_skypilot_task_runs_a_command_that_exists():
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert set(task) == {
        "name", "resources", "workdir", "envs", "file_mounts", "setup", "run"
    }  # fmt: skip
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 76, 134]
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-n"], input=task[part], text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    (command,) = re.findall(r"-m mamba_jax.train (.*)", task["run"])
    words = command.replace("$FLAGS", task["envs"]["FLAGS"]).replace("$SKYPILOT_TASK_ID", "x")
    requested = train_arguments.read(words.split())
    assert requested.config.output_dir == "/checkpoints/x" and requested.resume == "auto"
    assert requested.config.name == "medium"


# --- Cloud TPU ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_login(tmp_path, monkeypatch):
    """In case a real gcloud is called: without an account and a project it creates nothing."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no_login"))


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A gcloud that records its arguments and runs --command in a folder that acts as the VM."""
    (tmp_path / "bin").mkdir()
    vm = tmp_path / "vm"
    (vm / "mamba_jax").mkdir(parents=True)
    fake = tmp_path / "bin/gcloud"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'printf "%s\\n" "$*" >>{tmp_path}/calls\n'
        f"cd {vm}\n"
        'for word; do [[ $word != --command=* ]] || { bash -c "${word#--command=}"; exit; }; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return tmp_path


def tpu(*words, **environment):
    return subprocess.run(
        ["./launch/tpu_vm.sh", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_tpu_script_creates_and_deletes_a_vm(gcloud):
    assert tpu("create", TPU_NAME="mine", TPU_SPOT="1").returncode == 0
    assert tpu("delete", TPU_NAME="mine").returncode == 0
    assert (gcloud / "calls").read_text().splitlines() == [
        "compute tpus tpu-vm create mine --zone=us-west4-a --accelerator-type=v5litepod-4 "
        "--version=v2-alpha-tpuv5-lite --spot",
        "compute tpus tpu-vm delete mine --zone=us-west4-a",
    ]


def with_its_functions(script, *words):
    """Runs a script that has the functions of ``tpu_vm.sh``."""
    source = "source <(sed -n '/^tpu()/,/^there/p' launch/tpu_vm.sh); "
    return subprocess.run(
        ["bash", "-c", source + script, "_", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "name": "n", "zone": "z"},
    )


def test_the_tpu_script_passes_words_on_whole(gcloud):
    words = ("--text_column", "a b,c", "it's $HOME")
    done = with_its_functions("""there printf '%s|' "$@" """, *words)
    assert done.stdout == "--text_column|a b,c|it's $HOME|", done.stderr


def test_the_tpu_script_copies_the_project(gcloud):
    text = (ROOT / "launch/tpu_vm.sh").read_text()
    copying = re.search(r"git ls-files.*?--directory=mamba_jax\"", text, re.S)
    assert with_its_functions(copying[0]).returncode == 0
    folder = gcloud / "vm/mamba_jax"
    assert (folder / "pyproject.toml").is_file() and (folder / "launch/setup.sh").is_file()
    assert not (folder / ".venv").exists() and not (folder / ".git").exists()


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2), (["stat"], 2)])
def test_the_tpu_script_shows_how_it_is_used(gcloud, words, code):
    done = tpu(*words)
    assert done.returncode == code
    output = done.stdout if code == 0 else done.stderr
    assert all(f"tpu_vm.sh {action}" in output for action in ("create", "start", "fetch", "delete"))


def test_the_tpu_script_reports_a_missing_gcloud(tmp_path):
    for tool in ("bash", "dirname", "env"):  # a machine that has nothing else
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = tpu("create", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: gcloud is not installed")
