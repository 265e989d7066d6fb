"""A shared prefix is prefilled once, and nothing else changes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.evaluating import lm_eval_tasks
from mamba_jax.evaluating.scorer import Scorer, continue_texts
from mamba_jax.models import build
from tests.support.tiny_models import MODELS, TOKENIZER, model_of

apply = jax.jit(build.apply, static_argnums=1)
EXAMPLES = "1+1=2;"
PAIRS = [
    (f"{EXAMPLES}{question}", answer)
    for question in ("2+2=", "3+3=", "10+10=")
    for answer in ("4", "6", "12")
]


def scorer_of(*models):
    """Two rows: batches that are not full. Four tokens: several chunks, and single tokens."""
    return Scorer(models, batch_size=2, chunk_tokens=4)


def log_probs_of(model, row):
    """float64 (t, v), after each token, of one whole forward; all rows compiled to one length."""
    logits = apply(model.params, model.config, np.array([row + [0] * (32 - len(row))]))[0]
    logits = np.asarray(logits, np.float64)[0, : len(row), : TOKENIZER.vocab_size]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("family", MODELS)
def test_continuations_of_one_context_score_as_whole_sequences(family):
    model = model_of(family)
    scorer = scorer_of(model)
    # Out of order, so that the result cannot depend on order.
    pairs = [PAIRS[i] for i in np.random.default_rng(0).permutation(len(PAIRS))]
    found = lm_eval_tasks.loglikelihoods(scorer, pairs)
    for (context, answer), (total, is_greedy) in zip(pairs, found, strict=True):
        row = [TOKENIZER.eot_id, *(context + answer).encode()]
        log_probs = log_probs_of(model, row)[len(context) : -1]
        targets = list(answer.encode())
        # Sums of three float32 logarithms.
        assert total == pytest.approx(log_probs[range(len(targets)), targets].sum(), rel=1e-5)
        assert is_greedy == (log_probs.argmax(-1).tolist() == targets)
    # The separator and the examples; what the contexts add, without their last token, which is
    # processed with each answer; the answers without their last tokens.
    assert scorer.tokens_processed == (1 + 6) + (3 + 3 + 5) + 3 * (1 + 1 + 2)


def test_generation_prefills_a_shared_prefix_once():
    model = model_of("hybrid", 4)  # generates different text after different prompts
    scorer = scorer_of(model)
    rows = [[TOKENIZER.eot_id, *f"{EXAMPLES}{end}".encode()] for end in ("a", "bc", "def")]
    made = scorer.continuations([np.array(row, np.int32) for row in rows], 5, lambda *_: False)
    assert scorer.tokens_processed == (1 + 6) + (0 + 1 + 2) + 3 * 5
    for row, tokens in zip(rows, made, strict=True):
        most_likely = log_probs_of(model, row + tokens).argmax(-1)
        assert most_likely[len(row) - 1 : -1].tolist() == tokens and len(tokens) == 5
    assert len(set(map(tuple, made))) == 3

    # The end of text slightly more likely than one of these tokens: there the texts end.
    last = made[0][1]
    kernel = model.params["lm_head"]["kernel"].copy()
    kernel[TOKENIZER.eot_id] = 1.001 * kernel[last]
    params = model.params | {"lm_head": {"kernel": kernel}}
    scorer = scorer_of(dataclasses.replace(model, params=params))
    ended = scorer.continuations([np.array(row, np.int32) for row in rows], 5, lambda *_: False)
    assert ended == [row[: row.index(last)] if last in row else row for row in made]
    assert len(ended[0]) == 1


def test_each_task_is_answered_separately_and_in_order():
    @dataclasses.dataclass
    class Request:
        task_name: str
        args: tuple

    requested = []

    def answer(arguments):
        requested.append(arguments)
        return [text.upper() for (text,) in arguments]

    requests = [Request(task, (text,)) for task, text in (("x", "a"), ("y", "b"), ("x", "c"))]
    assert lm_eval_tasks.by_task(requests, answer) == ["A", "B", "C"]
    assert requested == [[("a",), ("c",)], [("b",)]]


def test_a_diverged_model_is_named_and_not_measured():
    model = model_of("mamba")
    diverged = dataclasses.replace(
        model, params=jax.tree.map(functools.partial(np.multiply, np.nan), model.params)
    )
    for measure in (
        lambda scorer: lm_eval_tasks.loglikelihoods(scorer, PAIRS[:1]),
        lambda scorer: continue_texts(scorer, ["a"], 2, []),
    ):
        with pytest.raises(UserError, match="its training diverged"):
            measure(scorer_of(diverged))


def test_a_token_across_the_border_leaves_one_for_the_continuation():
    class Gpt2:
        tokenizer = load_tokenizer("gpt2")

    (hello,) = Gpt2.tokenizer.encode("hello").tolist()
    for context, continuation, before, n in (
        ("hel", "lo", 1, 2),
        ("hello", "", 2, 2),
        ("hello ", "world", 2, 3),
        ("", "hello", 1, 2),
        ("", "", 1, 1),
    ):
        start, whole = lm_eval_tasks.encode_pair(Gpt2, context, continuation)
        assert (start, len(whole)) == (before, n), (context, continuation)
        assert n == 1 or whole[1] == hello
