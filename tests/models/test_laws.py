"""The laws of both families: truth, causality, packing, caches, rematerialisation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mamba_jax.config import ModelConfig, ParallelConfig, RunConfig
from mamba_jax.models import build
from mamba_jax.modules import layout as layouts
from mamba_jax.modules.norm import rms_normalise
from mamba_jax.ops.selective_scan import SAVEABLE, selective_scan
from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.training.loss import token_nll
from tests.support import naive
from tests.support.tiny import HYBRID, MAMBA, PLANS, TOKENS, VARIANTS, assert_close, params_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

# float32 rounding of a few hundred additions per layer in another order; values up to ~10.
ROUNDING = 3e-5
GLOBAL_LOOP = "plan (M,M,H)*2, global attention"
SHARED, BY_CHANNEL = "hybrid, scale 2, shared gate", "hybrid, scale 4, channel gate, pass embedding"
# About half of the gates exceed 0.5, so that tokens take any number of steps.
SKIPPING = dataclasses.replace(HYBRID, gate_skip_threshold=0.5, recursion_depth=3)
MODELS = VARIANTS | {
    "hybrid, tokens skip steps": SKIPPING,
    "plan A,M,H,M, tokens skip steps": dataclasses.replace(
        VARIANTS["plan A,M,H,M, signed"], gate_skip_threshold=0.5, recursion_depth=3
    ),
}
every_variant = pytest.mark.parametrize("name", MODELS)
both_families = pytest.mark.parametrize("config", [MAMBA, HYBRID], ids=["mamba", "hybrid"])


@functools.cache
def jitted_apply(config):
    return jax.jit(
        lambda params, tokens, segments=None, cache=None: build.apply(
            params, config, tokens, segment_ids_bt=segments, initial_cache=cache
        )
    )


MIXED = [plan for plan in PLANS if "," in plan]


@pytest.mark.parametrize("name", [*MODELS, *MIXED])
def test_logits_equal_the_naive_reading(name):
    config = (MODELS | PLANS)[name]
    params = params_of(config)
    logits, _, _ = jitted_apply(config)(params, TOKENS)
    for row in range(2):
        assert_close(logits[row], naive.logits(params, config, TOKENS[row]), ROUNDING)


@every_variant
def test_no_logit_depends_on_a_later_token(name):
    """Perturbs each token in turn: logits before it keep their bits, its own change."""
    config = MODELS[name]
    params, tokens = params_of(config), TOKENS[:1]
    # One compiled program for all: equal inputs give equal bits.
    run = lambda row: np.asarray(jitted_apply(config)(params, row)[0][0])
    logits = run(tokens)
    for t in range(29):
        changed = run(tokens.at[0, t].set((tokens[0, t] + 1) % config.vocab_size))
        np.testing.assert_array_equal(changed[:t], logits[:t])
        assert np.abs(changed[t] - logits[t]).max() > 1e-2


@every_variant
def test_no_gradient_flows_from_a_logit_to_a_later_token(name):
    """By gradients, which see influences too small to move a float32 logit."""
    config = MODELS[name]
    params = params_of(config)

    def logit_sums(table_btd):
        # One embedding row per position, so that the gradient tells positions apart.
        own = params | {"embed": {"embedding": table_btd[0]}, "lm_head": {"kernel": head}}
        untied = dataclasses.replace(config, tie_embeddings=False)
        return build.apply(own, untied, jnp.arange(29)[None])[0][0].sum(-1)

    head = build.head_weight(params, config)
    table = params["embed"]["embedding"][TOKENS[:1]]
    jacobian = jax.jit(jax.jacrev(logit_sums))(table)[:, 0]  # (t of logit, t of input, d)
    size = np.asarray(jnp.abs(jacobian).max(-1))
    assert (np.triu(size, k=1) == 0).all()
    assert (np.diag(size) > 0).all()


LENGTHS = (7, 1, 2, 11, 8)


@every_variant
def test_packed_documents_equal_separate_ones(name):
    """Values and parameter gradients, at ragged lengths that leave blocks incomplete."""
    config = MODELS[name]
    params = params_of(config)
    segments = jnp.asarray(np.repeat(np.arange(5), LENGTHS))[None]
    direction = jax.random.normal(jax.random.key(3), (1, 29, config.vocab_size))

    def objective(params, tokens, segments, direction):
        logits, _, _ = build.apply(params, config, tokens, segment_ids_bt=segments)
        return (logits * direction).sum(), logits

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    tokens = TOKENS[:1]
    (_, packed), packed_gradient = run(params, tokens, segments, direction)
    separate, gradient = [], None
    for document in range(5):
        # Each document alone, at the front of a row whose rest weighs nothing.
        start, length = sum(LENGTHS[:document]), LENGTHS[document]
        alone = jnp.roll(tokens, -start, axis=1)
        weighed = jnp.roll(direction, -start, axis=1).at[:, length:].set(0)
        (_, logits), part = run(params, alone, jnp.zeros_like(segments), weighed)
        separate.append(logits[:, :length])
        gradient = part if gradient is None else jax.tree.map(jnp.add, gradient, part)
    assert_close(packed, jnp.concatenate(separate, axis=1), ROUNDING)
    # Gradients sum 29 positions × 64 logits with signs: rounding relative to the largest entry.
    assert_close(packed_gradient, gradient, 2e-4)


@every_variant
def test_prefill_and_decoding_equal_the_whole_forward(name):
    """Past the window's end and at every residue of the pooling scales."""
    config = MODELS[name]
    params = params_of(config)
    whole, _, whole_cache = jitted_apply(config)(params, TOKENS)
    step = jax.jit(functools.partial(build.decode_step, config=config))
    for prompt in (1, 6) if name == "hybrid" else (6,):
        prefill = jax.jit(functools.partial(build.prefill, config=config))
        last, cache = prefill(
            params, tokens_bt=TOKENS[:, :prompt], cache=build.init_cache(config, 2)
        )
        rows = [last]
        for t in range(prompt, 29):
            logits, cache = step(params, token_b=TOKENS[:, t], cache=cache)
            rows.append(logits)
        assert_close(jnp.stack(rows, axis=1), whole[:, prompt - 1 :], ROUNDING)
        assert_close(cache, whole_cache, ROUNDING)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in MODELS),
        *((name, "bfloat16") for name in ("mamba", "hybrid", "plan A,M,H,M, signed")),
    ],
)
def test_prepared_parameters_decode_the_same(name, dtype):
    """Layers apart and factors cast beforehand: the same products of the same numbers."""
    config = dataclasses.replace(MODELS[name], dtype=dtype)
    params = params_of(config)
    prepared = build.prepare_for_decoding(params, config)
    step = jax.jit(functools.partial(build.decode_step, config=config))
    prefill = jax.jit(build.prefill, static_argnums=1)
    _, cache = prefill(params, config, TOKENS[:, :6], build.init_cache(config, 2))
    apart = build.unstack_cache(cache, config)
    for t in range(6, 29):
        logits, cache = step(params, token_b=TOKENS[:, t], cache=cache)
        prepared_logits, apart = step(prepared, token_b=TOKENS[:, t], cache=apart)
        # Fused differently: float32 rounding; in bfloat16 an intermediate may round to its
        # neighbour, 2^-8 away, and the states carry that on.
        assert_close(prepared_logits, logits, ROUNDING if dtype == "float32" else 0.05)
    assert_close(
        apart["layers"],
        build.unstack_cache(cache, config)["layers"],
        ROUNDING if dtype == "float32" else 0.05,
    )


