"""The server as clients see it, over real connections."""

import contextlib
import http.client
import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.models import build
from tests.support.characters import text_and_owners
from tests.support.tiny_models import TOKENIZER, model_of

from .conftest import offline, tokens_of
from .served import metric, post, request, serving, until


@pytest.fixture(scope="module")
def port():
    with serving(max_body_bytes=20_000) as port:
        yield port


def streamed(port, path, body):
    """Returns the chunks of a stream, whose last line is [DONE]."""
    status, headers, content = request(port, "POST", path, body | {"stream": True})
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    *lines, last, end = content.decode().split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


GREEDY = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
CHAT_TEXT = "user: Hi\n\nassistant:"


def test_generate(port):
    assert post(port, "/generate", GREEDY) == (200, {"response": offline("mamba", "def main(")})
    status, answer = post(port, "/generate", {"prompt": ""})
    assert status == 200
    assert list(answer) == ["response"]


def test_generate_takes_what_completions_take(port):
    text = offline("mamba", "def main(")
    stopped = post(port, "/generate", GREEDY | {"stop": [text[7:9]]})[1]
    assert stopped == {"response": text[: text.index(text[7:9])]}
    hot = GREEDY | {"temperature": 50}
    for only_the_likeliest in ({"top_k": 1}, {"top_p": 0}):
        assert post(port, "/generate", hot | only_the_likeliest)[1] == {"response": text}
    hot |= {"temperature": 1.0, "seed": 3}
    (choice,) = post(port, "/v1/completions", hot)[1]["choices"]
    assert post(port, "/generate", hot)[1] == {"response": choice["text"]}
    assert post(port, "/generate", hot | {"seed": 4})[1] != {"response": choice["text"]}
    pieces = streamed(port, "/generate", GREEDY)
    assert len(pieces) > 1
    assert all(list(piece) == ["response"] for piece in pieces)
    assert "".join(piece["response"] for piece in pieces) == text


@pytest.mark.parametrize("prompt", ["日本😀x", [0xE6, 0x97], ""])
def test_offsets_of_sampled_bytes_are_places_in_the_text(prompt, port):
    """Most bytes of this model are not whole characters."""
    body = {"prompt": prompt, "max_tokens": 40, "seed": 5, "logprobs": 0}
    ((_, whole), (_, echoed)) = (
        post(port, "/v1/completions", body | {"echo": echo}) for echo in (False, True)
    )
    data = [_bytes_of(token) for token in whole["choices"][0]["logprobs"]["tokens"]]
    text, owners = text_and_owners(b"".join(data))
    assert "\ufffd" in text
    first_bytes = np.cumsum([0, *map(len, data)])[: len(data)]
    prompt = bytes(prompt) if isinstance(prompt, list) else prompt.encode()
    shown, prompt_owners = text_and_owners(prompt)
    shown = prompt.decode(errors="replace")
    expected = [len(shown) + [*owners, len(text)][at] for at in first_bytes]
    assert whole["choices"][0]["text"] == text
    assert whole["choices"][0]["logprobs"]["text_offset"] == expected
    assert echoed["choices"][0]["text"] == shown + text
    assert echoed["choices"][0]["logprobs"]["text_offset"] == prompt_owners + expected
    assert max(expected) <= len(shown + text)
    chunks = streamed(port, "/v1/completions", body)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [at for each in told if each for at in each["text_offset"]] == expected


def _bytes_of(name):
    """Returns a token's bytes, of its name in an answer."""
    if name == "<|endoftext|>":
        return b""
    if name.startswith("bytes:"):
        return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
    return name.encode()


def test_a_completion(port):
    status, answer = post(port, "/v1/completions", GREEDY | {"model": "tiny"})
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["text"] == offline("mamba", "def main(")
    assert answer["object"] == "text_completion"
    n_prompt = len(tokens_of("def main("))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == n_prompt
    assert usage["total_tokens"] == n_prompt + usage["completion_tokens"]
    # Without the end, twelve tokens; with it, as many as there are.
    assert (choice["finish_reason"] == "length") == (usage["completion_tokens"] == 12)


