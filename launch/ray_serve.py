#!/usr/bin/env python
"""Serves a model with several replicas, on one machine or many: mamba_jax.serve behind Ray.

    pip install -e '.[ray]'
    python launch/ray_serve.py --checkpoint checkpoints/quickstart --replicas 2
    python launch/ray_serve.py --checkpoint DIR --min_replicas 1 --max_replicas 4 --num_gpus 1

It joins the cluster that RAY_ADDRESS names or that ``ray start`` started on this machine; otherwise
it starts a local cluster that stops with it. Every machine needs this project and the checkpoint,
at the same paths. If Ray Serve is already running, its address is used. Each replica has its own
batch, prefix cache and metrics: /metrics reports one replica.
"""

import argparse
import dataclasses
import pathlib
import signal
import sys

from mamba_jax import serve
from mamba_jax.errors import UserError, command, need

_NAME = "mamba_jax"
_WATCHING = 16  # room for requests that generate nothing: /health, /metrics


@command
def main(argv: list[str]) -> int:
    """Runs the command; 130 after Ctrl-C."""
    arguments = parse(argv)
    serve.need_packages()
    ray, ray_serve = need("ray", "ray"), need("ray.serve", "ray")
    from mamba_jax.checkpoints import arrays

    log = lambda line: print(line, file=sys.stderr, flush=True)
    # Resolved once: replicas started later serve the same checkpoint, even if training continues.
    path = arrays.resolve(pathlib.Path(arguments.checkpoint).absolute(), log)
    settings = dataclasses.replace(serve.settings_of(arguments), checkpoint=str(path))
    ray.init(ignore_reinit_error=True)
    status = 0
    try:
        ray_serve.start(http_options={"host": arguments.host, "port": arguments.port})
        ray_serve.run(deployment(settings, arguments).bind(), name=_NAME)
        log(f"serving on http://{arguments.host}:{arguments.port}; Ctrl-C stops it")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.pause()
    except KeyboardInterrupt:
        status = 130
    except RuntimeError as error:
        reason = (
            str(error).strip().splitlines()[-1]
        )  # the lines above are another process's traceback
        raise UserError(f"Ray Serve failed: {reason}; see its logs above") from error
    finally:
        ray_serve.delete(_NAME)  # not Ray Serve itself: other applications may use it
        ray.shutdown()
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      UserError: if the numbers of replicas contradict each other.
    """
    parser = argparse.ArgumentParser(
        description="Serve a trained model with several replicas, using Ray Serve."
    )
    serve.add_arguments(parser)
    for name, type_, about in (
        ("--replicas", int, "fixed number of replicas (default: 1)"),
        ("--min_replicas", int, "minimum for autoscaling; not with --replicas"),
        ("--max_replicas", int, "maximum for autoscaling"),
    ):
        parser.add_argument(name, type=type_, help=about)
    parser.add_argument("--num_gpus", type=float, default=0, help="GPUs per replica (default: 0)")
    parser.add_argument("--num_cpus", type=float, default=1, help="CPUs per replica (default: 1)")
    arguments = parser.parse_args(argv)
    least, most = arguments.min_replicas, arguments.max_replicas
    if (least is None) != (most is None) or (least is not None and arguments.replicas is not None):
        raise UserError("give --replicas alone, or --min_replicas and --max_replicas")
    if arguments.replicas is not None and arguments.replicas < 1:
        raise UserError(f"--replicas={arguments.replicas} must be at least 1")
    if (least is not None and not 0 <= least <= most) or most == 0:
        raise UserError(f"--min_replicas={least} --max_replicas={most}: 0 ≤ min ≤ max, max ≥ 1")
    return arguments


def deployment(settings, arguments: argparse.Namespace):
    """Returns the server as a Ray Serve deployment."""
    from ray import serve as ray_serve

    def build():  # runs in each replica
        from mamba_jax.serving.server import open_app

        app = open_app(settings, print)
        while not app.state.engine.ready.wait(1):  # no requests until the engine is ready
            if not app.state.engine.alive:
                raise RuntimeError("the engine stopped")
        return app

    @ray_serve.ingress(build)
    class Server:
        def check_health(self):
            if not self.app.state.engine.alive:
                raise RuntimeError("the engine stopped")  # Ray then replaces the replica

    if arguments.min_replicas is None:
        number = {"num_replicas": arguments.replicas or 1}
    else:
        scaling = {
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": settings.max_batch,  # as many as one batch
        }
        number = {"autoscaling_config": scaling}
    resources = {"num_gpus": arguments.num_gpus, "num_cpus": arguments.num_cpus}
    if (
        0 < arguments.num_gpus < 1
    ):  # otherwise the first replica reserves three quarters of the GPU's memory
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * arguments.num_gpus:.3f}"}
        resources["runtime_env"] = {"env_vars": share}
    return ray_serve.deployment(
        Server,
        name=_NAME,
        ray_actor_options=resources,
        # The engine itself reports a full queue, so Ray must not hold requests back.
        max_ongoing_requests=settings.max_batch + settings.max_queue + _WATCHING,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_secs + 5,
        max_constructor_retry_count=3,
        **number,
    )


if __name__ == "__main__":
    sys.exit(main())
