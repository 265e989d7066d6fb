"""From request bodies to generation requests, and from the engine's events to responses."""

import numpy as np
import pytest

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
)
from mamba_jax.serving.request_parser import Limits, RequestParser
from mamba_jax.serving.responses import ResponseBuilder
from mamba_jax.serving.sequence import (
    End,
    GenerationRequest,
    PromptLogprobs,
    Sequence,
    Text,
    TokenLogprob,
)
from tests.support.characters import text_and_owners
from tests.support.tiny_models import TOKENIZER

from .conftest import tokens_of

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
PARSER = RequestParser(TOKENIZER, Limits(400, 99), fills_in=False)


def test_a_chat_ends_where_the_model_writes_the_users_turn():
    (request,) = PARSER.chat(ChatRequest(**CHAT, stop=["x"]))
    assert request.stops == ("x", "\n\nuser:")
    assert request.max_tokens == 99  # what fits
    np.testing.assert_array_equal(request.tokens, tokens_of("user: Hi\n\nassistant:"))


def test_the_space_after_assistant_is_not_the_answers():
    requests = [GenerationRequest(tokens_of("a"), 9)]
    events = [Text(" "), Text(" two"), End("stop", 2, 0, 5)]
    whole = ResponseBuilder("chat", "tiny", TOKENIZER, requests).whole([events])
    assert whole["choices"][0]["message"]["content"] == " two"
    streamed = ResponseBuilder("chat", "tiny", TOKENIZER, requests)
    chunks = [chunk for event in events[:-1] for chunk in streamed.chunks(0, event)]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == " two"


def test_usage_counts_a_prompt_of_several_choices_once_and_as_cached_if_all_found_it():
    tokens = tokens_of("a prompt")
    requests = [
        GenerationRequest(tokens, 9),
        GenerationRequest(tokens, 9),
        GenerationRequest(tokens_of("b"), 9),
    ]
    answer = ResponseBuilder("completion", "tiny", TOKENIZER, requests)
    events = [[End("length", 9, cached, new)] for cached, new in ((9, 3), (0, 4))]
    usage = answer.whole([*events, [End("stop", 2, 1, 5)]])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 12)
    assert usage["total_tokens"] == 23
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


@pytest.mark.parametrize(
    ("given", "most"), [(5, 5), (5.0, 5), (0, 0), (99, 99), (100, 99), (10**30, 99), (-1, 99)]
)
def test_max_tokens_is_clamped_to_what_the_server_makes(given, most):
    (generated,) = PARSER.generate(GenerateRequest(prompt="a", max_tokens=given))
    (completed,) = PARSER.completion(CompletionRequest(prompt="a", max_tokens=given))
    chats = [
        PARSER.chat(ChatRequest(**CHAT, **limits))[0]
        for limits in (
            {"max_tokens": given},
            {"max_completion_tokens": given},
            {"max_completion_tokens": given, "max_tokens": 50},
        )
    ]
    assert [request.max_tokens for request in (generated, completed, *chats)] == [most] * 5


def test_defaults_of_max_tokens_are_clamped_too():
    tight = RequestParser(TOKENIZER, Limits(400, 3), fills_in=False)
    assert tight.generate(GenerateRequest(prompt="a"))[0].max_tokens == 3
    assert tight.completion(CompletionRequest(prompt="a"))[0].max_tokens == 3