def test_several_prompts_and_choices_are_in_order(port):
    prompts = ["a", "to be", "x = "]
    for form in (prompts, [list(p.encode()) for p in prompts]):
        _, answer = post(port, "/v1/completions", GREEDY | {"prompt": form, "n": 2})
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [offline("mamba", p) for p in prompts for _ in range(2)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == sum(len(tokens_of(p)) for p in prompts)


def test_a_seed_repeats_and_choices_differ(port):
    sampled = GREEDY | {"temperature": 1.0, "top_p": 0.9, "seed": 3, "n": 2, "max_tokens": 20}
    texts = [
        [choice["text"] for choice in post(port, "/v1/completions", body)[1]["choices"]]
        for body in (sampled, sampled, sampled | {"seed": 4})
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    assert texts[2][0] == texts[0][1]  # the second choice is drawn with the next seed


def test_a_stream_equals_the_whole_answer(port):
    body = GREEDY | {"n": 2, "logprobs": 3, "echo": True, "prompt": "aé"}
    _, whole = post(port, "/v1/completions", body)
    chunks = streamed(port, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for i, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == i]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all(each["finish_reason"] is None for each in mine[:-1])
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [x for each in mine if each["logprobs"] for x in each["logprobs"][key]]
            assert told == choice["logprobs"][key], key


def test_a_chat_continues_its_rendering(port):
    text = offline("mamba", CHAT_TEXT).partition("\n\nuser:")[0].removeprefix(" ")
    status, answer = post(port, "/v1/chat/completions", CHAT)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
        "refusal": None,
    }
    chunks = streamed(port, "/v1/chat/completions", CHAT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == text
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    _, told = post(port, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})
    content = told["choices"][0]["logprobs"]["content"]
    assert (
        b"".join(bytes(each["bytes"]) for each in content)
        .decode("utf-8", "replace")
        .removeprefix(" ")
        == text
    )
    assert all(len(each["top_logprobs"]) == 2 for each in content)


def test_an_echo_reports_the_prompts_logprobs(port):
    """What loglikelihoods of lm_eval's client are made of."""
    body = {"prompt": "abcd", "max_tokens": 0, "echo": True, "logprobs": 1}
    _, answer = post(port, "/v1/completions", body)
    (choice,) = answer["choices"]
    assert choice["text"] == "abcd"
    told = choice["logprobs"]
    assert told["tokens"] == ["a", "b", "c", "d"]
    assert told["text_offset"] == [0, 1, 2, 3]
    model, tokens = model_of("mamba"), tokens_of("abcd")
    logits_tv = np.asarray(
        build.apply(jax.device_put(model.params), model.config, jnp.array(tokens[None]))[0][0]
    )
    logits_tv = logits_tv[:, : TOKENIZER.vocab_size]
    truth_tv = logits_tv - np.logaddexp.reduce(logits_tv, axis=-1, keepdims=True)
    expected = truth_tv[np.arange(4), tokens[1:]]
    np.testing.assert_allclose(told["token_logprobs"], expected, atol=1e-4)  # float32
    best = [max(top.values()) for top in told["top_logprobs"]]
    np.testing.assert_allclose(best, truth_tv[:4].max(-1), atol=1e-4)


def test_models_health_and_readiness(port):
    _, _, content = request(port, "GET", "/v1/models")
    assert [model["id"] for model in json.loads(content)["data"]] == ["tiny"]
    assert request(port, "GET", "/v1/models/")[2] == content
    for path in ("/v1/models/tiny", "/v1/models/tiny/"):
        status, _, content = request(port, "GET", path)
        assert (status, json.loads(content)["id"]) == (200, "tiny")
    assert request(port, "GET", "/v1/models/other")[0] == 404
    assert request(port, "GET", "/health")[0] == 200
    assert request(port, "GET", "/ready")[0] == 200
    status, headers, page = request(port, "GET", "/")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/html")
    assert b"<!doctype html>" in page


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_the_body(path, port):
    got, head = (request(port, method, path) for method in ("GET", "HEAD"))
    assert (head[0], head[2]) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head[1][name] == got[1][name]


def test_metrics_count(port):
    names = [
        "mamba_jax_generated_tokens_total",
        "mamba_jax_prompt_tokens_total",
        'mamba_jax_generations_total{reason="length"}',
        "mamba_jax_first_token_seconds_count",
    ]
    post(port, "/v1/completions", GREEDY)
    before = [metric(port, name) for name in names]
    body = ENDLESS | {"max_tokens": 3}
    assert post(port, "/v1/completions", body)[1]["choices"][0]["finish_reason"] == "length"
    after = [metric(port, name) for name in names]
    n_prompt = len(tokens_of(ENDLESS["prompt"]))
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, n_prompt, 1, 1]


