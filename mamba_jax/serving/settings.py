"""What a server is started with."""

import dataclasses
import re

from mamba_jax.errors import UserError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@*A-Z]+")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
      checkpoint: a checkpoint's folder, or a run's.
      model_name: what clients call the model; None: the name of its config.
      api_key: that clients must send; None: none.
      cors_origins: whose pages may ask from a browser, such as "https://example.com"; "*": all.
      max_batch: sequences at a time.
      max_queue: requests that may wait besides.
      prefix_cache_mb: for snapshots of states.
      max_prompt_tokens: of a request, its marker included.
      max_tokens: of an answer; who asks for more gets so many.
      timeout_secs: from a request's arrival to its end.
      drain_secs: that requests under way are given when the server stops.
      scan: implementation of the selective scan; None: the checkpoint's.
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

    def __post_init__(self):
        for name, least in (("prefix_cache_mb", 0), ("max_prompt_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.drain_secs < float("inf"):
            raise UserError(f"drain_secs={self.drain_secs} must be a number from 0 up")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(
                    f'cors_origin="{origin}" is no origin as browsers send it; give scheme, host '
                    "and port in lower case without a path, such as https://example.com or "
                    'http://localhost:3000, or "*" for all'
                )

    @property
    def max_body_bytes(self) -> int:
        """What a request's body may take: no token of a usual tokenizer has more than 128 bytes.
        The floor leaves room for short prompts in great numbers."""
        return max(128 * self.max_prompt_tokens, 1 << 20)
