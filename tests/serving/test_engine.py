"""The engine's output equals offline generation's, whatever else is in the batch."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.generation import Sampling, generate
from mamba_jax.models import build
from mamba_jax.serving import engine as engines
from mamba_jax.serving import prefilling, slots
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.observer import Observer
from mamba_jax.serving.sequence import End, Failed, GenerationRequest, PromptLogprobs, Text
from tests.support.tiny_models import MODELS, TOKENIZER, model_of

from .conftest import (
    Listener,
    answers,
    engine_of,
    offline,
    request_of,
    tokens_of,
    wait_until_idle,
)

PROMPTS = ["def main(", "", "é", "x = 1\n" * 8, "a", "def main(", "def main():", "to be or not"]


@pytest.mark.parametrize("family", MODELS)
def test_answers_are_those_of_offline_generation_whatever_joins_the_batch(family):
    engine = engine_of(family, max_batch=3)
    listener = Listener(len(PROMPTS))
    for i, prompt in enumerate(PROMPTS):  # each arrives while others are under way
        engine.submit(
            [request_of(prompt, max_tokens=5 + i)], lambda _, event, i=i: listener(i, event)
        )
        time.sleep(0.002 * i)
    for i, (prompt, events) in enumerate(zip(PROMPTS, listener.wait(), strict=True)):
        text = "".join(event.text for event in events if isinstance(event, Text))
        assert text == offline(family, prompt, 5 + i), prompt
        assert isinstance(events[-1], End)
    engine.close()


def test_a_seeded_answer_does_not_depend_on_other_requests(engine):
    sampled = request_of("def ", temperature=1.0, top_k=40, top_p=0.9, seed=7)
    others = [request_of(p, temperature=t, seed=7) for p, t in (("a", 1.5), ("", 0.0), ("b", 0.7))]
    ((alone, _),) = answers(engine, sampled)
    assert answers(engine, *others, sampled)[-1][0] == alone
    assert answers(engine, sampled, sampled) == [answers(engine, sampled)[0]] * 2
    other_seed = request_of("def ", temperature=1.0, top_k=40, top_p=0.9, seed=8)
    assert answers(engine, other_seed)[0][0] != alone


def test_a_long_prompt_does_not_stall_the_others(engine):
    listener = Listener(2)
    n_chunks = 12
    (other,) = engine.submit([request_of("to be or not", max_tokens=200)], listener)
    long = request_of("z" * (n_chunks * prefilling.BUDGET_TOKENS - 1), max_tokens=1)
    n_before = []
    engine.submit([long], lambda _, event: (n_before.append(other.n_new), listener(1, event)))
    assert all(isinstance(events[-1], End) for events in listener.wait())
    assert other.n_new == 200
    # A token of the other between two chunks, less the one that the device is ahead.
    assert n_before[0] >= n_chunks - 2


def test_prompts_with_a_common_prefix_continue_from_its_cache_entry():
    engine = engine_of("hybrid")
    shared = "The same beginning of three prompts. "
    prompts = [shared + end for end in ("One?", "Two?", "Six and ten?", "One?")]
    results = [answers(engine, request_of(prompt))[0] for prompt in prompts]
    n_shared = len(tokens_of(shared))
    cached = [end.cached_tokens for _, end in results]
    # The second finds where they diverge; the fourth is the first one as a whole.
    assert cached == [0, 0, n_shared, len(tokens_of(prompts[0]))]
    assert [text for text, _ in results] == [offline("hybrid", prompt) for prompt in prompts]
    assert all(
        end.prompt_tokens == len(tokens_of(p)) for (_, end), p in zip(results, prompts, strict=True)
    )
    engine.close()


def test_choices_of_one_prompt_prefill_it_once():
    engine = engine_of("mamba")
    request = request_of("A prompt that several answers are wanted to. " * 12)
    results = answers(engine, request, request, request)
    n_prompt = len(request.tokens)
    assert n_prompt > 2 * prefilling.BUDGET_TOKENS
    assert sorted(end.cached_tokens for _, end in results) == [0, n_prompt, n_prompt]
    assert len({text for text, _ in results}) == 1
    engine.close()


def test_logprobs_are_those_of_a_whole_pass(engine):
    listener = Listener(1)
    engine.submit([request_of("def ", logprobs=20, prompt_logprobs=True)], listener)
    (events,) = listener.wait()
    scored = next(event for event in events if isinstance(event, PromptLogprobs)).tokens
    made = [told for event in events if isinstance(event, Text) for told in event.tokens]
    tokens = [told.token for told in (*scored, *made)]
    assert tokens[: len(scored)] == tokens_of("def ").tolist()
    model = model_of("mamba")
    logits_tv = build.apply(jax.device_put(model.params), model.config, jnp.array([tokens]))[0][0]
    logits_tv = np.asarray(logits_tv, np.float64)[:, : TOKENIZER.vocab_size]
    truth_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    assert scored[0].logprob is None
    for at, told in enumerate((*scored, *made)[1:]):
        # float32 sums in another order.
        assert told.logprob == pytest.approx(truth_tv[at, told.token], abs=1e-4)
        ids, logprobs = zip(*told.top, strict=True)
        best = np.sort(truth_tv[at])[::-1][: len(ids)]
        np.testing.assert_allclose(logprobs, best, atol=1e-4)
        np.testing.assert_allclose(truth_tv[at, list(ids)], best, atol=1e-4)


def test_a_stop_ends_the_text_before_it(engine):
    whole = offline("mamba", "def ", 12)
    stop = whole[4:6]
    ((text, end),) = answers(engine, request_of("def ", stops=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert end.reason == "stop"
    assert end.new_tokens < 12


def test_the_beginning_of_a_stop_is_text_where_the_text_ends(engine):
    whole = offline("mamba", "def ", 12)
    ((text, end),) = answers(engine, request_of("def ", stops=(whole[-1] + "and no more",)))
    assert text == whole
    assert end.new_tokens >= 12


def test_logprobs_are_reported_up_to_the_stop(engine):
    stop = offline("mamba", "On and on", 12)[5:7]
    listener = Listener(1)
    engine.submit([request_of("On and on", stops=(stop,), logprobs=0)], listener)
    (events,) = listener.wait()
    texts = [event for event in events if isinstance(event, Text)]
    told = [each.token for event in texts for each in event.tokens]
    assert TOKENIZER.decode(told) == "".join(event.text for event in texts)
    assert events[-1].new_tokens > len(told)


def test_no_step_is_made_for_tokens_beyond_the_request(engine, monkeypatch):
    step, calls = slots.step, []
    monkeypatch.setattr(slots, "step", lambda *of, **how: (calls.append(1), step(*of, **how))[1])
    ((_, end),) = answers(engine, request_of("to be or not", max_tokens=3))
    assert (end.reason, len(calls)) == ("length", 3)


def test_no_token_may_be_requested(engine):
    ((text, end),) = answers(engine, request_of("def ", max_tokens=0))
    assert (text, end.reason, end.new_tokens) == ("", "length", 0)


def test_a_cancelled_request_frees_its_slot():
    engine = engine_of("mamba", max_batch=1)
    listener = Listener(2)
    hanging = engine.submit([request_of("a", max_tokens=10**6)], listener)
    engine.submit([request_of("def ")], lambda _, event: listener(1, event))
    while not listener.events[0]:
        time.sleep(0.001)
    assert not listener.events[1]
    engine.cancel(hanging)
    first, second = listener.wait()
    assert first[-1] == Failed("cancelled", "the client disconnected")
    assert isinstance(second[-1], End)
    engine.close()


def test_a_full_queue_refuses_all_or_none_and_lateness_ends():
    engine = engine_of("mamba", max_batch=1, max_queue=2, timeout_secs=2.0)
    listener = Listener(3)
    endless = request_of("a", max_tokens=10**6)
    engine.submit([endless] * 3, listener)
    with pytest.raises(engines.QueueFull):
        engine.submit([request_of("b")] * 2, listener)
    assert [events[-1].reason for events in listener.wait()] == ["timeout"] * 3
    ((_, end),) = answers(engine, request_of("c", max_tokens=1))
    assert isinstance(end, End)
    engine.close()


def test_closing_lets_requests_end_and_takes_no_more():
    engine = engine_of("mamba")
    listener = Listener(2)
    engine.submit([request_of("a", max_tokens=30), request_of("b", max_tokens=40)], listener)
    engine.close(drain_secs=60)
    assert [type(events[-1]) for events in listener.wait()] == [End, End]
    assert not engine.alive
    with pytest.raises(engines.Closed):
        engine.submit([request_of("c")], listener)


@pytest.mark.parametrize("part", ["prefill", "insert", "step"])
def test_a_failing_step_fails_its_requests_alone(part, engine, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(slots, part, fail)
        ((_, end),) = answers(engine, request_of(f"a new prompt that {part}s"))
        assert end == Failed("error", "the step failed: RESOURCE_EXHAUSTED: out of memory")
    assert answers(engine, request_of("a"))[0][0] == offline("mamba", "a")


def test_a_failing_step_ends_requests_whose_last_token_was_pending(monkeypatch):
    engine = engine_of("mamba")
    step, calls = slots.step, []

    def second_fails(*arguments, **how):
        calls.append(len(arguments))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return step(*arguments, **how)

    monkeypatch.setattr(slots, "step", second_fails)
    results = answers(engine, request_of("a", max_tokens=1), request_of("b", max_tokens=9))
    assert [end for _, end in results] == [Failed("error", "the step failed: out of memory")] * 2
    engine.close()


def test_a_cache_entry_that_failed_on_the_device_is_not_found_again(monkeypatch):
    """As when memory runs out after the call that makes it has returned."""
    engine = engine_of("mamba")
    prefill = slots.prefill

    def broken(*arguments, **how):
        state, x_btd = prefill(*arguments, **how)
        state.logits_bv.delete()
        return state, x_btd

    request = request_of("A prompt worth caching.")
    with monkeypatch.context() as patch:
        patch.setattr(slots, "prefill", broken)
        ((_, end),) = answers(engine, request)
        assert end.reason == "error"
    ((text, end),) = answers(engine, request)
    assert (text, end.cached_tokens) == (offline("mamba", "A prompt worth caching."), 0)
    engine.close()


def _tokens_shown(engine, request):
    """The tokens that an answer shows."""
    listener = Listener(1)
    engine.submit([dataclasses.replace(request, logprobs=0)], listener)
    (events,) = listener.wait()
    assert isinstance(events[-1], End)
    texts = [event for event in events if isinstance(event, Text)]
    return [told.token for event in texts for told in event.tokens], events[-1]


def _tokens_offline(model, tokens, max_tokens):
    steps = generate.generate_tokens(
        *generate.prepare([model]),
        [np.array(tokens, np.int32)],
        [0],
        n_rows=1,
        max_tokens=max_tokens,
        sampling=Sampling(0.0),
        seed=0,
        vocab_size=TOKENIZER.vocab_size,
        eot_id=TOKENIZER.eot_id,
    )
    return [token for (token,) in steps]


@pytest.mark.parametrize("end", ["length", "stop", "end of text"])
def test_the_next_turn_continues_from_the_state_behind_the_answer(end):
    model = model_of("hybrid", 4)  # generates different text after different prompts
    prompt, n_answer = tokens_of("user: What is it?\n\nassistant:").tolist(), 37
    made = _tokens_offline(model, prompt, n_answer)
    more: dict = {"max_tokens": n_answer}
    if end == "stop":  # the text of the first tokens, which comes but once
        more["stops"] = (TOKENIZER.decode(made[:22]),)
    if end == "end of text":  # slightly more likely than the token that is new last
        last = max(range(n_answer), key=lambda i: made.index(made[i]))
        kernel = np.array(model.params["lm_head"]["kernel"])
        kernel[TOKENIZER.eot_id] = 1.001 * kernel[made[last]]
        model = dataclasses.replace(model, params=model.params | {"lm_head": {"kernel": kernel}})
    metrics = Metrics()
    engine = engines.Engine(model, max_batch=2, observer=metrics)
    engine.start(warm_up=False)
    _, event = _tokens_shown(engine, GenerationRequest(np.array(prompt, np.int32), **more))
    assert event.reason == ("length" if end == "length" else "stop")
    assert event.new_tokens == n_answer if end == "length" else event.new_tokens < n_answer
    made = made[: event.new_tokens - (end == "end of text")]
    wait_until_idle(engine)
    # The prompt, the newest of the answer, all of the answer.
    assert len(engine._prefilling.prefixes) <= 3
    turn = [*prompt, *made, *TOKENIZER.encode("\n\nuser: And now?\n\nassistant:").tolist()]
    next_request = GenerationRequest(np.array(turn, np.int32), 12)
    next_shown, event = _tokens_shown(engine, next_request)
    assert event.cached_tokens == len(prompt) + len(made)
    assert next_shown == _tokens_offline(model, turn, 12)
    assert b"mamba_jax_continued_answers_total 1.0" in metrics.text()
    # Another answer to the first prompt continues from the prompt.
    edited = [*prompt, *TOKENIZER.encode("something else").tolist()]
    edited_shown, event = _tokens_shown(engine, GenerationRequest(np.array(edited, np.int32), 12))
    assert event.cached_tokens == len(prompt)
    assert edited_shown == _tokens_offline(model, edited, 12)
    engine.close()


def test_the_end_of_an_answer_is_prefilled_unseen_and_without_the_lock(monkeypatch):
    class Listening(Observer):
        def __init__(self):
            self.prefilling = []

        def round(self, waiting, prefilling, decoding, cache_bytes):
            self.prefilling.append(prefilling)

    observer = Listening()
    engine = engine_of("mamba", observer=observer)
    find, locked = engine._prefilling.prefixes.find, []
    monkeypatch.setattr(
        engine._prefilling.prefixes,
        "find",
        lambda t: (locked.append(engine._changed._is_owned()), find(t))[1],
    )
    stop = offline("mamba", "a prompt worth keeping", 21)[-3:]
    answers(engine, request_of("a prompt worth keeping", max_tokens=40, stops=(stop,)))
    wait_until_idle(engine)
    engine.close()
    assert locked == [False] * 3  # the prompt; the answer's end: is it short, then its entry
    assert sum(observer.prefilling) == 0  # the prompt was prefilled within its first round


def test_nothing_of_an_answer_is_kept_without_a_prefix_cache(monkeypatch):
    monkeypatch.setattr(slots, "extract", None)
    engine = engine_of("mamba", prefix_cache_bytes=0)
    ((text, _),) = answers(engine, request_of("def ", max_tokens=40))
    assert text == offline("mamba", "def ", 40)
    assert (len(engine._prefilling.prefixes), len(engine._prefilling.tails)) == (0, 0)
    engine.close()