def test_preparing_casts_factors_and_nothing_else():
    config = dataclasses.replace(HYBRID, dtype="bfloat16")
    prepared = build.prepare_for_decoding(params_of(config), config)
    low = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(prepared)
        if leaf.dtype == jnp.bfloat16
    }
    factors = [f"mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    factors += ["recursion.up", "recursion.down", "attention.qkv", "attention.o_proj"]
    factors += ["fusion.proj"]
    expected = {f"layers.{layer}.{name}.kernel" for layer in (0, 1) for name in factors}
    assert low == expected | {"lm_head.kernel"}


def test_a_document_that_starts_while_decoding_sees_nothing_before_it():
    """The rings still hold the old document's blocks."""
    params = params_of(HYBRID)
    _, _, cache = jitted_apply(HYBRID)(params, TOKENS[:, :13])
    alone = build.init_cache(HYBRID, 2)
    for t in range(13, 29):
        segment = jnp.ones((2, 1), jnp.int32)
        token = TOKENS[:, t : t + 1]
        logits, _, cache = jitted_apply(HYBRID)(params, token, segment, cache)
        expected, _, alone = jitted_apply(HYBRID)(params, token, segment, alone)
        assert_close(logits, expected, ROUNDING)


@pytest.mark.parametrize(
    "name", ["mamba", "hybrid", "hybrid, attention after recursion", GLOBAL_LOOP]
)
def test_pieces_of_a_row_equal_the_row(name):
    """A forward cut anywhere (ragged pieces, documents crossing cuts): values and gradients.

    This is what training over several windows with carried state relies on.
    """
    config = MODELS[name]
    params = params_of(config)
    segments = jnp.asarray([np.repeat([0, 1, 2], [3, 17, 9]), np.repeat([5, 6, 7], [12, 2, 15])])
    direction = jax.random.normal(jax.random.key(4), (2, 29, config.vocab_size))
    cuts = (0, 2, 13, 29)  # the first piece is shorter than the conv and than a block of 4

    def whole(params):
        logits, _, cache = build.apply(params, config, TOKENS, segment_ids_bt=segments)
        return (logits * direction).sum(), (logits, cache)

    def pieces(params):
        cache, rows = build.init_cache(config, 2), []
        for start, end in itertools.pairwise(cuts):
            logits, _, cache = build.apply(
                params,
                config,
                TOKENS[:, start:end],
                segment_ids_bt=segments[:, start:end],
                initial_cache=cache,
            )
            rows.append(logits)
        logits = jnp.concatenate(rows, axis=1)
        return (logits * direction).sum(), (logits, cache)

    run = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))(params)
    (_, (logits, cache)), gradient = run(pieces)
    (_, (true_logits, true_cache)), true_gradient = run(whole)
    assert_close(logits, true_logits, ROUNDING)
    assert_close(gradient, true_gradient, 2e-4)
    assert_close(cache, true_cache, ROUNDING)


