"""Generation against whole forward passes, and its independence of everything but the prompt."""

import codecs
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.generation import Sampling, generate, generate_text
from mamba_jax.generation.ensemble import Model, mean_logits
from mamba_jax.models import build
from tests.support.tiny import HYBRID, MAMBA, assert_close, params_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

TOKENIZER = load_tokenizer("bytes")
# Seven ids more than the tokenizer has, as a padded vocabulary would have. Untied, because a random
# tied head only repeats the last token.
CONFIGS = {
    config.family: dataclasses.replace(
        config, vocab_size=TOKENIZER.vocab_size + 7, tie_embeddings=False
    )
    for config in (MAMBA, dataclasses.replace(HYBRID, attention_scales=(1, 2), plan="M,H"))
}
# The third fills most of a padded length of 64, the others hardly any of it.
PROMPTS = ["def main(", "", "x = 1\n" * 8, "é"]
# Three at a time, so that the second batch is shorter and holds one prompt and two idle rows.
SAMPLED = {
    "max_tokens": 20,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.95,
    "seed": 5,
    "batch_size": 3,
}
GREEDY = SAMPLED | {"temperature": 0.0}
GREEDY_SAMPLING = Sampling(temperature=0.0, top_k=0, top_p=0.95)  # shares GREEDY's compiled code

families = pytest.mark.parametrize("family", CONFIGS)


@functools.cache
def params_for(family):
    return jax.jit(params_of, static_argnums=0)(CONFIGS[family])  # one compilation, not many


def text_of(family, prompts=PROMPTS, settings=SAMPLED, **more):
    return generate_text(params_for(family), CONFIGS[family], TOKENIZER, prompts, **settings | more)


def tokens_of(
    family,
    prompts,
    n_tokens,
    *,
    eot_id=-1,
    sampling=GREEDY_SAMPLING,
    params=None,
    others=(),
    **more,
):
    """Ids, row by row; by default nothing ends a row."""
    models = [
        Model(params or params_for(each), CONFIGS[each], TOKENIZER) for each in (family, *others)
    ]
    steps = generate.generate_tokens(
        *generate.prepare(models),
        [sequence_of(prompt) for prompt in prompts],
        range(len(prompts)),
        n_rows=3,
        max_tokens=n_tokens,
        sampling=sampling,
        seed=0,
        vocab_size=TOKENIZER.vocab_size,
        eot_id=eot_id,
        **more,
    )
    return np.array(list(steps)).T


def sequence_of(prompt):
    return np.array([TOKENIZER.eot_id, *TOKENIZER.encode(prompt)], np.int32)


@functools.partial(jax.jit, static_argnums=1)
def whole_logits(params, config, tokens):
    return build.apply(params, config, tokens)[0]


@families
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_left_padded_batch_equals_single_outputs(family, settings):
    together = text_of(family, settings=settings)
    assert together == text_of(family, settings=settings, batch_size=1)
    assert len(set(together)) == len(PROMPTS)


@families
def test_greedy_is_the_argmax_of_the_whole_forward(family):
    generated = tokens_of(family, PROMPTS[:3], 20)
    assert all(len(set(row)) > 5 for row in generated), "too dull to prove anything"
    rows = [
        [*sequence_of(prompt), *tokens] for prompt, tokens in zip(PROMPTS, generated, strict=False)
    ]
    longest = max(map(len, rows))
    # Padded on the right, which causality makes harmless.
    padded = jnp.array([row + [0] * (longest - len(row)) for row in rows])
    logits = whole_logits(params_for(family), CONFIGS[family], padded)
    best = np.asarray(logits)[..., : TOKENIZER.vocab_size].argmax(-1)
    for row, tokens, best_row in zip(rows, generated, best, strict=True):
        assert tokens.tolist() == best_row[len(row) - 21 : len(row) - 1].tolist()


def test_an_ensemble_draws_from_the_mean_of_probabilities():
    """Mamba and hybrid together, against the mean of two softmaxes of whole forwards."""
    sampling = Sampling(temperature=0.7)
    drawn = tokens_of("mamba", PROMPTS[:3], 20, sampling=sampling, others=["hybrid"])
    rows = [[*sequence_of(prompt), *tokens] for prompt, tokens in zip(PROMPTS, drawn, strict=False)]
    longest = max(map(len, rows))
    padded = jnp.array([row + [0] * (longest - len(row)) for row in rows])
    mean = np.zeros((3, longest, TOKENIZER.vocab_size))
    for family, config in CONFIGS.items():
        logits = whole_logits(params_for(family), config, padded)
        odds = np.exp(np.asarray(logits, np.float64)[..., : TOKENIZER.vocab_size])
        mean += odds / odds.sum(-1, keepdims=True) / 2
    for index, (row, tokens) in enumerate(zip(rows, drawn, strict=True)):
        key = jax.random.fold_in(jax.random.key(0), index)
        for step, token in enumerate(tokens):
            at = len(row) - 20 + step - 1
            logits = jnp.float32(np.log(mean[index, at]) / 0.7)
            assert token == jax.random.categorical(jax.random.fold_in(key, step), logits)