LIST = "a list of length"
BAD = {
    "malformed JSON": (b'{"prompt": "a"', 400, "not valid JSON: Expecting ',' delimiter at char"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, "not valid JSON: 'utf-8' codec can't decode"),
    "no body": (b"", 400, "the body is missing"),
    "no object": (b'"a"', 400, 'the body must be a JSON object, not "a"'),
    "a list": (b"[1, 2]", 400, f"the body must be a JSON object, not {LIST} 2"),
    "null": (b"null", 400, "the body must be a JSON object, not null"),
    "a wrong type": ({"prompt": 5}, 400, "prompt: must be a string, a list"),
    "a number in quotes": (
        {"prompt": "a", "max_tokens": "5"},
        400,
        'max_tokens: input should be a valid integer, not "5"',
    ),
    "half a token": ({"prompt": "a", "max_tokens": 5.5}, 400, "valid integer, not 5.5"),
    "a truth value": ({"prompt": "a", "max_tokens": True}, 400, "valid integer, not true"),
    "no max_tokens": ({"prompt": "a", "max_tokens": -2}, 400, "equal to -1, not -2"),
    "a temperature in quotes": (
        {"prompt": "a", "temperature": "0.5"},
        400,
        'temperature: input should be a valid number, not "0.5"',
    ),
    "a stream in quotes": ({"prompt": "a", "stream": "true"}, 400, 'boolean, not "true"'),
    "a field of a field": (
        {"prompt": "a", "stream_options": {"include_usage": 1}},
        400,
        "stream_options.include_usage: input should be a valid boolean, not 1",
    ),
    "a huge number": (b'{"prompt": "a", "seed": ' + b"9" * 4_000 + b"}", 400, "seed: "),
    "a number too long to read": (
        b'{"prompt": "a", "seed": ' + b"9" * 9_000 + b"}",
        400,
        "not valid JSON: Exceeds the limit",
    ),
    "many stops": (
        {"prompt": "a", "stop": ["x"] * 17},
        400,
        f"stop: must be a string or a list of up to 16 strings, not {LIST} 17",
    ),
    "a stop that is none": ({"prompt": "a", "stop": ["x", 1]}, 400, "stop: must be a string or"),
    "best of many": ({"prompt": "a", "best_of": 3}, 400, "best_of=3 is not supported"),
    "a temperature that is none": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature: "),
    "a negative temperature": ({"prompt": "a", "temperature": -1}, 400, "temperature: "),
    "an empty list": ({"prompt": []}, 400, "empty list"),
    "a prompt beyond the limit": ({"prompt": "a" * 400}, 400, "at most 400 tokens"),
    "a prompt far beyond it": ({"prompt": "a" * 9_000}, 400, "at most 400 tokens"),
    "an id beyond the vocabulary": (
        {"prompt": [1, 257]},
        400,
        "token id out of range: 257; use 0 to 256",
    ),
    "an unknown model": ({"prompt": "a", "model": "gpt-5"}, 404, "model 'gpt-5' does not exist"),
    "a body beyond the limit": ({"prompt": "a" * 20_001}, 413, "larger than 20,000 bytes"),
    "too many choices": (
        {"prompt": ["a", "b"], "n": 100},
        400,
        "2 prompts × n=100; request at most 128",
    ),
    "a penalty": ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not supported"),
    "a suffix": ({"prompt": "a", "suffix": "b"}, 400, "not trained to fill in"),
    "a long list of nothing": (b'{"prompt": [' + b"null," * 3_000 + b"null]}", 400, "prompt: must"),
    "mixed lists": ({"prompt": ["a", 1]}, 400, "prompt: must be a string, a list of strings"),
    "more texts than fit": (
        {"prompt": "a", "n": 45},
        400,
        "too many texts in one request: 45; request at most 44",
    ),
    "logprobs of too much": (
        {"prompt": "a" * 390, "n": 2, "echo": True, "logprobs": 1},
        400,
        "send at most 400 per request",
    ),
    "a nest": (b'{"prompt": ' + b"[" * 9_000 + b"]" * 9_000 + b"}", 400, ""),
}


