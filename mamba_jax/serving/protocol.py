"""Request bodies: ``/generate``, and OpenAI's completions and chat completions.

Unknown fields are ignored, as OpenAI's own servers do for older clients; known fields that this
server does not support are refused where they would change the answer. ``null`` means the default.
"""

import json
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    FailFast,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mamba_jax.serving.slots import TOP_LOGPROBS

MAX_CHOICES = 128  # prompts × n of one request
_MAX_STOPS = 16
# From clients' names of roles to those that models are trained on.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"} | {
    "tool": "tool",
    "function": "tool",
}


def _whole_number(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is accepted as 5."""
    return int(value) if type(value) is float and value.is_integer() else value


_Integer = Annotated[StrictInt, BeforeValidator(_whole_number)]
_Float = Annotated[float, Strict()]  # no numbers in quotes
_MaxTokens = Annotated[_Integer, Field(ge=-1, description="-1: the server's limit")]
_Temperature = Annotated[_Float, Field(ge=0, le=100)]
_Seed = Annotated[_Integer, Field(ge=-(2**63), lt=2**64)]


class BadRequest(Exception):
    """An error that the client can fix.

    Attributes:
      field: the request's field.
      code: OpenAI's error code, if it has one.
      status: HTTP status.
    """

    def __init__(self, message: str, field: str | None = None, code: str | None = None, status=400):
        super().__init__(message)
        self.field, self.code, self.status = field, code, status


def shown(value: Any) -> str:
    """Returns a client's value, shortened for a message."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of length {len(value)}"
    text = json.dumps(value[:60] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _all_are(values: Any, of: type) -> bool:
    """Whether this is a list of values of one type. Pydantic itself would report each wrong
    element of a long list, once for each allowed type."""
    return isinstance(values, list) and all(type(value) is of for value in values)


class Sampled(BaseModel):
    """Fields of all requests that generate text."""

    model: StrictStr | None = None
    max_tokens: _MaxTokens | None = None
    temperature: _Temperature | None = None
    top_p: Annotated[_Float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[_Integer, Field(ge=-1, lt=2**31)] | None = None  # not OpenAI's; -1: all
    stop: str | list[str] | None = None
    seed: _Seed | None = None
    stream: StrictBool | None = None
    frequency_penalty: _Float | None = None
    presence_penalty: _Float | None = None
    logit_bias: Any = None

    @model_validator(mode="after")
    def _offered(self) -> "Sampled":
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported; omit it", name)
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
        raise ValueError(f"must be a string or a list of up to {_MAX_STOPS} strings")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class GenerateRequest(Sampled):
    """The body of ``/generate``; defaults to 100 tokens at temperature 0.7."""

    prompt: StrictStr


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    include_usage: StrictBool | None = None


class OpenAIRequest(Sampled):
    """Fields that OpenAI's completions and chat completions share."""

    n: Annotated[_Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(OpenAIRequest):
    """OpenAI's completions."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: Annotated[_Integer, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: _Integer | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _texts_or_ids(cls, prompt: Any) -> Any:
        if prompt is None or isinstance(prompt, str):
            return prompt
        if _all_are(prompt, str) or _all_are(prompt, int):
            return prompt
        if isinstance(prompt, list) and all(_all_are(ids, int) for ids in prompt):
            return prompt
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )

    @model_validator(mode="after")
    def _one_of_n(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest(
                f"best_of={self.best_of} is not supported; omit it and set n", "best_of"
            )
        if self.suffix is not None and self.echo:
            raise BadRequest("echo is not supported together with suffix; omit one of them", "echo")
        return self


# The schema of messages; ``ChatRequest`` checks them by hand, so that errors name the turn.
_CONTENT = {"type": "string", "description": "or a list of parts of type text"}
_TURN = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": list(_ROLES)}, "content": _CONTENT},
}
_MESSAGES = {"type": "array", "minItems": 1, "items": _TURN}


class ChatRequest(OpenAIRequest):
    """OpenAI's chat completions."""

    messages: Annotated[list[dict[str, Any]], FailFast(), WithJsonSchema(_MESSAGES)]
    max_completion_tokens: _MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[_Integer, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None

    @field_validator("messages")
    @classmethod
    def _as_trained_on(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Checks the turns and maps their roles to those of training.

        An assistant turn may have null content, or no content at all beside tool calls.
        """
        turns = []
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            where = f"messages[{i}]"
            if not isinstance(role, str) or role not in _ROLES:
                raise BadRequest(
                    f'{where} needs a "role", one of {", ".join(_ROLES)}, not {shown(role)}',
                    f"{where}.role",
                )
            calls = {key: message.get(key) for key in ("tool_calls", "function_call")}
            may_lack = role == "assistant" and ("content" in message or any(calls.values()))
            if content is None and not may_lack:
                raise BadRequest(f'{where} needs a "content"', f"{where}.content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            for part in parts if content is not None else ():
                is_text = isinstance(part, dict) and part.get("type") == "text"
                if not (is_text and isinstance(part.get("text"), str)):
                    kind = part.get("type") if isinstance(part, dict) and not is_text else content
                    raise BadRequest(
                        f"the content of {where} must be text, or a list of text parts, "
                        f"not {shown(kind)}",
                        f"{where}.content",
                    )
            turns.append({"role": _ROLES[role], "content": content} | calls)
        return turns

    @model_validator(mode="after")
    def _text_alone(self) -> "ChatRequest":
        for name, choice in (("tools", self.tool_choice), ("functions", self.function_call)):
            if getattr(self, name) and choice != "none":
                raise BadRequest(f"{name} are not supported; omit them", name)
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise BadRequest(f"{name} is not supported; omit it", name)
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise BadRequest(
                "response_format other than text is not supported; omit it", "response_format"
            )
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return self