@both_families
def test_a_left_padded_row_equals_the_row_alone(config):
    """Logits and every later step, padding being a document of its own."""
    params = params_of(config)
    apply = jitted_apply(config)
    row = TOKENS[:1, :11]
    single, _, single_cache = apply(params, row)
    padded = jnp.concatenate([jnp.full((1, 18), 3), row], axis=1)
    segments = jnp.asarray(np.repeat([0, 1], [18, 11]))[None]
    logits, _, cache = apply(params, padded, segments)
    assert_close(logits[:, 18:], single, ROUNDING)
    step = jax.jit(functools.partial(build.decode_step, config=config))
    for t in range(11, 20):
        token = TOKENS[:1, t]
        expected, single_cache = step(params, token_b=token, cache=single_cache)
        logits, cache = step(params, token_b=token, cache=cache)
        assert_close(logits, expected, ROUNDING)


@pytest.mark.parametrize("name", ["mamba", "hybrid", "plan A,M,H,M, signed"])
def test_rematerialisation_changes_nothing(name):
    config = MODELS[name]
    params = params_of(config)

    def gradient(remat):
        own = dataclasses.replace(config, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(build.apply(p, own, TOKENS)[0]).mean()))(
            params
        )

    none = gradient("none")
    for remat in ("dots", "full"):
        # The same operations, fused differently: rounding only.
        assert_close(gradient(remat), none, 1e-5)


def count_saveable(jaxpr):
    """How many results of a scan's forward a program marks as worth saving, at any depth."""
    own = [e for e in jaxpr.eqns if e.primitive.name == "name" and e.params["name"] == SAVEABLE]
    inner = [sub for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)]
    return len(own) + sum(map(count_saveable, inner))


