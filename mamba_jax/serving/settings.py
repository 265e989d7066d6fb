"""The settings of a server."""

import dataclasses
import re

from mamba_jax.errors import UserError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@*A-Z]+")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
      checkpoint: a checkpoint's folder, or a run's.
      model_name: what clients call the model; None: the name of its config.
      api_key: clients must send it; None: no key is needed.
      cors_origins: whose pages may send requests from a browser, such as
        "https://example.com"; "*": all.
      max_batch: sequences prefilled or decoded at the same time.
      max_queue: how many more requests may wait.
      prefix_cache_mb: size limit of the prefix cache in MiB; 0 disables it.
      max_prompt_tokens: per request, including the separator that begins it.
      max_tokens: new tokens per answer; larger requests are reduced to it.
      timeout_secs: from a request's arrival to its end.
      drain_secs: how long running requests may continue when the server stops.
      scan: implementation of the selective scan; None: the checkpoint's.
      gate_skip_threshold, recursion_depth: as in ``config.for_inference``; None: the checkpoint's.
    """

    checkpoint: str
    model_name: str | None = None
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_batch: int = 16
    max_queue: int = 256
    prefix_cache_mb: int = 256
    max_prompt_tokens: int = 32_768
    max_tokens: int = 4_096
    timeout_secs: float = 600.0
    drain_secs: float = 30.0
    scan: str | None = None
    gate_skip_threshold: float | None = None
    recursion_depth: int | None = None

    def __post_init__(self):
        for name, least in (("prefix_cache_mb", 0), ("max_prompt_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.drain_secs < float("inf"):
            raise UserError(f"drain_secs={self.drain_secs} must be a finite number ≥ 0")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(
                    f'cors_origin="{origin}" is not an origin as browsers send it; give scheme, '
                    "host and port in lower case without a path, such as https://example.com or "
                    'http://localhost:3000, or "*" for all'
                )

    @property
    def max_body_bytes(self) -> int:
        """The size limit of a request's body: no token of a common tokenizer exceeds 128 bytes.
        The minimum leaves room for many short prompts."""
        return max(128 * self.max_prompt_tokens, 1 << 20)
