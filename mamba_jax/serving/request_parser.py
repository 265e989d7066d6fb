"""From request bodies to generation requests: prompts as tokens, defaults and limits."""

import dataclasses
import secrets
from typing import Any

import numpy as np

from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.generation import chat
from mamba_jax.serving.protocol import (
    MAX_CHOICES,
    BadRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    OpenAIRequest,
    Sampled,
)
from mamba_jax.serving.sequence import GenerationRequest


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
      prompt_tokens: including the separator that begins a document.
      max_tokens: new tokens; a larger ``max_tokens`` of a request is reduced to it.
    """

    prompt_tokens: int
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A tokenised prompt.

    Attributes:
      tokens: int32 (t,).
      separator_added: whether the server added the separator that is the first token.
      before: the tokens whose text precedes the answer (without a suffix).
    """

    tokens: np.ndarray
    separator_added: bool
    before: np.ndarray


class RequestParser:
    """Parses request bodies into generation requests for the engine."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, fills_in: bool):
        """Takes the model's tokenizer, limits, and whether it was trained to fill in the middle."""
        self._tokenizer, self._limits, self._fills_in = tokenizer, limits, fills_in

    def generate(self, request: GenerateRequest) -> list[GenerationRequest]:
        """Parses a request to ``/generate``."""
        prompt = self._check_length(self._encode(request.prompt), "prompt")
        return self._choices(
            request,
            prompt,
            100 if request.max_tokens is None else request.max_tokens,
            stops=request.stops,
            temperature=0.7,
        )

    def completion(self, request: CompletionRequest) -> list[GenerationRequest]:
        """Parses a completion: ``n`` requests per prompt."""
        prompts = self._prompts(request)
        if len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise BadRequest(
                f"too many choices: {len(prompts)} prompts × n={request.n or 1}; "
                f"request at most {MAX_CHOICES}",
                "n",
            )
        prompt_logprobs = bool(request.echo) and request.logprobs is not None
        n_tokens = (
            sum(len(prompt.tokens) for prompt in prompts) * (request.n or 1)
            if prompt_logprobs
            else 0
        )
        if n_tokens > self._limits.prompt_tokens:
            raise BadRequest(
                f"too many tokens for echo with logprobs: {n_tokens:,}; "
                f"send at most {self._limits.prompt_tokens:,} per request",
                "echo",
            )
        return [
            generation
            for prompt in prompts
            for generation in self._choices(
                request,
                self._check_length(prompt, "prompt"),
                16 if request.max_tokens is None else request.max_tokens,  # OpenAI's default
                stops=request.stops,
                logprobs=request.logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        ]

    def chat(self, request: ChatRequest) -> list[GenerationRequest]:
        """Parses a conversation."""
        text = chat.prompt_of(request.messages)
        prompt = self._check_length(self._encode(text, "messages"), "messages")
        max_tokens = request.max_completion_tokens  # takes precedence over max_tokens
        if max_tokens is None:
            max_tokens = request.max_tokens
        return self._choices(
            request,
            prompt,
            -1 if max_tokens is None else max_tokens,  # OpenAI's default: up to the limit
            stops=(*request.stops, chat.STOP),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    def _choices(
        self,
        request: Sampled,
        prompt: _Prompt,
        max_tokens: int,
        *,
        temperature: float = 1.0,
        logprobs: int | None = None,
        **more: Any,
    ) -> list[GenerationRequest]:
        """Returns one request per choice; ``temperature`` is the default."""
        seed = secrets.randbits(32) if request.seed is None else request.seed
        most = self._limits.max_tokens
        generation = GenerationRequest(
            prompt.tokens,
            most if max_tokens == -1 else min(max_tokens, most),
            temperature=temperature if request.temperature is None else request.temperature,
            top_k=max(request.top_k or 0, 0),
            # 0, and values that underflow float32, keep only the most likely token.
            top_p=1.0 if request.top_p is None else max(request.top_p, 1e-6),
            logprobs=logprobs,
            separator_added=prompt.separator_added,
            prompt_chars=0 if logprobs is None else len(self._tokenizer.decode(prompt.before)),
            **more,
        )
        n = request.n or 1 if isinstance(request, OpenAIRequest) else 1
        return [dataclasses.replace(generation, seed=(seed + i) % 2**32) for i in range(n)]

    def _prompts(self, request: CompletionRequest) -> list[_Prompt]:
        prompt = "" if request.prompt is None else request.prompt
        if not isinstance(prompt, str) and not prompt:
            raise BadRequest(
                'prompt is an empty list; send a string ("" begins a document)', "prompt"
            )
        if request.suffix is None:
            several = isinstance(prompt, list) and not isinstance(prompt[0], int)
            each: Any = prompt if several else [prompt]
            return [self._encode(p) if isinstance(p, str) else self._check_ids(p) for p in each]
        if not self._fills_in:
            raise BadRequest(
                "this model was not trained to fill in the middle; omit suffix", "suffix"
            )
        if not isinstance(prompt, str):
            raise BadRequest("with a suffix, the prompt must be one string", "prompt")
        prefix_id, suffix_id, middle_id = self._tokenizer.fim_ids
        before, after = self._tokenizer.encode(prompt), self._tokenizer.encode(request.suffix)
        begin = self._tokenizer.eot_id, prefix_id
        tokens = np.array([*begin, *before, suffix_id, *after, middle_id], np.int32)
        return [_Prompt(tokens, True, before)]

    def _encode(self, text: str, field: str = "prompt") -> _Prompt:
        # Refuses a text of many megabytes before it is tokenised: no token has more bytes.
        longest = int(self._tokenizer.token_bytes.max())
        if len(text) > self._limits.prompt_tokens * longest:
            raise self._too_long(f"has {len(text):,} characters", field)
        tokens = np.array([self._tokenizer.eot_id, *self._tokenizer.encode(text)], np.int32)
        return _Prompt(tokens, True, tokens)

    def _check_ids(self, ids: list[int]) -> _Prompt:
        for token in ids:
            if not 0 <= token < self._tokenizer.vocab_size:
                raise BadRequest(
                    f"token id out of range: {token}; use 0 to {self._tokenizer.vocab_size - 1}",
                    "prompt",
                )
        separator_added = ids[:1] != [self._tokenizer.eot_id]
        tokens = np.array([self._tokenizer.eot_id] * separator_added + ids, np.int32)
        return _Prompt(tokens, separator_added, tokens)

    def _check_length(self, prompt: _Prompt, field: str) -> _Prompt:
        if len(prompt.tokens) > self._limits.prompt_tokens:
            raise self._too_long(f"has {len(prompt.tokens):,} tokens", field)
        return prompt

    def _too_long(self, what: str, field: str) -> BadRequest:
        limit = self._limits.prompt_tokens
        return BadRequest(
            f"the prompt is too long: it {what}; send at most {limit:,} tokens",
            field,
            "context_length_exceeded",
        )