@pytest.mark.parametrize("scan", ["sequential", "chunked"])
def test_the_policy_dots_does_not_run_the_scan_forward_again(scan):
    params = params_of(MAMBA)

    def in_backward(remat):
        config = dataclasses.replace(MAMBA, remat=remat, scan=scan)
        loss = lambda params: build.apply(params, config, TOKENS)[0].sum()
        program = jax.make_jaxpr(jax.grad(loss))(params)
        layers_backward = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"][-1]
        return count_saveable(layers_backward.params["jaxpr"].jaxpr)

    assert in_backward("full") > 0  # otherwise the check below would be vacuous
    assert in_backward("dots") == 0


def test_all_parts_off_is_mamba():
    off = dataclasses.replace(HYBRID, recursion_depth=0, attention_scales=(), fusion="sum")
    params = params_of(MAMBA)
    np.testing.assert_array_equal(
        jitted_apply(off)(params, TOKENS)[0], jitted_apply(MAMBA)(params, TOKENS)[0]
    )


@pytest.mark.parametrize(("config", "plan"), [(MAMBA, "M*2"), (HYBRID, "H,H")], ids="MH")
def test_a_uniform_plan_is_the_familys_own_model(config, plan):
    """Equal parameters, and the same program: so also equal results."""
    planned = dataclasses.replace(config, plan=plan)
    ours, truth = (build.init(c, jax.random.key(0)) for c in (planned, config))
    jax.tree.map(np.testing.assert_array_equal, ours, truth)
    programs = [
        str(jax.make_jaxpr(lambda p, c=c: build.apply(p, c, TOKENS))(truth))
        for c in (planned, config)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("plan", PLANS)
def test_a_mixed_plan_has_a_stack_per_kind_and_a_cache_where_it_is_needed(plan):
    config, kinds = PLANS[plan], naive.expand(plan)
    params = build.abstract_params(config)["layers"]
    cache = jax.eval_shape(lambda: build.init_cache(config, 1))["layers"]
    if len(set(kinds)) == 1:
        params, cache = {kinds[0]: params}, {kinds[0]: cache}
    parts = {"M": {"mixer", "norm"}}
    parts["A"] = parts["M"] | {"attention"}
    parts["H"] = parts["A"] | {"recursion", "fusion"}
    assert {kind: set(stack) for kind, stack in params.items()} == {k: parts[k] for k in {*kinds}}
    for kind in set(kinds):
        for leaf in jax.tree.leaves((params[kind], cache[kind])):
            assert leaf.shape[0] == kinds.count(kind)
        assert any("keys" in name for name in cache[kind]) == (kind != "M")


def test_what_is_reported_is_in_the_order_of_the_plan():
    config = dataclasses.replace(HYBRID, plan="A,(M,H)*2,A", n_layers=6)
    params, kinds = params_of(config), config.kinds
    # Each layer shows which it is, by its own A and its own gates.
    for kind, stack in params["layers"].items():
        numbers = np.array([i for i, other in enumerate(kinds) if other == kind], np.float32)
        stack["mixer"]["A_log"] = jnp.zeros_like(stack["mixer"]["A_log"]) + numbers[:, None, None]
        if kind == "H":
            gate = stack["recursion"]["gate"]
            gate["kernel"] = jnp.zeros_like(gate["kernel"])
            gate["bias"] = jnp.zeros_like(gate["bias"]) + numbers[:, None]
    observe = lambda params: build.forward(params, config, TOKENS, observing=True)[1]
    aux = jax.jit(observe)(params)
    assert config.gated_layers == (2, 4)
    np.testing.assert_allclose(aux["depth_mean"], 2 / (1 + np.exp([-2.0, -4.0])), rtol=1e-5)
    np.testing.assert_allclose(aux["A_min"], -np.exp(np.arange(6.0)), rtol=1e-5)


def test_a_program_does_not_grow_with_the_repetitions_of_its_plan():
    def equations(jaxpr):
        inner = [sub for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)]
        return len(jaxpr.eqns) + sum(map(equations, inner))

    def size(times):
        plan = f"A,(M,M,H)*{times}"
        config = dataclasses.replace(HYBRID, plan=plan, n_layers=1 + 3 * times)
        loss = lambda params: build.apply(params, config, TOKENS)[0].sum()
        program = jax.make_jaxpr(jax.grad(loss))(build.abstract_params(config))
        return equations(program.jaxpr)

    assert size(2) == size(8)


