"""Files that say the same thing twice say the same thing."""

import pathlib
import re
import subprocess
import tomllib

import pytest
import yaml

import mamba_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_the_core_of_pyproject_with_cuda():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    core = {line.partition("  #")[0] for line in PROJECT["dependencies"]}
    # A dependency of another one may be missing from either.
    assert required == {line.replace("jax>=0", "jax[cuda12]>=0") for line in core}


def test_constraints_pin_every_direct_dependency():
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = {name.lower().replace("-", "_") for name in pinned}
    core = {re.split(r"[\[<>=]", line)[0] for line in PROJECT["dependencies"]}
    assert {name.lower().replace("-", "_") for name in core} <= names


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mamba_jax.__version__


@pytest.mark.parametrize("workflow", sorted(ROOT.glob(".github/workflows/*.yml")), ids=str)
def test_workflows_call_scripts_of_the_project(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    assert jobs
    for name, job in jobs.items():
        runs = [step["run"] for step in job["steps"] if "run" in step]
        scripts = [path for run in runs for path in re.findall(r"\./[\w/.]+", run)]
        assert scripts, name
        for path in scripts:
            assert (ROOT / path).is_file(), f"{name}: {path}"


def test_every_test_file_is_in_exactly_one_shard():
    command = [ROOT / "scripts" / "check.sh", "files"]
    shards = [subprocess.check_output([*command, str(i), "4"], text=True) for i in range(1, 5)]
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py"))
    assert sorted("".join(shards).splitlines()) == files
    sizes = [sum((ROOT / file).stat().st_size for file in shard.splitlines()) for shard in shards]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("words", ["5 4", "0 4", "4", "", "a 4"])
def test_a_shard_that_does_not_exist_is_an_error(words):
    """Without files, pytest would run all tests."""
    script = ROOT / "scripts" / "check.sh"
    ran = subprocess.run([script, "shard", *words.split()], capture_output=True, text=True)
    assert ran.returncode == 2 and "error: no shard" in ran.stderr and not ran.stdout


@pytest.mark.parametrize("form", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=str)
def test_issue_forms_ask_for_something(form):
    fields = yaml.safe_load(form.read_text())
    assert fields["name"] and fields["description"]
    assert any(field.get("validations", {}).get("required") for field in fields["body"])
