"""The server under load: 16 clients at once, a shared prompt, two thousand requests.

A server process of its own, on localhost, over random weights of the size ``small``; clients are
threads of this process. All texts are greedy, and each is compared with offline generation.
"""

import atexit
import concurrent.futures
import functools
import http.client
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import Any

from benchmarks import harness
from benchmarks.harness import Candidate, Check, Context, Prepared, Row
from benchmarks.report import bars

BASELINE = "mamba_jax"
ALONE, UNREAD = "one client after another", "nothing shared"
CLIENTS, PROMPT_TOKENS = 16, 2_000
NEW_TOKENS = 100  # as many as the default of /generate
REQUESTS, FEW_TOKENS = 2_000, 8  # of the endurance
SPEED_UP, HIT_SPEED_UP, LEAK_BYTES = 5.0, 10.0, 50e6
RATE = "tokens_per_sec"
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "he",
    "it",
    "with",
    "is",
    "for",
    "as",
)


def cases(context: Context) -> list[dict[str, Any]]:
    """Throughput; a prompt that is in the prefix cache; many requests."""
    requests = 100 if context.quick else REQUESTS
    return [
        {"task": "throughput", "size": f"{CLIENTS} clients, {NEW_TOKENS} tokens each"},
        {"task": "first token", "size": f"prompt of {PROMPT_TOKENS:,} tokens"},
        {"task": "endurance", "size": f"{requests:,} requests, {FEW_TOKENS} tokens each"},
    ]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """Ways to send requests to the same server."""
    server = functools.partial(running, context.quick)
    if case["task"] == "throughput":
        return [
            Candidate(BASELINE, lambda: together(server())),
            Candidate(ALONE, lambda: one_by_one(server())),
        ]
    if case["task"] == "first token":
        return [
            Candidate(BASELINE, lambda: first_token(server(), shared=True)),
            Candidate(UNREAD, lambda: first_token(server(), shared=False)),
        ]
    count = 100 if context.quick else REQUESTS
    return [Candidate(BASELINE, lambda: endurance(server(), count))]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures the candidates in turns."""
    rounds = {"throughput": 5, "first token": 7, "endurance": 1}[case["task"]]
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=1 if context.quick else rounds,
        candidate_secs=900.0,
        deadline=context.deadline,
    )
    for row in rows:  # of all runs, where the harness knows the first one's
        row.metrics |= _metrics.get((row.case["task"], row.name), {})


_metrics: dict[tuple[str, str], dict[str, float]] = {}  # by task and candidate

# --- the server


class Server:
    """A process that serves a checkpoint, and the texts that offline generation gives for it."""

    def __init__(self, quick: bool):
        from mamba_jax.data.tokenizers.load import load_tokenizer

        self._folder = tempfile.TemporaryDirectory()
        self._model, self._params = write_checkpoint(pathlib.Path(self._folder.name), quick)
        self._tokenizer = load_tokenizer("gpt2")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mamba_jax.serve", "--checkpoint", self._folder.name),
                *("--port", "0", "--max_batch", str(CLIENTS)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.port = self._wait_for_port()
        atexit.register(self.close)
        self._known: dict[tuple[str, int], str] = {}

    def _wait_for_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("serving on"):
                break
        else:
            raise harness.NotMeasured("the server did not start")
        port = int(line.partition(";")[0].rpartition(":")[2])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                    return port
            except OSError:  # a status of 503 among them
                if self.process.poll() is not None:
                    raise harness.NotMeasured("the server ended") from None
                time.sleep(0.2)

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait(60)
        self._folder.cleanup()

    def expected(self, prompt: str, max_tokens: int) -> str:
        """The texts of offline generation, one for each prompt."""
        from mamba_jax.generation import generate_text

        if (prompt, max_tokens) not in self._known:
            how = {
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 0,
            }
            model = self._params, self._model, self._tokenizer
            (self._known[prompt, max_tokens],) = generate_text(*model, [prompt], **how)
        return self._known[prompt, max_tokens]

    def rss_bytes(self) -> float:
        """The memory that the process holds now."""
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) * 1024
        return 0.0


@functools.cache
def running(quick: bool) -> Server:
    """The one server of a run."""
    return Server(quick)


def write_checkpoint(folder: pathlib.Path, quick: bool) -> tuple[Any, Any]:
    """Saves random weights; returns their structure and them. The head is not tied: a random tied
    one would only repeat the last token."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
    from mamba_jax.config import RunConfig
    from mamba_jax.models import build

    config = RunConfig()
    small = {"d_model": 64, "n_layers": 2} if quick else {"d_model": 384, "n_layers": 6}
    model = dataclasses.replace(
        config.model, family="mamba", vocab_size=50_257, tie_embeddings=False, **small
    )
    config = dataclasses.replace(config, name="small", model=model)
    params = jax.jit(build.init, static_argnums=0)(model, jax.random.key(0))
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=lambda line: None) as writer:
        state = {"params": params, "step": jnp.int32(0)}
        writer.save("final", state, Metadata(config, 0, 0, "none"))
    return model, params


# --- clients


