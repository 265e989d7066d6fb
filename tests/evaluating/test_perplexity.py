"""Log-probabilities in chunks against whole sequences in float64, and what is made of them."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax import evaluate
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.evaluating import perplexity
from mamba_jax.evaluating.scorer import Scorer, mean_probability
from mamba_jax.models import build
from tests.support.tiny_models import CONFIGS, TOKENIZER, model_of

TEXTS = ["x = 1\n" * 9, "é", "def f(a, b):", "a b c d e f g h i j k"]
SEQUENCES = [np.r_[TOKENIZER.eot_id, TOKENIZER.encode(text)].astype(np.int32) for text in TEXTS]


@functools.cache
def truth(family, seed=0):
    """ln of all probabilities after each token, float64, each sequence read whole and alone."""
    model, result = model_of(family, seed), []
    longest = max(map(len, SEQUENCES))
    apply = jax.jit(build.apply, static_argnums=1)
    for sequence in SEQUENCES:
        padded = np.pad(sequence, (0, longest - len(sequence)))[None]
        logits = apply(model.params, model.config, padded)[0]
        logits = np.asarray(logits, np.float64)[0, : len(sequence) - 1, : TOKENIZER.vocab_size]
        logits -= logits.max(-1, keepdims=True)
        result.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return result


def assert_scores(scorer, log_probs):
    for sequence, scores, of_all in zip(
        SEQUENCES, scorer.scores(SEQUENCES), log_probs, strict=True
    ):
        targets = sequence[1:]
        expected = -of_all[np.arange(len(targets)), targets]
        np.testing.assert_allclose(scores.nlls, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scores.greedy, of_all.argmax(-1) == targets)


@pytest.mark.parametrize("family", CONFIGS)
def test_chunks_score_as_the_whole_sequence(family):
    # Three rows and chunks of seven: batches and chunks that are not full, rows that end early.
    assert_scores(Scorer([model_of(family)], batch_size=3, chunk_tokens=7), truth(family))


def test_an_ensemble_is_the_mean_of_probabilities():
    ensemble = [model_of("mamba", 0), model_of("hybrid", 1)]
    pairs = zip(truth("mamba", 0), truth("hybrid", 1), strict=True)
    mean = [np.log((np.exp(a) + np.exp(b)) / 2) for a, b in pairs]
    assert_scores(Scorer(ensemble, batch_size=3, chunk_tokens=7), mean)


def test_improbable_tokens_do_not_vanish_from_an_ensemble():
    log_probs = [jnp.array([-200.0, 0.0]), jnp.array([-300.0, 0.0])]
    np.testing.assert_allclose(mean_probability(log_probs)[0], -200 - math.log(2), rtol=1e-6)


def test_an_ensemble_needs_one_tokenizer():
    other = dataclasses.replace(model_of("mamba"), tokenizer=load_tokenizer("gpt2"))
    with pytest.raises(UserError, match="same tokenizer; these have bytes and gpt2"):
        Scorer([model_of("mamba"), other], batch_size=1, chunk_tokens=1)


def test_metrics_by_their_definitions():
    measured = perplexity.Measured(
        np.array([2.0, 4.0]), np.array([1, 2]), np.array([3, 5], np.int64)
    )
    summary = perplexity.summarise(measured, seed=0)
    assert summary["perplexity"]["value"] == pytest.approx(math.e**2)
    assert summary["bits_per_byte"]["value"] == pytest.approx(6 / math.log(2) / 8)
    alone = perplexity.Measured(*(each[:1] for each in dataclasses.astuple(measured)))
    assert perplexity.summarise(alone, seed=0)["perplexity"]["low"] is None


def test_intervals_are_those_of_a_mean():
    # Equal lengths: bits per byte is then a mean over documents, with a known standard error.
    nlls = np.random.default_rng(1).normal(10, 2, 400)
    ones = np.ones(400, np.int64)
    bits = perplexity.summarise(perplexity.Measured(nlls, ones, ones), seed=0)["bits_per_byte"]
    half = 1.96 * nlls.std(ddof=1) / 20 / math.log(2)
    assert (bits["high"] - bits["low"]) / 2 == pytest.approx(half, rel=0.1)
    assert bits["low"] < bits["value"] < bits["high"]


@pytest.fixture
def corpus(tmp_path):
    """A file for each text."""
    for name, text in zip("abcd", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    return tmp_path


def test_the_command(run_dir, corpus, capsys):
    out = corpus / "result.out"
    flags = ["--batch_size=3", "--chunk_tokens=7", f"--json={out}", f"--data={corpus}"]
    assert evaluate.main([f"--checkpoint={run_dir}", *flags]) == 0
    nll = -sum(
        log_probs[np.arange(len(sequence) - 1), sequence[1:]].sum()
        for sequence, log_probs in zip(SEQUENCES, truth("mamba"), strict=True)
    )
    n_tokens = sum(len(sequence) - 1 for sequence in SEQUENCES)
    by_name = {metric["metric"]: metric for metric in json.loads(out.read_text())["metrics"]}
    expected = math.exp(nll / n_tokens)
    assert by_name["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert by_name["perplexity"]["tokens"] == n_tokens
    # A byte is a token here.
    bits = by_name["bits_per_byte"]["value"]
    assert bits == pytest.approx(nll / n_tokens / math.log(2), rel=1e-5)
    shown = by_name["perplexity"]["value"]
    assert f"{shown:.4f}" in capsys.readouterr().out
    assert evaluate.main([f"--checkpoint={run_dir}", *flags, "--limit=1"]) == 0
    perplexity_of_one, _ = json.loads(out.read_text())["metrics"]
    assert perplexity_of_one["documents"] == 1 and perplexity_of_one["low"] is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "nothing to measure"),
        (["--data=a.txt", "--limit=0"], "limit=0"),
        (["--data=a.txt", "--batch_size=0"], "batch_size=0"),
        (["--data=a.txt", "--num_fewshot=-1"], "num_fewshot=-1 must be at least 0"),
    ],
)
def test_mistakes_are_one_line(flags, named, run_dir, capsys):
    assert evaluate.main([f"--checkpoint={run_dir}", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error


def test_the_json_path_is_checked_before_anything_is_read(tmp_path, capsys):
    wrong, kept, new = tmp_path / "no" / "r.json", tmp_path / "kept.json", tmp_path / "new.json"
    kept.write_text("mine")
    ask = lambda file: evaluate.main(["--checkpoint=nowhere", "--data=x", f"--json={file}"])
    for file in (wrong, tmp_path):
        assert ask(file) == 2 and str(file) in capsys.readouterr().err
    for file in (kept, new):
        assert ask(file) == 2 and "nowhere" in capsys.readouterr().err
    assert kept.read_text() == "mine" and not new.exists()


def test_infinity_is_null_in_json(tmp_path, capsys):
    metrics = [{"value": math.inf, "ends": (math.nan, 1.5)}, {"n": 3, "text": "Infinity"}]
    evaluate.write(str(tmp_path / "r.json"), {"metrics": metrics})
    refuse = lambda word: pytest.fail(f"{word} is not JSON")
    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    expected = [{"value": None, "ends": [None, 1.5]}, {"n": 3, "text": "Infinity"}]
    assert read["metrics"] == expected
