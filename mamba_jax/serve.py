"""Serves a trained model over HTTP: plain text, OpenAI's API, and a chat page.

python -m mamba_jax.serve --checkpoint checkpoints/quickstart --port 8000
curl localhost:8000/generate -H "Content-Type: application/json" -d '{"prompt": "import os"}'
"""

import argparse
import logging
import os
import signal
import socket
import sys
from typing import Any

from mamba_jax.cli.flags import add_checkpoint, add_inference
from mamba_jax.errors import UserError, command, need
from mamba_jax.serving.settings import Settings

KEY_VARIABLE = "MAMBA_JAX_API_KEY"


@command
def main(argv: list[str]) -> int:
    """Runs the command; 130 after Ctrl-C."""
    arguments = parse(argv)
    need_packages()
    return run(arguments)


def need_packages() -> None:
    """Checks the packages that a server needs.

    Raises:
      UserError: if one is not installed.
    """
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        need(module, "serve")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax serve",
        description="Serve a trained model over HTTP: /generate, OpenAI's /v1/completions and "
        "/v1/chat/completions, and a chat page at /.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--max_connections",
        type=int,
        default=1_024,
        help="open connections; further ones get 503 (default: 1024)",
    )
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where to listen, and all of ``serving.settings.Settings``."""
    add_checkpoint(parser)
    for name, type_, default, about in (
        ("--host", str, "127.0.0.1", "address to listen on; 0.0.0.0: all networks"),
        ("--port", int, 8000, "port to listen on; 0: any free one"),
        (
            "--model_name",
            str,
            None,
            "what clients call the model (default: the name in its config)",
        ),
        ("--max_batch", int, Settings.max_batch, "sequences prefilled or decoded at the same time"),
        (
            "--max_queue",
            int,
            Settings.max_queue,
            "how many more requests may wait; further ones get 429",
        ),
        (
            "--prefix_cache_mb",
            int,
            Settings.prefix_cache_mb,
            "size limit of the prefix cache in MiB; 0 disables it",
        ),
        (
            "--max_prompt_tokens",
            int,
            Settings.max_prompt_tokens,
            "longest prompt, in tokens; the body may have 128 bytes per token",
        ),
        (
            "--max_tokens",
            int,
            Settings.max_tokens,
            "longest answer, in tokens; larger requests are reduced to it",
        ),
        (
            "--timeout_secs",
            float,
            Settings.timeout_secs,
            "time limit from a request's arrival to its end",
        ),
        (
            "--drain_secs",
            float,
            Settings.drain_secs,
            "how long running requests may continue after SIGTERM",
        ),
    ):
        about += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    parser.add_argument(
        "--api_key",
        metavar="KEY",
        help=f"clients must send it as 'Authorization: Bearer KEY' (default: ${KEY_VARIABLE}, "
        "which other users of the machine cannot see; without either, no key is needed)",
    )
    parser.add_argument(
        "--cors_origin",
        action="append",
        dest="cors_origins",
        metavar="ORIGIN",
        help="site whose pages may send requests from a browser, such as https://example.com; "
        "repeatable; '*': all (default: none but the server's own page)",
    )
    add_inference(parser)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Returns the settings in the arguments, with the API key of the environment."""
    values: dict[str, Any] = vars(arguments)
    given = {name: values[name] for name in Settings.__dataclass_fields__}
    given["cors_origins"] = tuple(given["cors_origins"] or ())
    given["api_key"] = given["api_key"] or os.environ.get(KEY_VARIABLE) or None
    return Settings(**given)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal arrives."""
    import uvicorn

    from mamba_jax.serving.server import open_app

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if arguments.max_connections < 1:
        raise UserError(f"max_connections={arguments.max_connections} must be at least 1")
    listening = _listen(arguments.host, arguments.port)  # before loading a large checkpoint
    app = open_app(settings_of(arguments), log)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=arguments.max_connections,
            timeout_graceful_shutdown=max(1, round(arguments.drain_secs)),
            server_header=False,
        )
    )
    try:
        # uvicorn raises the signal that stopped it again after shutdown.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        listening.listen(128)  # a client may connect as soon as the next line is printed
        host, port = listening.getsockname()[:2]
        log(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops it")
        server.run(sockets=[listening])
    finally:
        app.state.engine.close()  # if a signal arrived before uvicorn handled signals
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket; it refuses connections until it listens.

    Raises:
      UserError: if the address cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on --host {host} --port {port}: {reason}; choose another host or port"
        ) from error
    return listening


if __name__ == "__main__":
    sys.exit(main())