def test_vocabularies_with_different_padding_are_averaged():
    each = np.random.default_rng(0).normal(size=(2, 3, 9)).astype(np.float32)
    odds = np.exp(each[..., :6].astype(np.float64))
    truth = np.log((odds / odds.sum(-1, keepdims=True)).mean(0))
    mean = mean_logits([each[0], each[1, :, :7]], 6)
    np.testing.assert_allclose(mean, truth, rtol=1e-5)  # float32, sums of six
    np.testing.assert_array_equal(mean_logits([each[0]], 6), each[0, :, :6])


def test_texts_end_before_a_stop_and_the_batch_soon_after_its_last_row(monkeypatch):
    free = text_of("hybrid")
    stops = [text[2:4] for text in free]
    expected = [text[: min(text.find(s) for s in stops if s in text)] for text in free]
    assert max(map(len, expected)) <= 2 and len(set(expected)) > 1
    calls, events, decode = [], [], generate._decode
    monkeypatch.setattr(generate, "_decode", lambda *a, **k: calls.append(0) or decode(*a, **k))
    emit = lambda *event: events.append(event)
    assert text_of("hybrid", stops=stops, max_tokens=1000) == expected
    # Two batches; eight tokens a call end every row, and one more call is under way by then.
    assert len(calls) == 2 * 2
    assert text_of("hybrid", stops=stops, max_tokens=1000, on_text=emit) == expected
    for index, text in enumerate(expected):
        *mine, last = [piece for row, piece in events if row == index]
        assert "".join(mine) == text and last is None


def test_the_middle_is_written_between_prompt_and_suffix():
    """What is generated continues: begin, prefix, prompt, suffix, suffix's text, middle."""
    settings = GREEDY | {"max_tokens": 12}
    (text,) = text_of("mamba", ["def f("], settings, suffix="return x")
    prefix, suffix, middle = TOKENIZER.fim_ids
    row = [TOKENIZER.eot_id, prefix, *b"def f(", suffix, *b"return x", middle]
    made = []
    while len(made) < 12:
        logits = whole_logits(params_for("mamba"), CONFIGS["mamba"], jnp.array([row + made]))
        made.append(int(logits[0, -1, : TOKENIZER.vocab_size].argmax()))
    assert TOKENIZER.eot_id not in made
    assert text == TOKENIZER.decode(made) != text_of("mamba", ["def f("], settings)[0]


@families
def test_chunked_prefill_equals_one_chunk(family, monkeypatch):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, length).astype(np.int32) for length in (75, 9)]
    whole = [
        whole_logits(params_for(family), CONFIGS[family], jnp.array(row[None]))[0, -1]
        for row in sequences
    ]
    monkeypatch.setattr(generate, "CHUNK_TOKENS", 32)
    tokens, segments = generate.pad_left(sequences)
    assert tokens.shape == (2, 16 + 2 * 32)  # the second row has two pieces of padding alone
    params = build.prepare_for_decoding(params_for(family), CONFIGS[family])
    logits, _ = generate.prefill_in_chunks(params, CONFIGS[family], tokens, segments)
    # Other shapes sum in another order: float32 rounding through two layers.
    assert_close(logits, jnp.stack(whole), 2e-5)


def test_chunk_lengths_cover_and_are_few():
    lengths = {n: generate.chunk_lengths(n) for n in range(1, 3200)}
    for n, pieces in lengths.items():
        assert n <= sum(pieces) <= max(2 * n, 16)
        assert sum(pieces) - n < generate.CHUNK_TOKENS
        assert generate.chunk_lengths(sum(pieces)) == pieces  # a padded batch is cut the same way
    assert {length for pieces in lengths.values() for length in pieces} == {
        16, 32, 64, 128, 256, 512, 1024
    }  # fmt: skip


@families
def test_padding_of_the_vocabulary_is_never_sampled(family):
    head = params_for(family)["lm_head"]["kernel"]
    # Both signs: for each hidden state some padded id has the largest logit by far.
    rows = len(head) - TOKENIZER.vocab_size
    signs = (-1.0) ** jnp.arange(rows)[:, None]
    loud = head.at[TOKENIZER.vocab_size :].set(1000.0 * signs * jnp.ones(head.shape[-1]))
    changed = params_for(family) | {"lm_head": {"kernel": loud}}
    tokens = jnp.array([[TOKENIZER.eot_id, 65]])
    best = whole_logits(changed, CONFIGS[family], tokens).argmax(-1)
    assert np.all(best >= TOKENIZER.vocab_size)
    texts = generate_text(changed, CONFIGS[family], TOKENIZER, PROMPTS, **SAMPLED)
    assert texts == text_of(family)