def test_a_content_type_that_is_not_json_is_named(port):
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            status, answer = post(port, path, GREEDY, headers={"Content-Type": kind})
            assert status == 415
            assert answer["error"]["message"] == (
                f"Content-Type is {kind}; send JSON as Content-Type: application/json"
            )


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_errors_name_the_field(path, port):
    for body, field in (
        ({}, None if path == "/v1/completions" else "messages" if "chat" in path else "prompt"),
        (CHAT | GREEDY | {"temperature": 101}, "temperature"),
        (CHAT | GREEDY | {"logit_bias": {"1": 5}}, "logit_bias"),
        (CHAT | GREEDY | {"seed": 0.5}, "seed"),
        (CHAT | GREEDY | {"model": 1}, "model"),
    ):
        status, answer = post(port, path, body)
        assert answer.get("error", {}).get("param") == field, body
        assert status == (200 if field is None else 400)
        assert field is None or answer["error"]["message"].startswith(field)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_affects_no_other_request(case, port):
    body, expected, message = BAD[case]
    status, answer = post(port, "/v1/completions", body)
    assert status == expected, answer
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert post(port, "/v1/completions", GREEDY)[1]["choices"][0]["text"] == offline(
        "mamba", "def main("
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages hold no text"),
        ({"messages": "Hi"}, 'messages: input should be a valid list, not "Hi"'),
        ({"messages": ["Hi"]}, 'messages[0]: input should be a valid object, not "Hi"'),
        ({"messages": [{"content": "Hi"}]}, 'messages[0] needs a "role"'),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "boss", "content": "Hi"}]},
            'messages[1] needs a "role", one of system, developer, user, assistant, tool, '
            'function, not "boss"',
        ),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "not a list of length 1"),
        ({"messages": [{"role": "user"}]}, 'messages[0] needs a "content"'),
        ({"messages": [{"role": "user", "content": None}]}, 'messages[0] needs a "content"'),
        ({"messages": [{"role": "assistant"}]}, 'messages[0] needs a "content"'),
        ({"messages": [{"role": "user", "content": 5}]}, "or a list of text parts, not 5"),
        ({"messages": [{"role": "user", "content": "a" * 400}]}, "at most 400 tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'not "image_url"'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text"),
        (CHAT | {"tools": [{}]}, "tools are not supported"),
        (CHAT | {"tools": [{}], "tool_choice": "auto"}, "tools are not supported"),
        (CHAT | {"functions": [{}]}, "functions are not supported"),
        (CHAT | {"tool_choice": "required"}, "tool_choice is not supported"),
        (CHAT | {"tool_choice": {"type": "function"}}, "tool_choice is not supported"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        (
            CHAT | {"response_format": {"type": "json_object"}},
            "response_format other than text is not supported",
        ),
    ],
)
def test_chats_refuse_what_they_do_not_offer(body, message, port):
    status, answer = post(port, "/v1/chat/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tools": [], "tool_choice": None, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": True},
        {"logprobs": False, "top_logprobs": 0, "n": 1.0, "stream_options": None, "stop": None},
        {"max_tokens": 12.0, "max_completion_tokens": None, "presence_penalty": 0},
    ],
)
def test_chats_take_what_changes_nothing(more, port):
    _, expected = post(port, "/v1/chat/completions", CHAT)
    status, answer = post(port, "/v1/chat/completions", CHAT | more)
    assert status == 200, answer
    assert answer["choices"] == expected["choices"]


