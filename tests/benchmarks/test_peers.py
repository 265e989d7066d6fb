"""The peers do the work that they are timed for. Those of torch need the extra ``bench``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scan, workloads
from benchmarks.harness import Context
from benchmarks.peers import gpt2, torch_scan, transformers_mamba
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.ops.selective_scan import selective_scan

CONTEXT = Context("cpu", "cpu")
TINY = dataclasses.replace(workloads.model_of("small"), d_model=32, n_layers=3, vocab_size=40)


def transformer(**fields):
    config = gpt2.config_like(TINY, CONTEXT, remat=False)
    return dataclasses.replace(config, **fields)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_transformer_has_as_many_parameters(size):
    model = workloads.model_of(size)
    config = gpt2.config_like(model, CONTEXT, remat=False)
    shapes = jax.eval_shape(lambda: gpt2.init(config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(parameter_count(model).total, rel=1e-3)
    assert 2 * config.d_model < config.d_ff < 6 * config.d_model  # of GPT-2's shape: 4


@pytest.mark.parametrize("remat", [False, True])
def test_the_transformer_is_causal(remat):
    config = transformer(remat=remat)
    params = gpt2.init(config, jax.random.key(0))
    tokens = workloads.windows(2, 24, config.vocab_size)[:, :-1]
    changed = tokens.copy()
    changed[:, 10] = (changed[:, 10] + 1) % config.vocab_size
    run = jax.jit(lambda tokens: gpt2.forward(params, config, tokens))
    before, after = run(tokens), run(changed)
    # The same program on the same numbers: what comes before the change is equal bit for bit.
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    # And it does look back: every later token has a different output.
    assert (np.abs(before - after)[:, 10:].max(-1) > 1e-4).all()


def test_the_transformer_reads_nothing_across_segments():
    config = transformer(n_layers=1)
    params = gpt2.init(config, jax.random.key(0))
    tokens = workloads.windows(1, 8, config.vocab_size)[:, :-1]
    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % config.vocab_size
    segments = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]])
    run = jax.jit(lambda tokens: gpt2.forward(params, config, tokens, segments))
    one, other = run(tokens), run(changed)
    np.testing.assert_array_equal(one[:, 4:], other[:, 4:])
    assert (np.abs(one - other)[:, 2:4].max(-1) > 1e-5).all()


def test_the_transformer_depends_on_token_positions():
    config = transformer(n_layers=1)  # without positions one layer reads a set of tokens
    params = gpt2.init(config, jax.random.key(0))
    tokens = workloads.windows(1, 8, config.vocab_size)[:, :-1]
    other = tokens[:, [1, 0, *range(2, 8)]]
    assert not np.array_equal(tokens, other)
    last = lambda tokens: gpt2.forward(params, config, tokens)[:, -1]
    assert np.abs(last(tokens) - last(other)).max() > 1e-5  # rounding alone gives about 1e-7


def test_the_transformer_learns_a_fixed_batch():
    config = transformer()
    windows = workloads.windows(2, 16, config.vocab_size)
    params = gpt2.init(config, jax.random.key(0))

    @jax.jit
    def step(params):
        def loss(params):
            logits = gpt2.forward(params, config, windows[:, :-1]) @ params["embedding"].T
            log_p = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_p, windows[:, 1:, None], -1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients), value

    first = None
    for _ in range(60):
        params, value = step(params)
        first = first or float(value)
    assert float(value) < 0.5 * first


@pytest.mark.parametrize("name", [torch_scan.PSCAN, torch_scan.LOOP])
def test_a_torch_scan_equals_ours(name, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("mambapy")
    monkeypatch.setattr(torch, "compile", lambda function: function)  # needs a C++ compiler
    inputs, repeats = scan.make_inputs({"B": 2, "L": 24, "d": 8})
    assert repeats == (2, 1, 1)
    scan_peer = {torch_scan.PSCAN: torch_scan._pscan, torch_scan.LOOP: torch_scan._loop}[name]
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    theirs = scan_peer(tensors, CONTEXT)(tensors).numpy()
    arrays = {key: jnp.asarray(value) for key, value in inputs.items() if key != "dy_bte"}
    ours, _ = selective_scan(**arrays, dt_softplus=True, implementation="reference")
    # Float32 sums of 16 products in another order.
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_transformers_model_is_of_our_size():
    pytest.importorskip("transformers")
    peer = transformers_mamba.make_model(TINY, False, CONTEXT)
    count = sum(parameter.numel() for parameter in peer.parameters())
    assert count == parameter_count(TINY).total


def test_generation_times_tokens_after_the_first():
    prepared = workloads.prepare_generation(TINY, batch=2, context=8, n_tokens=9)
    first = workloads.prepare_generation(TINY, batch=2, context=8, n_tokens=0)
    # Each run asserts that as many tokens were made. The time is a difference of two runs, which
    # compiling makes large the first time.
    assert prepared.run() < 60 and first.run() > 0


@pytest.mark.parametrize("n_tokens", [0, 5])
def test_transformers_generation_makes_all_tokens(n_tokens):
    pytest.importorskip("transformers")
    prompts = workloads.windows(2, 8, TINY.vocab_size)[:, :-1]
    prepared = transformers_mamba.prepare_generation(TINY, prompts, n_tokens, CONTEXT)
    assert prepared.run() > 0  # it asserts the number of tokens


def test_a_scan_of_the_grid_has_its_size_and_all_gradients(monkeypatch):
    monkeypatch.setattr(scan, "BLOCK_TOKENS", 8)
    case = {"pass": scan.BOTH, "B": 2, "L": 24, "d": 8}
    made = {}
    monkeypatch.setattr(
        scan.harness, "prepare_jax", lambda f, *arrays: made.update(f=f, arrays=arrays)
    )
    scan.prepare("sequential", case, CONTEXT)
    y_bte, (gradients,) = made["f"](*made["arrays"])
    assert y_bte.shape == (2, 24, 8)
    shapes = {key: gradient.shape for key, gradient in gradients.items()}
    assert shapes["x_bte"] == (2, 24, 8) and shapes["B_btn"] == (2, 24, 16)
    assert len(shapes) == 8 and all(jnp.abs(g).max() > 0 for g in gradients.values())