def test_a_row_ends_at_end_of_text_and_the_batch_with_its_last_row():
    free = tokens_of("mamba", PROMPTS[:3], 20)
    ending = int(free[0, 9])
    ends = [np.flatnonzero(row == ending).tolist() for row in free]
    assert not all(ends), "choose another token: one row has to outlast the others"
    stopped = tokens_of("mamba", PROMPTS[:1], 20, eot_id=ending)
    assert stopped[0].tolist() == free[0, : ends[0][0] + 1].tolist()
    together = tokens_of("mamba", PROMPTS[:3], 20, eot_id=ending)
    for row, end, free_row in zip(together, ends, free, strict=True):
        kept = end[0] + 1 if end else 20
        assert row[:kept].tolist() == free_row[:kept].tolist()
        assert set(row[kept:]) <= {ending}


def test_stream_joins_to_the_text_and_each_row_is_closed_once():
    params = params_for("hybrid")
    eager = params["lm_head"]["kernel"].at[TOKENIZER.eot_id].multiply(2.0)
    events = []
    texts = generate_text(
        params | {"lm_head": {"kernel": eager}},
        CONFIGS["hybrid"],
        TOKENIZER,
        PROMPTS * 2,
        on_text=lambda index, text: events.append((index, text)),
        **SAMPLED | {"max_tokens": 30},
    )
    ended_early = 0
    for index, text in enumerate(texts):
        mine = [piece for row, piece in events if row == index]
        assert mine[-1] is None and None not in mine[:-1] and "" not in mine
        assert "".join(mine[:-1]) == text
        ended_early += len(text.encode()) < 30  # a byte a token; U+FFFD only lengthens
    assert 0 < ended_early < len(texts)


def test_text_is_the_decoded_tokens():
    for prompt, text in zip(PROMPTS, text_of("mamba", settings=GREEDY), strict=True):
        tokens = tokens_of("mamba", [prompt], 20, eot_id=TOKENIZER.eot_id)[0]
        # Without half a character at the end.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert text == decoder.decode(bytes(token for token in tokens if token != TOKENIZER.eot_id))


def test_seed_and_row_decide():
    first = text_of("mamba", ["a", "a", ""])
    assert first == text_of("mamba", ["a", "a", ""])
    assert first[0] != first[1]  # the same prompt twice is two samples
    assert first != text_of("mamba", ["a", "a", ""], seed=6)


def test_every_step_has_randomness_of_its_own():
    # All weights 0: the same distribution at every step, so equal keys would give equal tokens.
    zeros = jax.tree.map(jnp.zeros_like, params_for("mamba"))
    tokens = tokens_of("mamba", PROMPTS[:3], 24, sampling=Sampling(), params=zeros)
    drawn = [tokens[row, step : step + 8].tolist() for row in range(3) for step in (0, 8, 16)]
    assert len({tuple(eight) for eight in drawn}) == 9
    # 72 draws from 257: chance alone repeats about ten, equal keys at any two steps many more.
    assert len(set(tokens.flatten().tolist())) > 50


def test_fewer_tokens_are_a_prefix_and_compile_nothing_new():
    kinds = {"prompts": ["a", "b", "c"], "settings": SAMPLED}
    long = text_of("hybrid", **kinds, max_tokens=40)
    n_compiled = generate._decode._cache_size()
    for n_tokens in (1, 8, 13):
        short = text_of("hybrid", **kinds, max_tokens=n_tokens)
        for whole, part in zip(long, short, strict=True):
            assert whole.startswith(part.rstrip("\ufffd"))  # which may end inside a character
    assert generate._decode._cache_size() == n_compiled


@pytest.mark.parametrize("dispatch_tokens", [1, 7, 64])
def test_how_many_tokens_a_call_makes_changes_nothing(dispatch_tokens):
    """Calls that end before, at and after the rows' end."""
    free = tokens_of("mamba", PROMPTS[:3], 20)
    ending = int(free[0, 9])
    expected = tokens_of("mamba", PROMPTS[:3], 20, eot_id=ending)
    got = tokens_of("mamba", PROMPTS[:3], 20, eot_id=ending, dispatch_tokens=dispatch_tokens)
    np.testing.assert_array_equal(got, expected)


def test_streamed_and_returned_texts_are_equal():
    assert text_of("hybrid", on_text=lambda index, text: None) == text_of("hybrid")


def test_no_prompts_no_texts():
    assert text_of("mamba", []) == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_errors_name_the_value(values, named):
    with pytest.raises(UserError, match=named):
        text_of("mamba", **values)


def test_parameters_spread_over_a_mesh_give_the_same_text():
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params_for("mamba"), everywhere)
    texts = generate_text(params, CONFIGS["mamba"], TOKENIZER, PROMPTS[:3], **GREEDY)
    assert texts == text_of("mamba", PROMPTS[:3], GREEDY)