@pytest.mark.parametrize(
    "options",
    [{"gate": "channel", "shared_gate": True}, {"shared_gate": True}, {"pass_embedding": True}],
    ids=str,
)
def test_options_of_the_recursion_start_as_the_hybrid_without_them(options):
    """With all other weights away from their start, so that the steps do change the stream."""
    base = dataclasses.replace(HYBRID, n_layers=1, attention_scales=(2,), gate_bias=-0.7)
    config = dataclasses.replace(base, **options)
    layers = params_of(base)["layers"]

    def logits(of):
        made = build.init(of, jax.random.key(0))
        shared = {name: layers["recursion"][name] for name in ("norm", "up", "down")}
        recursion = made["layers"]["recursion"] | shared
        return jitted_apply(of)(made | {"layers": layers | {"recursion": recursion}}, TOKENS)[0]

    assert_close(logits(config), logits(base), 1e-6)


def test_a_shared_gate_runs_more_steps_than_it_was_trained_with():
    config = VARIANTS[SHARED]
    deeper = dataclasses.replace(config, recursion_depth=4)
    assert build.abstract_params(deeper) == build.abstract_params(config)
    logits, aux, _ = jitted_apply(deeper)(params_of(config), TOKENS[:1])
    assert aux["gate_mean"].shape == (2, 4)
    assert_close(logits[0], naive.logits(params_of(config), deeper, TOKENS[0]), ROUNDING)


def test_the_zero_fusion_starts_as_the_sum():
    config = dataclasses.replace(HYBRID, fusion="residual_zero")
    params = build.init(config, jax.random.key(0))
    stripped = params | {"layers": {k: v for k, v in params["layers"].items() if k != "fusion"}}
    without = dataclasses.replace(config, fusion="sum")
    ours, truth = (
        jitted_apply(config)(params, TOKENS)[0],
        jitted_apply(without)(stripped, TOKENS)[0],
    )
    assert_close(ours, truth, 1e-6)


@pytest.mark.parametrize(("std", "expected"), [(0.02, 0.02), (0.3, 0.3), (0.0, 128**-0.5)])
def test_the_initial_embedding_has_its_standard_deviation(std, expected):
    config = ModelConfig(d_model=128, n_layers=1, vocab_size=1024, embedding_std=std)
    table = jax.jit(lambda key: build.init(config, key)["embed"])(jax.random.key(0))["embedding"]
    assert float(table.std()) == pytest.approx(expected, rel=0.02)  # of 131,072 numbers


def test_at_the_start_the_recursion_adds_nothing():
    """R ends in zeros, so that without attention a new hybrid's recursion leaves h as it is."""
    config = dataclasses.replace(HYBRID, attention_scales=(), fusion="sum")
    params = build.init(config, jax.random.key(0))
    without = dataclasses.replace(config, recursion_depth=0)
    stripped = params | {"layers": {k: v for k, v in params["layers"].items() if k != "recursion"}}
    np.testing.assert_array_equal(
        jitted_apply(config)(params, TOKENS)[0], jitted_apply(without)(stripped, TOKENS)[0]
    )


def test_tokens_take_the_steps_whose_gates_exceed_the_threshold():
    """Token by token, where the means that a layer reports are the token's own."""
    params, found = params_of(SKIPPING), set()
    step = jax.jit(functools.partial(build.forward, config=SKIPPING))
    cache = build.init_cache(SKIPPING, 1)
    for t in range(TOKENS.shape[1]):
        _, aux, cache = step(params, tokens_bt=TOKENS[:1, t : t + 1], initial_cache=cache)
        for gates_k in np.asarray(aux["gate_mean"]):
            assert ((gates_k > 0.5) | (gates_k == 0)).all()
            found.add(tuple(gates_k > 0))
    # Of the eight subsets of three steps most occur, and one with a gap is among them.
    assert len(found) > 4 and (True, False, True) in found