SYSTEM = "system: Be brief.\n\nuser: Hi\n\nassistant:"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHATS = {
    "a developer's turn": ([("developer", "Be brief."), ("user", "Hi")], SYSTEM),
    "a system's turn": ([("system", "Be brief."), ("user", "Hi")], SYSTEM),
    "a list of parts": (
        [("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])],
        "user: H\ni\n\nassistant:",
    ),
    "an old function's turn": (
        [("user", "Hi"), ("function", "ho")],
        "user: Hi\n\ntool: ho\n\nassistant:",
    ),
    "an answer of null": ([("user", "Hi"), ("assistant", None)], "user: Hi\n\nassistant:"),
}


@pytest.mark.parametrize("case", CHATS)
def test_turns_are_rendered_as_in_training(case):
    turns, text = CHATS[case]
    messages = [{"role": role, "content": content} for role, content in turns]
    (request,) = PARSER.chat(ChatRequest(messages=messages))
    assert TOKENIZER.decode(request.tokens) == text


def test_a_turn_that_calls_a_tool_needs_no_content():
    turns = [
        {"role": "user", "content": "Hi", "name": "me", "value": "not the content"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    without, with_null = (
        PARSER.chat(ChatRequest(messages=[turns[0], call, turns[2]]))[0].tokens
        for call in (turns[1], turns[1] | {"content": None})
    )
    np.testing.assert_array_equal(without, with_null)
    text = TOKENIZER.decode(without)
    assert text.startswith("user: Hi\n\n")
    assert text.endswith("tool: 3\n\nassistant:")


def test_null_is_an_omitted_field():
    for kind, translate, body in (
        (GenerateRequest, PARSER.generate, {"prompt": "a", "seed": 3}),
        (CompletionRequest, PARSER.completion, {"seed": 3}),
        (ChatRequest, PARSER.chat, {"messages": CHAT["messages"], "seed": 3}),
    ):
        nulls = dict.fromkeys(kind.model_fields.keys() - body.keys())
        (plain,), (given,) = (translate(kind(**body, **more)) for more in ({}, nulls))
        np.testing.assert_array_equal(plain.tokens, given.tokens)
        for name in GenerationRequest.__dataclass_fields__.keys() - {"tokens"}:
            assert getattr(plain, name) == getattr(given, name), (kind, name)


def test_whole_floats_are_accepted_as_integers():
    body = {"prompt": "a", "n": 2.0, "top_k": 3.0, "seed": 4.0, "logprobs": 1.0, "best_of": 2.0}
    first, second = PARSER.completion(CompletionRequest(**body))
    assert (first.top_k, first.seed, second.seed, first.logprobs) == (3, 4, 5, 1)


PROMPT, GENERATED = "日本", "naïve 日本😀x"
OFFSETS = {
    "whole": ([], GENERATED),
    "up to a stop": (["x"], GENERATED[:-1]),
    "cut inside a character": ([], None),
}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("case", OFFSETS)
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_of_tokens_are_places_in_the_text(name, case, echo):
    """Tokens that share a character all begin at it."""
    tokenizer = load_tokenizer(name)
    stops, expected = OFFSETS[case]
    ids = tokenizer.encode(GENERATED).tolist()
    if expected is None:
        expected = "naïve 日本"
        # One more token: the first of several of the next character.
        ids = ids[: len(tokenizer.encode(expected)) + 1]
    body = {"prompt": PROMPT, "max_tokens": len(ids), "logprobs": 0, "echo": echo, "stop": stops}
    requests = RequestParser(tokenizer, Limits(400, 99), fills_in=False).completion(
        CompletionRequest(**body)
    )
    events = []
    if echo:
        events.append(
            PromptLogprobs(tuple(TokenLogprob(int(token), -1.0) for token in requests[0].tokens))
        )
    sequence = Sequence(requests[0], events.append, lambda *_: None, tokenizer, 9.0)
    for token in ids:
        sequence.append(TokenLogprob(token, -1.0))
        if sequence.ended:
            break
    assert isinstance(events[-1], End)
    make = lambda: ResponseBuilder("completion", "tiny", tokenizer, requests, echo=echo)
    (choice,) = make().whole([events])["choices"]
    assert choice["text"] == (PROMPT if echo else "") + expected
    streaming = make()
    chunks = [chunk["choices"][0] for event in events for chunk in streaming.chunks(0, event)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    told = [at for chunk in chunks if chunk["logprobs"] for at in chunk["logprobs"]["text_offset"]]
    assert told == choice["logprobs"]["text_offset"]
    prompt_ids = tokenizer.encode(PROMPT).tolist()
    pieces = [tokenizer.pieces[token] for token in prompt_ids + ids]
    text, owners = text_and_owners(b"".join(pieces))
    first_bytes = np.cumsum([0, *map(len, pieces)])[: len(pieces)]
    starts = [owners[at] for at in first_bytes]
    assert told == [
        start
        for i, start in enumerate(starts)
        if (echo or i >= len(prompt_ids)) and start < len(PROMPT + expected) + (not stops)
    ]
    assert max(told) <= len(PROMPT + expected)
    assert text.startswith(PROMPT + expected)


class Spacing(type(TOKENIZER)):
    """Puts a space before each text, as SentencePiece tokenizers do."""

    def encode(self, text):
        return super().encode(f" {text}")

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


@pytest.mark.parametrize("echo", [False, True])
def test_a_prefix_added_by_the_tokenizer_is_not_in_the_text(echo):
    tokenizer = Spacing()
    body = {"prompt": "ab", "max_tokens": 2, "logprobs": 0, "echo": echo}
    requests = RequestParser(tokenizer, Limits(400, 99), fills_in=False).completion(
        CompletionRequest(**body)
    )
    events = (
        [PromptLogprobs(tuple(TokenLogprob(int(token), -1.0) for token in requests[0].tokens))]
        if echo
        else []
    )
    sequence = Sequence(requests[0], events.append, lambda *_: None, tokenizer, 9.0)
    for token in b" c":
        sequence.append(TokenLogprob(token, -1.0))
    (choice,) = ResponseBuilder("completion", "tiny", tokenizer, requests, echo=echo).whole(
        [events]
    )["choices"]
    assert choice["text"] == ("ab c" if echo else " c")
    assert choice["logprobs"]["text_offset"] == ([0, 0, 1] if echo else []) + [2, 3]


def test_offsets_with_a_suffix_follow_the_prompt():
    filling = RequestParser(TOKENIZER, Limits(400, 99), fills_in=True)
    body = {"prompt": "日x", "suffix": "and more", "logprobs": 0}
    assert filling.completion(CompletionRequest(**body))[0].prompt_chars == 2


def test_an_incomplete_character_at_the_end_is_not_text():
    for end in ([], [TOKENIZER.eot_id]):
        events = []
        ids = [*"é日".encode()[:-1], *end]
        request = GenerationRequest(tokens_of("a"), len(ids))
        sequence = Sequence(request, events.append, lambda *_: None, TOKENIZER, 9.0)
        for token in ids:
            sequence.append(TokenLogprob(token, None))
        assert "".join(event.text for event in events if isinstance(event, Text)) == "é"
        assert events[-1].new_tokens == len(ids)
