"""The server's process, started as users start it: its command, uvicorn's, and Ray's."""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest
from uvicorn.config import STARTUP_FAILURE

from mamba_jax import serve
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from tests.support.tiny_models import model_of

from .conftest import offline
from .served import post, request, until

ROOT = pathlib.Path(__file__).parents[2]
GREEDY = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}
# Greedily this model repeats itself; about a second's work.
LONG = {"prompt": "On and on", "max_tokens": 1_000, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the tiny Mamba, and a cache of compiled programs that all servers here share."""
    folder = tmp_path_factory.mktemp("run")
    model = model_of("mamba")
    config = RunConfig(name="tiny", model=model.config, data=DataConfig(tokenizer="bytes"))
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": model.params, "step": jnp.int32(3)}
        writer.save("final", state, Metadata(config, 3, 0, "none"))
    return folder


@contextlib.contextmanager
def started(folder, *command, cwd=ROOT, **environment):
    """Starts a server that prints its address; gives the process, its output and the port."""
    said = folder / "said"
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of compilation, which most of the time goes to
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    with open(said, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=environment, stderr=file, stdout=file
        )
    try:
        yield process, said
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _port(process, said):
    """Waits for the address."""

    def lines():
        assert process.poll() is None, said.read_text()
        return [line for line in said.read_text().splitlines() if "http://127.0.0.1:" in line]

    until(lines)
    return int(lines()[-1].partition("http://127.0.0.1:")[2].partition(";")[0].split()[0])


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_command_serves_and_sigterm_lets_requests_end(folder):
    command = ("-m", "mamba_jax.serve", f"--checkpoint={folder}", "--port=0", "--max_batch=1")
    more = "--drain_secs=120", "--max_prompt_tokens=9000", "--cors_origin=https://a.example"
    with started(folder, *command, *more, "--cors_origin=https://b.example") as (process, said):
        port = _port(process, said)
        until(lambda: request(port, "GET", "/ready")[0] == 200, secs=300)
        assert post(port, "/generate", GREEDY) == (200, {"response": offline("mamba", "def main(")})
        for letter, origin in (("a", "https://a.example"), ("b", "https://b.example"), ("c", None)):
            asking = {"Origin": f"https://{letter}.example"}
            headers = request(port, "GET", "/v1/models", headers=asking)[1]
            assert headers["access-control-allow-origin"] == origin
        # 128 bytes for each token of a prompt; a larger body is refused before it is sent.
        status, answer = post(port, "/generate", {"prompt": "a" * 1_150_000})
        assert status == 400 and "at most 9,000 tokens" in answer["error"]["message"]
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1152001\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        # Another one cannot have its port.
        again = [sys.executable, *command[:3], f"--port={port}"]
        done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: cannot listen on --host 127.0.0.1 --port {port}: Address already in use; "
            "choose another host or port\n"
        )
        content = json.dumps(LONG).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content) + content
            )
            answer = client.recv(1)
            process.send_signal(signal.SIGTERM)
            while piece := client.recv(1 << 16):
                answer += piece
        assert b"data: [DONE]" in answer
        assert answer.count(b'"finish_reason": "length"') == 1
        assert process.wait(60) == 0
        assert "Traceback" not in said.read_text()


def test_ctrl_c_stops_it_while_it_still_compiles(folder):
    command = ("-m", "mamba_jax.serve", f"--checkpoint={folder}", "--port=0", "--max_batch=1")
    with started(folder, *command) as (process, said):
        _port(process, said)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in said.read_text()


@pytest.mark.slow  # compiles for sixteen slots
def test_uvicorns_own_command(folder):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/final").symlink_to(folder / "final")
    port = _free_port()
    # From the folder where the checkpoints are; inside launch/ there are none.
    command = ("-m", "uvicorn", f"--app-dir={ROOT / 'launch'}", "api:app", f"--port={port}")
    with started(folder, *command, cwd=folder, MAMBA_JAX_API_KEY="secret") as (process, said):
        assert _port(process, said) == port
        until(lambda: request(port, "GET", "/ready")[0] == 200, secs=300)
        assert post(port, "/generate", GREEDY)[0] == 401
        answer = post(port, "/generate", GREEDY, headers={"Authorization": "Bearer secret"})
        assert answer == (200, {"response": offline("mamba", "def main(")})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_uvicorn_reports_the_error_in_one_line_and_does_not_restart(tmp_path):
    """With the status that keeps it from restarting its workers forever."""
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "api:app", "--port=0", "--log-level=warning"],
        cwd=ROOT / "launch",
        env=os.environ | {"MAMBA_JAX_CHECKPOINT": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == STARTUP_FAILURE, done.stderr
    *_, line = done.stderr.splitlines()  # a busy machine may make JAX warn before it
    assert line == (
        f"error: checkpoint {tmp_path}/none does not exist; give a step_N or final folder"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=none"], "checkpoint none does not exist; give a step_N or final folder"),
        (["--port=70000"], "cannot listen on --host 127.0.0.1 --port 70000: "),
        (["--host=no.such.host.invalid"], "cannot listen on --host no.such.host.invalid"),
        (["--max_batch=0"], "max_batch=0 must be at least 1"),
        (["--scan=fast"], "fast"),
        (["--cors_origin=https://a.example/"], 'cors_origin="https://a.example/" is not an origin'),
        (
            ["--cors_origin=*", "--cors_origin=a.example"],
            'cors_origin="a.example" is not an origin',
        ),
        (["--cors_origin=https://*.example"], 'cors_origin="https://*.example" is not an origin'),
    ],
)
def test_mistakes_are_one_line(folder, flags, message, capsys):
    assert serve.main([f"--checkpoint={folder}", "--port=0", *flags]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replicas=0"], "--replicas=0 must be at least 1"),
        (["--min_replicas=1"], "give --replicas alone, or --min_replicas and --max_replicas"),
        (["--replicas=1", "--min_replicas=1", "--max_replicas=2"], "give --replicas alone"),
        (["--min_replicas=3", "--max_replicas=2"], "--min_replicas=3 --max_replicas=2: "),
    ],
)
def test_numbers_of_replicas_go_together(flags, message, capsys):
    main = runpy.run_path(str(ROOT / "launch/ray_serve.py"))["main"]
    assert main(["--checkpoint=none", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.slow
def test_replicas_of_ray_answer_as_the_server_does(folder):
    pytest.importorskip("ray.serve")
    port = _free_port()
    command = (
        *("launch/ray_serve.py", f"--checkpoint={folder}", f"--port={port}", "--max_batch=2"),
        *("--replicas=2", "--num_cpus=0.5"),
    )
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    with started(folder, *command, **quiet) as (process, said):
        until(lambda: "; Ctrl-C stops it" in said.read_text() or process.poll(), secs=300)
        assert process.poll() is None, said.read_text()
        expected = offline("mamba", "def main(")
        for _ in range(4):
            _, answer = post(port, "/v1/completions", GREEDY)
            assert answer["choices"][0]["text"] == expected
        _, _, stream = request(port, "POST", "/v1/completions", GREEDY | {"stream": True})
        *chunks, last, _ = stream.decode().split("\n\n")
        pieces = [json.loads(c.removeprefix("data: "))["choices"][0]["text"] for c in chunks]
        assert ("".join(pieces), last) == (expected, "data: [DONE]")
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
