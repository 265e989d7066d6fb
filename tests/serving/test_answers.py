"""From requests to what the engine is asked, and from its events to answers."""

import numpy as np

from mamba_jax.serving.answers import Answer
from mamba_jax.serving.protocol import ChatRequest, Limits, Translator
from mamba_jax.serving.sequence import Asked, End, Text

from ..evaluating.tiny_models import TOKENIZER
from .conftest import tokens_of

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


def test_a_chat_ends_where_the_model_speaks_for_the_user():
    translator = Translator(TOKENIZER, Limits(400, 99), fills_in=False)
    (asked,) = translator.chat(ChatRequest(**CHAT, stop=["x"]))
    assert asked.stops == ("x", "\n\nuser:")
    assert asked.max_tokens == 99  # what fits
    np.testing.assert_array_equal(asked.tokens, tokens_of("user: Hi\n\nassistant:"))


def test_the_space_after_assistant_is_not_the_answers():
    asked = [Asked(tokens_of("a"), 9)]
    events = [Text(" "), Text(" two"), End("stop", 2, 0, 5)]
    whole = Answer("chat", "tiny", TOKENIZER, asked).whole([events])
    assert whole["choices"][0]["message"]["content"] == " two"
    streamed = Answer("chat", "tiny", TOKENIZER, asked)
    chunks = [chunk for event in events[:-1] for chunk in streamed.chunks(0, event)]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == " two"


def test_usage_counts_a_prompt_of_several_choices_once_and_as_read_if_one_had_to():
    tokens = tokens_of("a prompt")
    asked = [Asked(tokens, 9), Asked(tokens, 9), Asked(tokens_of("b"), 9)]
    answer = Answer("completion", "tiny", TOKENIZER, asked)
    events = [[End("length", 9, cached, new)] for cached, new in ((9, 3), (0, 4))]
    usage = answer.whole([*events, [End("stop", 2, 1, 5)]])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 12)
    assert usage["total_tokens"] == 23
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