@pytest.mark.parametrize("prompt", ["", None, [], [[]], [""]])
def test_an_empty_prompt_begins_a_document(prompt, port):
    if prompt == []:
        prompt = [TOKENIZER.eot_id]
    _, answer = post(port, "/v1/completions", GREEDY | {"prompt": prompt})
    assert answer["choices"][0]["text"] == offline("mamba", "")


def test_stops_may_be_any_characters(port):
    """One of them occurs in the text; of another only a part does."""
    body = {"prompt": "é", "max_tokens": 60, "seed": 1}
    (choice,) = post(port, "/v1/completions", body)[1]["choices"]
    stop = next(char for char in choice["text"][5:] if char > "\x7f")
    stops = ["日本語", "", "\ud800", stop]
    (stopped,) = post(port, "/v1/completions", body | {"stop": stops})[1]["choices"]
    assert stopped["text"] == choice["text"].partition(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_lone_surrogates_become_replacement_characters(port):
    _, answer = post(port, "/v1/completions", GREEDY | {"prompt": "\ud800", "echo": True})
    assert answer["choices"][0]["text"].startswith("\ufffd")


def test_unknown_paths_and_methods(port):
    for method, path, allowed in (
        ("GET", "/v2", None),
        ("POST", "/v1", None),
        ("GET", "/generate", "POST"),
        ("PUT", "/v1/completions/", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ):
        status, headers, content = request(port, method, path)
        message = json.loads(content)["error"]["message"]
        assert (status, headers["allow"]) == (404 if allowed is None else 405, allowed)
        assert path.rstrip("/") in message
        assert allowed is None or f"use {allowed}" in message


def test_a_key_is_required():
    with serving(api_key="secret") as port:
        status, answer = post(port, "/v1/completions", GREEDY)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for path, expected in (
            ("/health", 200),
            ("/", 200),
            ("/metrics", 401),
            ("/v1/models", 401),
        ):
            assert request(port, "GET", path)[0] == expected, path
        for key, expected in (("wrong", 401), ("secret", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert post(port, "/v1/completions", GREEDY, headers=headers)[0] == expected


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_other_origins_may_send_requests_only_if_listed(monkeypatch):
    origins = ["https://a.example", "http://localhost:3000"]
    key = {"Authorization": "Bearer secret"}
    with serving(api_key="secret", max_body_bytes=20_000, cors_origins=origins) as port:

        def allowed(method, path, body=None, origin=origins[1], **headers):
            headers = headers | {"Origin": origin}
            status, answer, _ = request(port, method, path, body, headers)
            return status, answer["access-control-allow-origin"], answer["vary"]

        for origin in origins:
            headers = {"Origin": origin} | PREFLIGHT
            status, answer, _ = request(port, "OPTIONS", "/v1/completions", headers=headers)
            assert status == 200
            assert answer["access-control-allow-origin"] == origin
            assert "POST" in answer["access-control-allow-methods"]
            for header in ("authorization", "content-type"):
                assert header in answer["access-control-allow-headers"].lower()
        here = origins[1], "Origin"
        assert allowed("POST", "/generate", GREEDY, **key) == (200, *here)
        stream = GREEDY | {"stream": True}
        assert allowed("POST", "/v1/completions", stream, **key) == (200, *here)
        assert allowed("POST", "/generate", GREEDY) == (401, *here)
        assert allowed("POST", "/generate", {"prompt": 1}, **key) == (400, *here)
        assert allowed("POST", "/generate", {"prompt": "a" * 30_000}, **key) == (413, *here)
        assert allowed("GET", "/v2", **key) == (404, *here)
        assert allowed("GET", "/generate", **key) == (405, *here)
        with monkeypatch.context() as patch:
            patch.setattr("mamba_jax.serving.api._submit", lambda *_: 1 / 0)
            assert allowed("POST", "/generate", GREEDY, **key) == (500, *here)
        elsewhere = {"origin": "https://b.example", **key}
        assert allowed("POST", "/generate", GREEDY, **elsewhere)[:2] == (200, None)
        headers = {"Origin": "https://b.example"} | PREFLIGHT
        status, answer, _ = request(port, "OPTIONS", "/generate", headers=headers)
        assert (status, answer["access-control-allow-origin"]) == (400, None)


def test_other_origins_may_not_send_requests_by_default(port):
    headers = {"Origin": "https://a.example"}
    assert (
        request(port, "GET", "/v1/models", headers=headers)[1]["access-control-allow-origin"]
        is None
    )
    assert request(port, "OPTIONS", "/generate", headers=headers | PREFLIGHT)[0] == 405


def raw(port, body):
    """Sends a request without reading the answer; returns the socket."""
    connection = socket.create_connection(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


# Greedily the model repeats itself here.
ENDLESS = {"prompt": "On and on", "max_tokens": 100_000, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_when_a_client_disconnects_its_slot_is_freed(port, stream):
    """Four are decoded and two wait."""
    cancelled = 'mamba_jax_generations_total{reason="cancelled"}'
    before = metric(port, cancelled)
    connection = raw(port, ENDLESS | {"n": 6, "stream": stream})
    until(lambda: metric(port, "mamba_jax_generations_decoding") > 0)
    connection.close()
    until(lambda: metric(port, cancelled) == before + 6)
    until(lambda: metric(port, "mamba_jax_generations_decoding") == 0)


def test_a_slow_client_does_not_delay_others(port):
    """One does not send its body and one never reads its stream; others are served."""
    slow_sender = socket.create_connection(("127.0.0.1", port))
    slow_sender.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    slow_reader = raw(port, ENDLESS | {"stream": True, "n": 2})
    _, answer = post(port, "/v1/completions", GREEDY)
    assert answer["choices"][0]["text"] == offline("mamba", "def main(")
    slow_sender.close()
    slow_reader.close()
    until(lambda: metric(port, "mamba_jax_generations_decoding") == 0)


def test_a_full_queue_reports_when_to_retry():
    with serving(max_queue=1) as port:
        hanging = raw(port, ENDLESS | {"n": 5})
        until(lambda: metric(port, "mamba_jax_generations_decoding") > 0)
        status, headers, content = request(port, "POST", "/v1/completions", GREEDY)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(content)["error"]["code"] == "queue_full"
        hanging.close()
        until(lambda: post(port, "/v1/completions", GREEDY)[0] == 200)


def test_a_body_in_chunks_is_bounded_too(port):
    """It does not say how long it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    chunks = iter([b'{"prompt": "', *[b"a" * 1_000] * 25, b'"}'])
    with contextlib.suppress(BrokenPipeError):  # the answer can come before the last chunks
        connection.request("POST", "/generate", chunks, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    assert "larger than 20,000 bytes" in json.loads(answer.read())["error"]["message"]


def test_an_unexpected_exception_is_an_error_like_the_others(port, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("unthought of")

    with monkeypatch.context() as patch:
        patch.setattr("mamba_jax.serving.api._submit", fail)
        for body in (GREEDY, GREEDY | {"stream": True}):
            status, answer = post(port, "/v1/completions", body)
            assert (status, answer["error"]["message"]) == (500, "the server failed")
    assert "unthought of" in caplog.text
    assert post(port, "/v1/completions", GREEDY)[0] == 200


def test_two_hundred_connections_at_once(port):
    """Four slots, forty waiting: each gets the right answer or a 429."""
    body = GREEDY | {"max_tokens": 3}
    expected = offline("mamba", "def main(", 3)
    connections = [raw(port, body) for _ in range(200)]
    statuses = []
    for connection in connections:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        content = json.loads(answer.read())
        statuses.append(answer.status)
        if answer.status == 200:
            assert content["choices"][0]["text"] == expected
        connection.close()
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 44
    assert post(port, "/v1/completions", GREEDY)[0] == 200
