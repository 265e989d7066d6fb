"""From the engine's events to response bodies: OpenAI's objects."""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.serving.sequence import (
    End,
    Event,
    GenerationRequest,
    PromptLogprobs,
    Text,
    TokenLogprob,
)

Json = dict[str, Any]


def error(
    message: str,
    kind: str = "invalid_request_error",
    field: str | None = None,
    code: str | None = None,
) -> Json:
    """Returns OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class GenerateResponseBuilder:
    """Builds the response of ``/generate``: the text, whole or in chunks."""

    def first_chunks(self) -> list[Json]:
        """Returns the chunks before the first event: none."""
        return []

    def chunks(self, _choice: int, event: Event) -> list[Json]:
        """Returns the chunks for an event."""
        return [{"response": event.text}] if isinstance(event, Text) and event.text else []

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Returns the response for all events of the only choice."""
        return {"response": "".join(each.text for each in events[0] if isinstance(each, Text))}


class ResponseBuilder:
    """Builds the response to one of OpenAI's requests: an object, or the chunks of a stream."""

    def __init__(
        self,
        kind: Literal["completion", "chat"],
        model: str,
        tokenizer: Tokenizer,
        requests: Sequence[GenerationRequest],
        *,
        echo: bool = False,
    ):
        """Takes the kind of request, its generation requests, and whether to repeat the prompt."""
        self._kind = kind
        self._tokenizer = tokenizer
        self._requests = requests
        self._echo = echo
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._ends: dict[int, End] = {}
        self._started = [False] * len(requests)

    # A stream.

    def first_chunks(self) -> list[Json]:
        """Returns the chunks before the first event."""
        if self._kind == "chat":
            delta = {"role": "assistant", "content": ""}
            return [self._chunk(i, delta=delta) for i in range(len(self._requests))]
        if not self._echo:
            return []
        # With logprobs, the engine's first event holds the prompt's tokens.
        with_logprobs = any(request.prompt_logprobs for request in self._requests)
        if with_logprobs:
            return []
        return [self._piece(i, self._prompt(i), ()) for i in range(len(self._requests))]

    def chunks(self, choice: int, event: Event) -> list[Json]:
        """Returns the chunks for an event."""
        if isinstance(event, PromptLogprobs):
            return [self._piece(choice, self._prompt(choice), self._prompt_tokens(choice, event))]
        if isinstance(event, Text):
            text = self._strip_first(choice, event.text)
            return [self._piece(choice, text, event.tokens)] if text or event.tokens else []
        assert isinstance(event, End)
        self._ends[choice] = event
        end = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return [self._chunk(choice, **end, finish_reason=event.reason)]

    def usage_chunk(self) -> Json:
        """Returns the last chunk of a stream with ``include_usage``."""
        return self._object(self._chunk_kind()) | {"choices": [], "usage": self.usage()}

    # A whole response.

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Returns the response for all events of each choice."""
        choices = [self._choice(i, of_choice) for i, of_choice in enumerate(events)]
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return self._object(kind) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Returns the counts of tokens; a prompt with several choices counts once."""
        prompts: dict[int, list[End]] = {}
        for i, end in self._ends.items():
            prompts.setdefault(id(self._requests[i].tokens), []).append(end)
        n_prompt = sum(of_prompt[0].prompt_tokens for of_prompt in prompts.values())
        n_new = sum(end.new_tokens for end in self._ends.values())
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {
                "cached_tokens": sum(  # the first choice may have prefilled it for the others
                    min(end.cached_tokens for end in of_prompt) for of_prompt in prompts.values()
                )
            },
        }

    def _choice(self, choice: int, events: Iterable[Event]) -> Json:
        text, tokens = "", []
        if self._echo and not self._requests[choice].prompt_logprobs:
            text = self._prompt(choice)
        for event in events:
            if isinstance(event, PromptLogprobs):
                text += self._prompt(choice)
                tokens += self._prompt_tokens(choice, event)
            elif isinstance(event, Text):
                text += self._strip_first(choice, event.text)
                tokens += event.tokens
            elif isinstance(event, End):
                self._ends[choice] = event
        assert choice in self._ends
        return {
            "index": choice,
            **(
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._kind == "chat"
                else {"text": text}
            ),
            "logprobs": self._logprobs(choice, tokens),
            "finish_reason": self._ends[choice].reason,
        }

    # Parts.

    def _strip_first(self, choice: int, text: str) -> str:
        """Removes the space between "assistant:" and the answer."""
        if self._kind == "chat" and text and not self._started[choice]:
            self._started[choice] = True
            return text.removeprefix(" ")
        return text

    def _prompt(self, choice: int) -> str:
        return self._tokenizer.decode(self._requests[choice].tokens)

    def _prompt_tokens(self, choice: int, event: PromptLogprobs) -> tuple[TokenLogprob, ...]:
        """Returns the client's tokens and where each begins, without a separator that we added."""
        decoder, starts = StreamDecoder(self._tokenizer), []
        for token in event.tokens:
            decoder.push(token.token)
            starts.append(decoder.start)
        # Some tokenizers add a space at the beginning, which the prompt does not have.
        added = decoder.n_chars + decoder.holds_back - len(self._prompt(choice))
        tokens = (
            dataclasses.replace(token, start=max(0, start - added))
            for token, start in zip(event.tokens, starts, strict=True)
        )
        return tuple(tokens)[self._requests[choice].separator_added :]

    def _piece(self, choice: int, text: str, tokens: Sequence[TokenLogprob]) -> Json:
        logprobs = self._logprobs(choice, tokens)
        if self._kind == "chat":
            return self._chunk(choice, delta={"content": text}, logprobs=logprobs)
        return self._chunk(choice, text=text, logprobs=logprobs)

    def _chunk(self, choice: int, **fields: Any) -> Json:
        whole = {"index": choice, "logprobs": None, "finish_reason": None} | fields
        return self._object(self._chunk_kind()) | {"choices": [whole]}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat" else "text_completion"

    def _object(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> Json | None:
        if self._requests[choice].logprobs is None:
            return None
        if self._kind == "chat":
            return {"content": [self._chat_token(each) for each in tokens], "refusal": None}
        return {
            "tokens": [self._name(each.token) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens],
            "text_offset": [each.start for each in tokens],
        }

    def _top(self, chosen: TokenLogprob) -> Json | None:
        if chosen.logprob is None:
            return None
        top: Json = {}
        for token, logprob in chosen.top:
            top.setdefault(self._name(token), logprob)  # most likely first
        top.setdefault(self._name(chosen.token), chosen.logprob)
        return top

    def _chat_token(self, chosen: TokenLogprob) -> Json:
        entry = lambda token, logprob: {
            "token": self._name(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.pieces[token]),
        }
        top = [entry(token, logprob) for token, logprob in chosen.top]
        return entry(chosen.token, chosen.logprob) | {"top_logprobs": top}

    def _name(self, token: int) -> str:
        """Returns a token's text; incomplete UTF-8 is written as OpenAI does."""
        if token == self._tokenizer.eot_id:
            return "<|endoftext|>"
        piece = self._tokenizer.pieces[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
