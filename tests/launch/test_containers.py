"""The Dockerfile and the compose file: what they name exists, and they agree with each other.

They are not built or run, which would need Docker.
"""

import json
import pathlib
import re
import shlex
import tomllib

import yaml

from mamba_jax import serve

ROOT = pathlib.Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions():
    """Returns (word, rest) of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def rest(word):
    return [rest for name, rest in instructions() if name == word]


def entrypoint():
    return json.loads(rest("ENTRYPOINT")[0])


def ignored(path):
    """Whether .dockerignore excludes a top-level path; its last matching line decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().split():
        if line.lstrip("!") in ("*", path):
            out = not line.startswith("!")
    return out


def test_what_is_copied_exists_and_is_not_ignored():
    copied = [source for line in rest("COPY") for source in shlex.split(line)[:-1]]
    assert {"mamba_jax", "pyproject.toml", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and not ignored(source), source
    assert PROJECT["project"]["readme"] in copied  # which building the package reads
    assert ignored(".git") and ignored("checkpoints")


def test_it_installs_the_tested_versions_and_runs_without_root():
    (image,) = rest("FROM")
    version = re.fullmatch(r"python:(\d\.\d+)-slim", image)[1]
    assert f'python_version == "{version}"' in (ROOT / "constraints.txt").read_text()
    first = next(line for line in rest("RUN") if "pip install" in line)
    assert "--constraint constraints.txt" in first and '".[serve${EXTRA:+,$EXTRA}]"' in first
    (user,) = rest("USER")
    assert f"--create-home {user}" in " ".join(rest("RUN"))
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_the_servers_flags_are_valid_and_the_health_check_uses_its_port():
    python, dash_m, module, *flags = entrypoint()
    assert (python, dash_m, module) == ("python", "-m", "mamba_jax.serve")
    arguments = serve.parse(flags)
    assert arguments.host == "0.0.0.0"  # the container's own network
    assert rest("EXPOSE") == [str(arguments.port)]
    (check,) = rest("HEALTHCHECK")
    command = json.loads(check.partition("CMD")[2])
    assert f"http://127.0.0.1:{arguments.port}/ready" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")


def test_compose_agrees():
    service, gpu = COMPOSE["services"]["serve"], COMPOSE["services"]["gpu"]
    arguments = serve.parse([*entrypoint()[3:], *service["command"]])
    assert service["ports"] == [f"127.0.0.1:8000:{arguments.port}"]
    seconds = float(service["stop_grace_period"].removesuffix("s"))
    assert seconds > arguments.drain_secs + 5
    mount, cache = service["volumes"]
    assert (mount["target"], mount["read_only"]) == (arguments.checkpoint, True)
    name, folder = cache.split(":")
    assert name in COMPOSE["volumes"]
    assert f"--owner {rest('USER')[0]} {folder}" in " ".join(rest("RUN"))
    assert list(service["environment"]) == [serve.KEY_VARIABLE]
    assert gpu["extends"]["service"] in COMPOSE["services"]
    assert gpu["build"]["args"]["EXTRA"] in PROJECT["project"]["optional-dependencies"]
    assert rest("ARG") == ['EXTRA=""']
