"""From the engine's events to what clients read: OpenAI's objects."""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.serving.sequence import Asked, End, Event, Scored, Text, Told

Json = dict[str, Any]


def error(
    message: str,
    kind: str = "invalid_request_error",
    field: str | None = None,
    code: str | None = None,
) -> Json:
    """Returns OpenAI's object of an error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class GenerateAnswer:
    """The answer to ``/generate``: its text alone, or pieces of it that add up to it."""

    def first(self) -> list[Json]:
        """Returns the chunks that come before any event: none."""
        return []

    def chunks(self, _choice: int, event: Event) -> list[Json]:
        """Returns the chunks that an event makes."""
        return [{"response": event.text}] if isinstance(event, Text) and event.text else []

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Returns the answer made of all events of the one choice."""
        return {"response": "".join(each.text for each in events[0] if isinstance(each, Text))}


class Answer:
    """The answer to one of OpenAI's requests: an object, or the chunks of a stream."""

    def __init__(
        self,
        kind: Literal["completion", "chat"],
        model: str,
        tokenizer: Tokenizer,
        asked: Sequence[Asked],
        *,
        echo: bool = False,
    ):
        """Takes the kind of request, what it became, and how its answer is to look."""
        self._kind = kind
        self._tokenizer = tokenizer
        self._asked = asked
        self._echo = echo
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._ends: dict[int, End] = {}
        self._begun = [False] * len(asked)

    # A stream.

    def first(self) -> list[Json]:
        """Returns the chunks that come before any event."""
        if self._kind == "chat":
            delta = {"role": "assistant", "content": ""}
            return [self._chunk(i, delta=delta) for i in range(len(self._asked))]
        if not self._echo:
            return []
        # With log-probabilities the engine's first event brings the prompt's tokens.
        scored = any(asked.score_prompt for asked in self._asked)
        return (
            [] if scored else [self._piece(i, self._prompt(i), ()) for i in range(len(self._asked))]
        )

    def chunks(self, choice: int, event: Event) -> list[Json]:
        """Returns the chunks that an event makes."""
        if isinstance(event, Scored):
            return [self._piece(choice, self._prompt(choice), self._prompt_tokens(choice, event))]
        if isinstance(event, Text):
            text = self._begin(choice, event.text)
            return [self._piece(choice, text, event.tokens)] if text or event.tokens else []
        assert isinstance(event, End)
        self._ends[choice] = event
        end = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return [self._chunk(choice, **end, finish_reason=event.reason)]

    def usage_chunk(self) -> Json:
        """Returns a stream's last chunk, for those who asked for it."""
        return self._object(self._chunk_kind()) | {"choices": [], "usage": self.usage()}

    # A whole.

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Returns the answer made of all events of each choice."""
        choices = [self._choice(i, of_choice) for i, of_choice in enumerate(events)]
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return self._object(kind) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Returns the counts of tokens; a prompt with several choices counts once."""
        prompts: dict[int, list[End]] = {}
        for i, end in self._ends.items():
            prompts.setdefault(id(self._asked[i].tokens), []).append(end)
        n_prompt = sum(of_prompt[0].prompt_tokens for of_prompt in prompts.values())
        n_new = sum(end.new_tokens for end in self._ends.values())
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {
                "cached_tokens": sum(  # the first choice may have read what the others found
                    min(end.cached_tokens for end in of_prompt) for of_prompt in prompts.values()
                )
            },
        }

    def _choice(self, choice: int, events: Iterable[Event]) -> Json:
        text, told = "", []
        if self._echo and not self._asked[choice].score_prompt:
            text = self._prompt(choice)
        for event in events:
            if isinstance(event, Scored):
                text += self._prompt(choice)
                told += self._prompt_tokens(choice, event)
            elif isinstance(event, Text):
                text += self._begin(choice, event.text)
                told += event.tokens
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
            "logprobs": self._logprobs(choice, told),
            "finish_reason": self._ends[choice].reason,
        }

    # Parts.

    def _begin(self, choice: int, text: str) -> str:
        """Takes the space away that stands between "assistant:" and a chat's answer."""
        if self._kind == "chat" and text and not self._begun[choice]:
            self._begun[choice] = True
            return text.removeprefix(" ")
        return text

    def _prompt(self, choice: int) -> str:
        return self._tokenizer.decode(self._asked[choice].tokens)

    def _prompt_tokens(self, choice: int, event: Scored) -> tuple[Told, ...]:
        """Returns the tokens that the client gave, and where each begins; the marker before them
        is ours."""
        decoder, starts = StreamDecoder(self._tokenizer), []
        for told in event.tokens:
            decoder.push(told.token)
            starts.append(decoder.start)
        # Some tokenizers put a space before a text, which the prompt does not have.
        added = decoder.n_chars + decoder.holds_back - len(self._prompt(choice))
        tokens = (
            dataclasses.replace(told, start=max(0, start - added))
            for told, start in zip(event.tokens, starts, strict=True)
        )
        return tuple(tokens)[self._asked[choice].marked :]

    def _piece(self, choice: int, text: str, tokens: Sequence[Told]) -> Json:
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

    def _logprobs(self, choice: int, told: Sequence[Told]) -> Json | None:
        if self._asked[choice].logprobs is None:
            return None
        if self._kind == "chat":
            return {"content": [self._chat_token(each) for each in told], "refusal": None}
        return {
            "tokens": [self._name(each.token) for each in told],
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": [self._top(each) for each in told],
            "text_offset": [each.start for each in told],
        }

    def _top(self, told: Told) -> Json | None:
        if told.logprob is None:
            return None
        top: Json = {}
        for token, logprob in told.top:
            top.setdefault(self._name(token), logprob)  # likeliest first
        top.setdefault(self._name(told.token), told.logprob)
        return top

    def _chat_token(self, told: Told) -> Json:
        entry = lambda token, logprob: {
            "token": self._name(token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.pieces[token]),
        }
        top = [entry(token, logprob) for token, logprob in told.top]
        return entry(told.token, told.logprob) | {"top_logprobs": top}

    def _name(self, token: int) -> str:
        """Returns a token's text; of bytes that are no text, as OpenAI writes them."""
        if token == self._tokenizer.eot_id:
            return "<|endoftext|>"
        piece = self._tokenizer.pieces[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
