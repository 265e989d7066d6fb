"""What clients may ask: the guide's ``/generate`` and OpenAI's completions and chats.

Fields that are not known are ignored, as OpenAI's own servers do for older clients; those that are
known and not offered are refused where they would change the answer.
"""

import dataclasses
import secrets
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.generation import chat
from mamba_jax.serving.rows import TOP_LOGPROBS
from mamba_jax.serving.sequence import Asked

_MAX_CHOICES = 128  # prompts × n of one request
_MAX_STOPS = 16
_Prompt = tuple[np.ndarray, bool]  # its tokens, and whether the first is a marker put before it
_Temperature = Annotated[float, Field(ge=0, le=100)]
_Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)]


class BadRequest(Exception):
    """What a client can mend.

    Attributes:
      field: of the request.
      code: OpenAI's word for it, if it has one.
      status: of HTTP.
    """

    def __init__(self, message: str, field: str | None = None, code: str | None = None, status=400):
        super().__init__(message)
        self.field, self.code, self.status = field, code, status


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request.

    Attributes:
      prompt_tokens: at most, the marker of a document's beginning included.
      max_tokens: new ones at most.
    """

    prompt_tokens: int
    max_tokens: int


def _all_are(values: Any, of: type) -> bool:
    """Whether this is a list of values of one type. Pydantic itself would name every element of a
    long list that is wrong, once for each form that is allowed."""
    return isinstance(values, list) and all(type(value) is of for value in values)


class GenerateRequest(BaseModel):
    """The guide's."""

    prompt: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] = 100
    temperature: _Temperature = 0.7


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: StrictBool = False