def ask(server: Server, prompt: str, max_tokens: int = NEW_TOKENS) -> tuple[str, list[float]]:
    """Requests a stream; returns the text, and when each part came after the request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    begin = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    text, times = "", []
    for line in answer:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - begin)
            text += json.loads(line[6:])["choices"][0]["text"]
    connection.close()
    return text, times


def prompts(count: int, seed: int = 0) -> list[str]:
    """Short prompts, all different."""
    return [
        " ".join(_WORDS[(seed + i * 7 + j * (1 + i % 5)) % len(_WORDS)] for j in range(3 + i % 9))
        + f" {i}"
        for i in range(count)
    ]


def together(server: Server) -> Prepared:
    """All clients at once."""
    sent = prompts(CLIENTS)
    metrics = _metrics["throughput", BASELINE] = {}
    kept: list[list[float]] = []

    def run() -> float:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            begin = time.perf_counter()
            answers = list(pool.map(functools.partial(ask, server), sent))
            secs = time.perf_counter() - begin
        if metrics:  # the first run warms up
            kept.extend(times for _, times in answers)
        check(server, sent, answers)
        gaps = [b - a for times in kept for a, b in itertools.pairwise(times[:-1])]
        metrics[RATE] = CLIENTS * NEW_TOKENS / secs
        for name, values in (("first", [times[0] for times in kept]), ("next", gaps)):
            for percent in (50, 99) if values else ():
                metrics[f"{name}_token_p{percent}_secs"] = percentile(values, percent)
        return secs

    return Prepared(run)


def one_by_one(server: Server) -> Prepared:
    """The same requests, one after another."""
    sent = prompts(CLIENTS)
    metrics = _metrics["throughput", ALONE] = {}

    def run() -> float:
        begin = time.perf_counter()
        answers = [ask(server, prompt) for prompt in sent]
        secs = time.perf_counter() - begin
        check(server, sent, answers)
        metrics[RATE] = CLIENTS * NEW_TOKENS / secs
        return secs

    return Prepared(run)


def first_token(server: Server, *, shared: bool) -> Prepared:
    """A long prompt and a question; the prompt is shared with earlier requests, or new."""
    numbers = itertools.count()
    beginning = long_text("shared")
    if shared:  # the first prefills it, the second finds where the two diverge
        for _ in range(2):
            ask(server, f"{beginning} {next(numbers)}", 1)

    def run() -> float:
        text = beginning if shared else long_text(f"apart {next(numbers)}")
        _, times = ask(server, f"{text} {next(numbers)}", 1)
        return times[0]

    return Prepared(run)


def long_text(first: str) -> str:
    """Text of about this many tokens: a word is one."""
    return " ".join([first, *itertools.islice(itertools.cycle(_WORDS), PROMPT_TOKENS - 5)])


def endurance(server: Server, count: int) -> Prepared:
    """Many requests from all clients; measures by how much the server's memory grows."""
    sent = prompts(64, seed=3)
    metrics = _metrics["endurance", BASELINE] = {}

    def run() -> float:
        begin, done = time.perf_counter(), 0
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            warm = count // 4
            for part in (warm, count - warm):
                mine = [sent[(done + i) % len(sent)] for i in range(part)]
                few = functools.partial(ask, server, max_tokens=FEW_TOKENS)
                check(server, mine, list(pool.map(few, mine)), FEW_TOKENS)
                done += part
                if done == warm:
                    metrics["growth_bytes"] = -server.rss_bytes()
        metrics["growth_bytes"] += server.rss_bytes()
        secs = time.perf_counter() - begin
        metrics["requests_per_sec"] = count / secs
        return secs

    return Prepared(run)


def check(
    server: Server,
    sent: list[str],
    answers: list[tuple[str, list[float]]],
    max_tokens: int = NEW_TOKENS,
) -> None:
    """Compares every answer with offline generation."""
    for prompt, (text, _) in zip(sent, answers, strict=True):
        if text != server.expected(prompt, max_tokens):
            raise harness.NotMeasured(f"a wrong answer to {prompt!r}: {text!r}"[:160])


def percentile(values: list[float], percent: int) -> float:
    """Returns the least value that this percentage of values does not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# --- results


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The targets."""
    if context.quick:
        return []
    of = {(row.case["task"], row.name): row for row in rows if row.samples_secs}

    def ratio(claim: str, task: str, other: str, least: float) -> Check:
        pair = of.get((task, BASELINE)), of.get((task, other))
        if None in pair:
            return Check(claim, None, "")
        ratios = sorted(b / a for a, b in zip(*(row.samples_secs for row in pair), strict=False))
        return Check(claim, ratios[len(ratios) // 2] >= least, f"{ratios[len(ratios) // 2]:.1f} ×")

    row = of.get(("endurance", BASELINE))
    growth = None if row is None else row.metrics["growth_bytes"]
    return [
        ratio("16 clients at once get 5 × the tokens", "throughput", ALONE, SPEED_UP),
        ratio("a shared prompt of 2,000 tokens: 10 × sooner", "first token", UNREAD, HIT_SPEED_UP),
        Check(
            "the server grows by less than 50 MB in the last 1,500 of 2,000 requests",
            None if growth is None else growth < LEAK_BYTES,
            "" if growth is None else f"{growth * 1e-6:,.1f} MB",
        ),
    ]


def draw(rows: list[Row], figure: Any) -> None:
    """Draws tokens per second, one bar each."""
    rates = [(row.name, row.metrics[RATE]) for row in rows if RATE in row.metrics]
    bars(figure.subplots(), rates, "tokens per second, 16 requests")
