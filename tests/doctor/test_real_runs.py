"""Rules on real runs: what the trainer itself records when something is wrong.

All share one compiled step, except the one whose learning rate is too high.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.doctor import rules, signals
from mamba_jax.doctor.finding import Finding
from tests.support.tiny_run import quick_compiles  # noqa: F401

from . import real_run


@pytest.fixture
def train(tmp_path, capsys):
    """Trains and returns rule → finding."""

    def run(**changes) -> dict[str, Finding]:
        folder = real_run.train(tmp_path / "run", **changes)
        capsys.readouterr()
        return dict(rules.examine(signals.read(folder)).findings)

    return run


def with_leaf(name: str, change):
    """Returns a function that sets the parameters of one name in all layers."""

    def meddle(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jnp.asarray(change(leaf), leaf.dtype)
                if jax.tree_util.keystr(path, simple=True, separator=".").endswith(name)
                else leaf
            ),
            params,
        )

    return meddle


def test_a_healthy_run(tmp_path, capsys):
    folder = real_run.train(tmp_path / "run")
    capsys.readouterr()
    diagnosis = rules.examine(signals.read(folder))
    assert diagnosis.findings == ()
    assert diagnosis.unchecked == {}, "a rule has nothing to say of what the trainer records"


def test_text_without_order_or_frequencies(train):
    random = np.random.default_rng(0).integers(1, real_run.MODEL.vocab_size, 100_000, np.int32)
    (finding,) = train(ids=random, steps=230).values()
    assert finding.title == "The loss does not fall"


def test_a_memorised_text(train):
    text = real_run.text()
    (finding,) = train(ids=text[5_000:5_200], eval_ids=text[-20_000:], steps=240).values()
    assert finding.title.startswith("The model overfits")
    assert "step 240" in finding.evidence[0]


def test_a_learning_rate_too_high(train):
    found = train(config=real_run.FAR_TOO_HIGH, steps=60)
    assert found["learning rate"].title == "The learning rate is too high"


def test_weights_thrown_off(train):
    """As after one step that is too large: the loss jumps and takes some steps to recover."""
    random = np.random.default_rng(0)
    throw = with_leaf("embedding", lambda leaf: leaf + random.normal(0, 0.5, leaf.shape))
    (finding,) = train(steps=160, meddle={100: throw}).values()
    assert finding.title == "The loss spikes"
    assert "beginning at step 100" in finding.evidence[0]


def test_a_weight_that_is_not_a_number(train):
    breaks = with_leaf("A_log", lambda leaf: leaf * np.nan)
    (finding,) = train(steps=40, meddle={20: breaks}).values()
    assert finding.title == "The training diverged"
    assert "training diverged at step 20" in finding.evidence[0]


@pytest.mark.parametrize(
    "leaves,titles",
    [
        (
            {"gate.bias": -9.0, "dt_proj.bias": 200.0},
            {"depth gates": "Depth gates are stuck closed", "Δ": "Δ runs away"},
        ),
        (
            {"gate.bias": 9.0, "dt_proj.bias": -14.0, "A_log": 7.0},
            {
                "depth gates": "Depth gates are stuck open",
                "Δ": "Δ collapses towards 0",
                "A": "The decay rates A run away",
            },
        ),
    ],
)
def test_layers_that_collapsed(train, leaves, titles):
    def meddle(params):
        for leaf, value in leaves.items():
            params = with_leaf(leaf, lambda old, value=value: jnp.full_like(old, value))(params)
        return params

    found = train(steps=60, meddle={1: meddle})
    for rule, title in titles.items():
        assert found[rule].title == title
        assert "layers 0 and 1 of 2" in " ".join(found[rule].evidence)


def test_a_slow_disk(train):
    (finding,) = train(read_secs=0.2, steps=60).values()
    assert finding.title == "The training waits for data"
    assert "95%" in finding.evidence[0]


def test_a_device_that_becomes_slow(train):
    (finding,) = train(step_secs=lambda step: 0.01 if step < 80 else 0.02, steps=120).values()
    assert finding.title == "The training has become slower"
    assert "17,455 tokens/s" in finding.evidence[0]
    assert "9,143 at" in finding.evidence[0]