class _Common(BaseModel):
    """Fields of completions and chats alike."""

    model: StrictStr | None = None
    temperature: _Temperature | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None  # not OpenAI's; -1: all
    n: Annotated[StrictInt, Field(ge=1, le=_MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: _Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None

    @model_validator(mode="after")
    def _offered(self) -> "_Common":
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not offered here; leave it out")
        return self

    @field_validator("stop", mode="plain")
    @classmethod
    def _few_texts(cls, stop: Any) -> Any:
        if (
            stop is None
            or isinstance(stop, str)
            or (_all_are(stop, str) and len(stop) <= _MAX_STOPS)
        ):
            return stop
        raise ValueError(f"must be a text or a list of up to {_MAX_STOPS} texts")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Common):
    """OpenAI's completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _texts_or_ids(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or _all_are(prompt, str) or _all_are(prompt, int):
            return prompt
        if isinstance(prompt, list) and all(_all_are(ids, int) for ids in prompt):
            return prompt
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of those")

    @model_validator(mode="after")
    def _one_of_n(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not offered here; leave it out and give n")
        if self.suffix is not None and self.echo:
            raise ValueError("echo is not offered with a suffix; leave it out")
        return self


class ChatRequest(_Common):
    """OpenAI's chats."""

    messages: Annotated[list[dict[str, Any]], FailFast()]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Any = None
    functions: Any = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _text_alone(self) -> "ChatRequest":
        if self.tools or self.functions:
            raise ValueError("tools are not offered here; leave them out")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise ValueError("response_format is not offered here; leave it out")
        for message in self.messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError('every message needs a "role" and a "content"')
            content = message.get("content")
            if isinstance(content, list):
                parts = content
            else:
                parts = [] if content is None else [{"type": "text", "text": content}]
            for part in parts:
                is_text = isinstance(part, dict) and part.get("type") == "text"
                if not (is_text and isinstance(part.get("text"), str)):
                    raise ValueError(
                        "the content of a message must be text, or a list of text parts"
                    )
        return self


class Translator:
    """From requests to what the engine is asked."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, fills_in: bool):
        """Takes the model's tokenizer, limits, and whether it learnt to fill in the middle."""
        self._tokenizer, self._limits, self._fills_in = tokenizer, limits, fills_in

    def generate(self, request: GenerateRequest) -> list[Asked]:
        """Translates the guide's request."""
        tokens, _ = self._checked(self._of_text(request.prompt), "prompt")
        self._check_max_tokens(request.max_tokens, "max_tokens")
        return [
            Asked(
                tokens,
                request.max_tokens,
                temperature=request.temperature,
                seed=secrets.randbits(32),
            )
        ]

    def completion(self, request: CompletionRequest) -> list[Asked]:
        """Translates a completion: each prompt ``n`` times."""
        prompts = self._prompts(request)
        if len(prompts) * (request.n or 1) > _MAX_CHOICES:
            raise BadRequest(
                f"{len(prompts)} prompts times n={request.n or 1} are above {_MAX_CHOICES}", "n"
            )
        max_tokens = 16 if request.max_tokens is None else request.max_tokens  # OpenAI's default
        self._check_max_tokens(max_tokens, "max_tokens")
        scored = bool(request.echo) and request.logprobs is not None
        n_scored = sum(len(tokens) for tokens, _ in prompts) * (request.n or 1) if scored else 0
        if n_scored > self._limits.prompt_tokens:
            raise BadRequest(
                f"echo with logprobs of {n_scored:,} tokens is above the "
                f"{self._limits.prompt_tokens:,} of a request; send fewer prompts at a time",
                "echo",
            )
        return [
            asked
            for prompt in prompts
            for asked in self._choices(
                request,
                self._checked(prompt, "prompt"),
                max_tokens,
                stops=request.stops,
                logprobs=request.logprobs,
                score_prompt=scored,
            )
        ]

    def chat(self, request: ChatRequest) -> list[Asked]:
        """Translates a conversation."""
        text = chat.prompt_of(request.messages)
        prompt = self._checked(self._of_text(text, "messages"), "messages")
        max_tokens = self._limits.max_tokens  # OpenAI's default is what fits
        for name in ("max_tokens", "max_completion_tokens"):  # the latter wins
            if (asked := getattr(request, name)) is not None:
                max_tokens = asked
                self._check_max_tokens(asked, name)
        stops = (*request.stops, chat.STOP)
        return self._choices(
            request,
            prompt,
            max_tokens,
            stops=stops,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    def _choices(
        self, request: _Common, prompt: _Prompt, max_tokens: int, **more: Any
    ) -> list[Asked]:
        tokens, marked = prompt
        first_seed = secrets.randbits(32) if request.seed is None else request.seed
        return [
            Asked(
                tokens,
                max_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_k=max(request.top_k or 0, 0),
                # 0, and what float32 takes for it, leave the likeliest alone.
                top_p=1.0 if request.top_p is None else max(request.top_p, 1e-6),
                seed=(first_seed + choice) % 2**32,
                marked=marked,
                **more,
            )
            for choice in range(request.n or 1)
        ]

    def _prompts(self, request: CompletionRequest) -> list[_Prompt]:
        prompt = request.prompt
        if not isinstance(prompt, str) and not prompt:
            raise BadRequest(
                'prompt is an empty list; give a text ("" begins a document)', "prompt"
            )
        if request.suffix is None:
            several = isinstance(prompt, list) and not isinstance(prompt[0], int)
            each: Any = prompt if several else [prompt]
            return [self._of_text(p) if isinstance(p, str) else self._of_ids(p) for p in each]
        if not self._fills_in:
            raise BadRequest("this model was not trained to fill in; leave suffix out", "suffix")
        if not isinstance(prompt, str):
            raise BadRequest("with a suffix the prompt must be one text", "prompt")
        prefix_id, suffix_id, middle_id = self._tokenizer.fim_ids
        before, after = self._tokenizer.encode(prompt), self._tokenizer.encode(request.suffix)
        begin = self._tokenizer.eot_id, prefix_id
        return [(np.array([*begin, *before, suffix_id, *after, middle_id], np.int32), True)]

    def _of_text(self, text: str, field: str = "prompt") -> _Prompt:
        # Lest a text of many megabytes is tokenised only to be refused: no token has more bytes.
        longest = int(self._tokenizer.token_bytes.max())
        if len(text) > self._limits.prompt_tokens * longest:
            raise self._too_long(f"has {len(text):,} characters", field)
        return np.array([self._tokenizer.eot_id, *self._tokenizer.encode(text)], np.int32), True

    def _of_ids(self, ids: list[int]) -> _Prompt:
        for token in ids:
            if not 0 <= token < self._tokenizer.vocab_size:
                raise BadRequest(
                    f"token id {token} is outside 0 … {self._tokenizer.vocab_size - 1}", "prompt"
                )
        marked = ids[:1] != [self._tokenizer.eot_id]
        return np.array([self._tokenizer.eot_id] * marked + ids, np.int32), marked

    def _checked(self, prompt: _Prompt, field: str) -> _Prompt:
        if len(prompt[0]) > self._limits.prompt_tokens:
            raise self._too_long(f"has {len(prompt[0]):,} tokens", field)
        return prompt

    def _too_long(self, what: str, field: str) -> BadRequest:
        limit = self._limits.prompt_tokens
        return BadRequest(
            f"the prompt {what}, at most {limit:,} tokens may be given",
            field,
            "context_length_exceeded",
        )

    def _check_max_tokens(self, max_tokens: int, field: str) -> None:
        if max_tokens > self._limits.max_tokens:
            raise BadRequest(
                f"{field}={max_tokens} is above {self._limits.max_tokens}, the most that this "
                "server makes",
                field,
            )
