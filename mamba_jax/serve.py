"""Serves a trained model over HTTP: text, OpenAI's API, and a page to chat on.

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
    """Checks what a server is made of.

    Raises:
      UserError: if something of it is not installed.
    """
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        need(module, "serve")


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax serve",
        description="Serve a trained model over HTTP: /generate, OpenAI's /v1/completions and "
        "/v1/chat/completions, and a page to chat on at /.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--max_connections", type=int, default=1_024, help="at a time; more get 503 (default: 1024)"
    )
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where to listen, and all of ``serving.settings.Settings``."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )
    for name, type_, default, about in (
        ("--host", str, "127.0.0.1", "this machine alone; 0.0.0.0: every network"),
        ("--port", int, 8000, "0: any free one"),
        ("--model_name", str, None, "what clients call the model; default: its config's name"),
        ("--max_batch", int, Settings.max_batch, "sequences at a time"),
        ("--max_queue", int, Settings.max_queue, "requests that may wait besides; more get 429"),
        (
            "--prefix_cache_mb",
            int,
            Settings.prefix_cache_mb,
            "for states at the beginnings of prompts; 0: none",
        ),
        (
            "--max_prompt_tokens",
            int,
            Settings.max_prompt_tokens,
            "of a request, whose body may have 128 bytes for each",
        ),
        ("--max_tokens", int, Settings.max_tokens, "of an answer; who asks for more gets so many"),
        ("--timeout_secs", float, Settings.timeout_secs, "from a request's arrival to its end"),
        (
            "--drain_secs",
            float,
            Settings.drain_secs,
            "that requests under way are given at SIGTERM",
        ),
    ):
        about += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    parser.add_argument(
        "--api_key",
        metavar="KEY",
        help=f"that clients must send as 'Authorization: Bearer KEY' (default: ${KEY_VARIABLE}, "
        "which other users of the machine cannot see; none: everybody may ask)",
    )
    parser.add_argument(
        "--cors_origin",
        action="append",
        dest="cors_origins",
        metavar="ORIGIN",
        help="whose pages may ask from a browser, such as https://example.com; repeatable; "
        "'*': all (default: none but the server's own page)",
    )
    parser.add_argument(
        "--scan",
        metavar="NAME",
        help="of the implementation of the selective scan: auto, sequential, chunked, … "
        "(default: the checkpoint's)",
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Returns the settings that arguments give, with the key of the environment."""
    values: dict[str, Any] = vars(arguments)
    given = {name: values[name] for name in Settings.__dataclass_fields__}
    given["cors_origins"] = tuple(given["cors_origins"] or ())
    given["api_key"] = given["api_key"] or os.environ.get(KEY_VARIABLE) or None
    return Settings(**given)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    import uvicorn

    from mamba_jax.serving.server import open_app

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if arguments.max_connections < 1:
        raise UserError(f"max_connections={arguments.max_connections} must be at least 1")
    listening = _listen(arguments.host, arguments.port)  # before a large checkpoint is read
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
        # uvicorn raises the signal that stopped it once more when all is done.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        listening.listen(128)  # whoever reads the next line and connects at once is served
        host, port = listening.getsockname()[:2]
        log(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops it")
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return 130
    finally:
        app.state.engine.close()  # if a signal came before uvicorn listened to signals
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket to listen on; until it does, who connects is refused.

    Raises:
      UserError: if that is not possible.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on --host {host} --port {port}: {reason}; give others"
        ) from error
    return listening


if __name__ == "__main__":
    sys.exit(main())
