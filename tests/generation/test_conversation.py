"""Conversations: the tokens that the model processes, and its state afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.generation import Sampling, conversation, generate_text
from mamba_jax.generation.chat import STOP, prompt_of
from mamba_jax.generation.conversation import Conversation, exact_chunks
from mamba_jax.generation.ensemble import Model
from tests.support.tiny import assert_close
from tests.support.tiny_run import quick_compiles  # noqa: F401

from .test_generate import CONFIGS, GREEDY_SAMPLING, TOKENIZER, params_for, whole_logits

SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=0.95)
EOT = TOKENIZER.eot_id


class Spelling(Tokenizer):
    """Bytes, and one more token that extends beyond a stop."""

    def __init__(self):
        pieces = [*(bytes([value]) for value in range(256)), b"", b"r: no"]
        super().__init__("spelling", "spelling", EOT, pieces)

    def encode(self, text):
        return TOKENIZER.encode(text)


@pytest.fixture
def read(monkeypatch):
    """What models process from now on: (tokens, logits after them) of every call."""
    calls, prefill = [], conversation.prefill

    def spy(params, config, piece_bt, cache):
        logits_bv, cache = prefill(params, config, piece_bt, cache)
        calls.append((piece_bt[0].tolist(), logits_bv))
        return logits_bv, cache

    monkeypatch.setattr(conversation, "prefill", spy)
    return calls


@pytest.fixture
def chosen(monkeypatch):
    """The tokens that are chosen from now on."""
    tokens, choose = [], conversation._choose

    def spy(*arguments, **more):
        tokens.append(int(choose(*arguments, **more)))
        return tokens[-1]

    monkeypatch.setattr(conversation, "_choose", spy)
    return tokens


def talk(family="mamba", *, sampling=SAMPLING, max_tokens=12, tokenizer=TOKENIZER, **more):
    return Conversation(
        params_for(family),
        CONFIGS[family],
        tokenizer,
        sampling=sampling,
        max_tokens=max_tokens,
        **more,
    )


def tokens_of(calls):
    return [token for tokens, _ in calls for token in tokens]


@pytest.mark.parametrize("family", CONFIGS)
def test_two_turns_prefill_each_token_once_and_end_in_the_state_after_all(family, read, chosen):
    speaker = talk(family, seed=1)
    for text in ("How much is 1 + 1?", "é"):
        list(speaker.say(text))
    assert len(chosen) == 24 and EOT not in chosen, "choose another seed"
    encode = lambda text: TOKENIZER.encode(text).tolist()
    expected = [
        *(EOT, *encode("user: How much is 1 + 1?\n\nassistant:"), *chosen[:12]),
        *(*encode("\n\nuser: é\n\nassistant:"), *chosen[12:23]),  # the last waits for a next turn
    ]
    assert tokens_of(read) == expected
    truth = whole_logits(params_for(family), CONFIGS[family], jnp.array([expected]))[0, -1]
    # Pieces of 16 and 1 sum in another order than the whole: float32 rounding of two layers.
    assert_close(read[-1][1][0], truth, 2e-5)


# What the model writes, the token limit, what is shown, and what is kept before the next turn.
ENDINGS = {
    "by writing the user's turn": (" Two.\n\nuser:", 99, "Two.", " Two."),
    "by the end of its document": (" Two.\0", 99, "Two.", " Two."),
    "at once": ("\0", 99, "", ""),
    "by the token limit": (" Two. An", 5, "Two.", " Two."),
    "by the token limit, after the stop": (" Two.\n\nuser:", 12, "Two.", " Two."),
    "inside the stop": (" Two.\n\nus\0", 99, "Two.\n\nus", " Two."),
    "inside a character": (" Two\u00e9", 5, "Two", b" Two\xc3"),
    "by a token that continues": (" Two.\n\nuse\1", 99, "Two.", " Two."),
    "by a stop of one's own": (" Two; 2;", 99, "Two", " Two;"),
    "by one that is part of ours": (" Two\n\tuser", 99, "Two", " Two\n\t"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_an_answer_ends_the_next_turn_begins_as_in_training(ending, read, monkeypatch):
    written, max_tokens, shown, kept = ENDINGS[ending]
    script = [{0: EOT, 1: EOT + 1}.get(byte, byte) for byte in written.encode()] + [*b" ok", EOT]
    monkeypatch.setattr(conversation, "_choose", lambda *_, **__: script.pop(0))
    speaker = talk(max_tokens=max_tokens, tokenizer=Spelling(), stops=[";", "\n\t"])
    assert "".join(speaker.say("1 + 1?")) == shown
    del script[:-4]
    assert "".join(speaker.say("Sure?")) == "ok"
    kept = kept if isinstance(kept, bytes) else kept.encode()
    whole = b"user: 1 + 1?\n\nassistant:" + kept + b"\n\nuser: Sure?\n\nassistant: ok"
    assert tokens_of(read) == [EOT, *whole]


def test_an_interrupted_answer_is_kept_up_to_there(read, monkeypatch):
    script = [*b" Two.", *b" ok", EOT]
    monkeypatch.setattr(conversation, "_choose", lambda *_, **__: script.pop(0))
    speaker = talk(system="Be brief.")
    answer = speaker.say("1 + 1?")
    assert [next(answer) for _ in range(4)] == ["", "T", "w", "o"]
    answer.close()
    script.remove(ord("."))
    assert "".join(speaker.say("Sure?")) == "ok"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Sure?"},
    ]
    assert tokens_of(read) == [EOT, *f"{prompt_of(messages)} ok".encode()]


def test_the_first_answer_is_that_of_generate_text_and_reset_brings_it_back():
    speaker = talk(seed=3)
    first = "".join(speaker.say("hi"))
    settings = {"max_tokens": 12, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "seed": 3}
    prompt = prompt_of([{"role": "user", "content": "hi"}])
    (text,) = generate_text(
        params_for("mamba"), CONFIGS["mamba"], TOKENIZER, [prompt], stops=[STOP], **settings
    )
    assert first == text.removeprefix(" ") and len(set(first)) > 3
    assert "".join(speaker.say("hi")) != first  # other randomness, another state
    speaker.reset()
    assert "".join(speaker.say("hi")) == first


def test_an_ensemble_answers_by_the_mean_of_probabilities(read, chosen):
    other = Model(params_for("hybrid"), CONFIGS["hybrid"], TOKENIZER)
    list(talk(others=[other], sampling=GREEDY_SAMPLING).say("How much is 1 + 1?"))
    both = np.array([logits[0, : TOKENIZER.vocab_size] for _, logits in read], np.float64)
    softmax = np.exp(both) / np.exp(both).sum(-1, keepdims=True)
    mean = (softmax[0::2] + softmax[1::2])[-len(chosen) :]
    assert chosen == mean.argmax(-1).tolist()
    alone = softmax[0::2][-len(chosen) :].argmax(-1).tolist()
    assert chosen != alone


def test_a_turn_is_cut_into_few_lengths_without_padding():
    for n_tokens in (0, 1, 15, 16, 17, 143, 1023, 1024, 5000):
        lengths = exact_chunks(n_tokens)
        assert sum(lengths) == n_tokens and lengths == sorted(lengths, reverse=True)
    assert exact_chunks(1170) == [1024, 128, 16, 1, 1]