def test_a_step_that_no_token_needs_is_not_computed():
    """NaN in everything that a step computes shows whether it ran; gates of e^-30 disable it."""
    config = dataclasses.replace(HYBRID, gate_skip_threshold=0.01)
    params = params_of(config)
    gate = params["layers"]["recursion"]["gate"]
    gate["kernel"] = jnp.zeros_like(gate["kernel"])
    gate["bias"] = jnp.full_like(gate["bias"], -30.0)
    decode = jax.jit(build.decode_step, static_argnames="config")
    exact = jitted_apply(HYBRID)(params, TOKENS)[0]
    # s changes by 1e-13 of itself: below float32's last bit.
    assert_close(jitted_apply(config)(params, TOKENS)[0], exact, 1e-6)
    kernel = params["layers"]["recursion"]["down"]["kernel"]
    params["layers"]["recursion"]["down"]["kernel"] = jnp.full_like(kernel, jnp.nan)
    logits, _, cache = jitted_apply(config)(params, TOKENS)
    assert_close(logits, exact, 1e-6)
    assert jnp.isfinite(decode(params, config, TOKENS[:, 0], cache)[0]).all()
    assert jnp.isnan(jitted_apply(HYBRID)(params, TOKENS)[0]).all()
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    training_nll_bt, _, _ = token_nll(params, RunConfig(model=config), mesh, TOKENS, eot_id=0)
    assert jnp.isnan(training_nll_bt).all()  # training never skips
    gate["bias"] = gate["bias"].at[0, 0].set(0.0)  # an open step is not skipped
    assert jnp.isnan(jitted_apply(config)(params, TOKENS)[0]).all()
    # It is skipped where no row's result is used.
    assert jnp.isfinite(decode(params, config, TOKENS[:, 0], cache, jnp.zeros(2, bool))[0]).all()


def test_rows_that_are_not_used_change_nothing_for_the_others():
    params = params_of(SKIPPING)
    decode = jax.jit(build.decode_step, static_argnames="config")
    alone = both = build.init_cache(SKIPPING, 2)
    for t in range(6):
        logits_alone, alone = decode(
            params, SKIPPING, TOKENS[:, t], alone, jnp.array([True, False])
        )
        logits_both, both = decode(params, SKIPPING, TOKENS[:, t], both)
        assert_close(logits_alone[0], logits_both[0], 1e-6)
    of_row = lambda cache, row: jax.tree.map(lambda leaf: leaf[:, row], cache["layers"])
    assert_close(of_row(alone, 0), of_row(both, 0), 1e-6)
    assert jnp.abs(logits_alone[1] - logits_both[1]).max() > 1e-3  # its steps were not computed


@pytest.mark.parametrize("name", ["hybrid", SHARED, BY_CHANNEL])
def test_gradients_reach_every_parameter(name):
    config = dataclasses.replace(VARIANTS[name], attention_scales=HYBRID.attention_scales)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(build.apply(p, config, TOKENS)[0]).mean()))(
        params_of(config)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        per_layer = leaf if "layers" in str(path[0]) else leaf[None]
        assert (jnp.abs(per_layer).reshape(len(per_layer), -1).max(-1) > 0).all(), path
    recursion = gradient["layers"]["recursion"]
    of_steps = {**recursion["gate"], "embedding": recursion.get("pass_embedding", jnp.ones((2, 2)))}
    for leaf in of_steps.values():
        assert (jnp.abs(leaf).reshape(*leaf.shape[:2], -1).max(-1) > 0).all(), "a step learns none"


def test_gates_are_reported_correctly():
    closed = params_of(HYBRID)
    gate = closed["layers"]["recursion"]["gate"]
    gate["kernel"] = jnp.zeros_like(gate["kernel"])
    gate["bias"] = jnp.asarray([[-30.0, 0.0], [30.0, -1.0]])
    _, aux, _ = jitted_apply(HYBRID)(closed, TOKENS)
    open_quarter = 1 / (1 + np.e)
    np.testing.assert_allclose(aux["gate_mean"], [[0, 0.5], [1, open_quarter]], atol=1e-6)
    np.testing.assert_allclose(aux["depth_mean"], [0.5, 1 + open_quarter], atol=1e-6)
    histogram = np.zeros((2, 2, 10))
    histogram[0, 0, 0] = histogram[0, 1, 5] = histogram[1, 0, 9] = histogram[1, 1, 2] = 1
    np.testing.assert_allclose(aux["gate_histogram"], histogram, atol=1e-6)

    # By channel: the means over channels, which may be outside the histogram.
    config, mean_lk = VARIANTS[BY_CHANNEL], np.array([[-0.3, 0.55], [1.2, 0.25]])
    params = params_of(config)
    spread_d = np.linspace(-1, 1, 32)
    scale_lkd = jnp.asarray(mean_lk[..., None] + spread_d, jnp.float32)
    params["layers"]["recursion"]["gate"]["scale"] = scale_lkd
    _, aux, _ = jitted_apply(config)(params, TOKENS)
    np.testing.assert_allclose(aux["gate_mean"], mean_lk, atol=1e-6)
    np.testing.assert_allclose(aux["depth_mean"], mean_lk.sum(1), atol=1e-6)
    np.testing.assert_array_equal(aux["gate_histogram"], histogram)


@both_families
def test_bfloat16_stays_near_float32_and_keeps_float32_state(config):
    params = params_of(config)
    low = dataclasses.replace(config, dtype="bfloat16")
    logits, _, cache = jitted_apply(low)(params, TOKENS)
    truth, _, _ = jitted_apply(config)(params, TOKENS)
    assert logits.dtype == jnp.float32
    assert cache["layers"]["ssm_state"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few dozen of them on a path.
    assert float(jnp.abs(logits - truth).mean() / jnp.abs(truth).mean()) < 0.05


@both_families
def test_dropout_needs_a_key_and_follows_it(config):
    dropped = dataclasses.replace(config, dropout=0.5)
    params = params_of(config)
    run = jax.jit(lambda key: build.forward(params, dropped, TOKENS, dropout_key=key)[0])
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 0.1
    np.testing.assert_array_equal(
        jitted_apply(dropped)(params, TOKENS)[0], jitted_apply(config)(params, TOKENS)[0]
    )


def test_bfloat16_rounds_neither_delta_nor_a_nor_the_residual_stream(monkeypatch):
    """Only matmuls: a value that bfloat16 cannot hold shows that nothing rounded it on the way."""
    seen = {}

    def spy(x, dt, A, *rest, **options):
        seen.update(dt=dt, A=A)
        return selective_scan(x, dt, A, *rest, **options)

    monkeypatch.setattr("mamba_jax.modules.mamba.selective_scan", spy)
    low = dataclasses.replace(HYBRID, dtype="bfloat16", n_layers=1, fusion="sum")
    params = params_of(low)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    build._bind_block(low, jnp.dtype("bfloat16"), layer).mixer(
        jax.random.normal(jax.random.key(0), (1, 8, 32), jnp.bfloat16),
        layouts.documents((1, 8), None, None, None),
        None,
    )
    for name in ("dt", "A"):
        assert seen[name].dtype == jnp.float32
        assert (seen[name] != seen[name].astype(jnp.bfloat16)).any(), name

    # With every output matrix at zero a layer is the identity on the residual stream.
    silent = jax.tree.map(lambda leaf: leaf, params)
    for module, matrix in (("mixer", "out_proj"), ("recursion", "down"), ("attention", "o_proj")):
        kernel = silent["layers"][module][matrix]["kernel"]
        silent["layers"][module][matrix]["kernel"] = jnp.zeros_like(kernel)
    silent["embed"]["embedding"] = jnp.full((64, 32), 1 + 2.0**-12).at[:, 0].set(3 + 2.0**-12)
    x, _, _ = build.forward(silent, low, TOKENS)
    expected = rms_normalise(silent["embed"]["embedding"][TOKENS], low.norm_eps)
    np.testing.assert_array_equal(x, expected * silent["norm_f"]["scale"])
