"""The language of plans against Python's own arithmetic of lists, and the words for its faults."""

import dataclasses
import itertools
import random

import pytest

from mamba_jax.config import ModelConfig, RunConfig, checks, freeze, preset_config
from mamba_jax.config.plan import LayerRun, Loop, parse, schedule, text
from mamba_jax.errors import UserError
from tests.support.naive import expand

PLANS = ["M*10", "(M,M,H,M,M)*4", "A,M,H,M,A", "((M,A)*2,H)*3", "( M ,H * 2 )*2,\tA", "M*02"]


def random_plan(rng, depth=0):
    def item():
        plain = depth > 2 or rng.random() < 0.6
        body = rng.choice("MAH") if plain else f"({random_plan(rng, depth + 1)})"
        return body + (f"*{rng.randint(1, 4)}" if rng.random() < 0.5 else "")

    return ",".join(item() for _ in range(rng.randint(1, 4)))


@pytest.fixture(scope="module")
def plans():
    rng = random.Random(0)
    return [*PLANS[:-1], *(random_plan(rng) for _ in range(300))]


def test_a_plan_is_what_pythons_lists_are(plans):
    for plan in plans:
        assert list(parse(plan)) == expand(plan), plan
    assert parse("M*02") == ("M", "M") and parse("") == parse(" ") == ()


def test_a_schedule_and_the_one_spelling_mean_the_same_plan(plans):
    def flat(nodes):
        for node in nodes:
            if isinstance(node, LayerRun):
                yield from node.kind * node.length
            else:
                yield from tuple(flat(node.body)) * node.times

    for plan in plans:
        kinds = parse(plan)
        assert tuple(flat(schedule(kinds))) == kinds, plan
        assert parse(text(kinds)) == kinds
        assert sum(isinstance(node, Loop) for node in schedule(kinds)) <= 1


def test_no_loop_over_layers_needs_fewer_runs_than_the_schedule():
    """Every plan of up to seven layers, against a search over all loops."""
    runs = lambda kinds: len(list(itertools.groupby(kinds)))

    def fewest(kinds):
        found = [runs(kinds)]
        for start, period in itertools.product(range(len(kinds)), range(1, len(kinds) // 2 + 1)):
            body, stop = kinds[start : start + period], start + period
            while body and kinds[stop : stop + period] == body:
                stop += period
                found.append(runs(kinds[:start]) + runs(body) + runs(kinds[stop:]))
        return min(found)

    for n in range(1, 8):
        for kinds in itertools.product("MAH", repeat=n):
            nodes = schedule(kinds)
            made = sum(len(node.body) if isinstance(node, Loop) else 1 for node in nodes)
            assert made == fewest(kinds), kinds
            if any(isinstance(node, Loop) for node in nodes):
                assert made < runs(kinds), kinds


@pytest.mark.parametrize(
    ("plan", "spelling"),
    [
        ("M,M,M", "M*3"),
        ("(M,M,H)*2", "(M*2,H)*2"),
        ("M,M,H,M*2,(H)", "(M*2,H)*2"),
        ("(M,H),(M,H,M,H)", "(M,H)*3"),
        ("A,(M,M,H)*4,A", "A,(M*2,H)*4,A"),
        ("A,M,H", "A,M,H"),
        ("M,H,M", "M,H,M"),
    ],
)
def test_repetition_is_found(plan, spelling):
    assert text(parse(plan)) == spelling


FAULTS = {
    "M,": "position 2: no layer after the last comma",
    ",M": 'position 1: no layer before ","',
    "M,,A": 'position 3: no layer before ","',
    "*2": 'position 1: no layer before "*"',
    "()": 'position 2: no layer before ")"',
    "M,()*2": 'position 4: no layer before ")"',
    "M*": 'position 2: "*" needs one whole number of at least 1',
    "M*0": 'position 2: "*" needs one whole number',
    "M*-1": 'position 2: "*" needs one whole number',
    "M*1.5": 'position 4: "." is not a kind',
    "M*٣": 'position 2: "*" needs one whole number',
    "M*2*3": 'position 4: "*" needs one whole number',
    "M H": 'position 3: a comma is missing before "H"',
    "(M)(H)": 'position 4: a comma is missing before "("',
    "M)": 'position 2: the bracket ")" was never opened',
    "M,((A,H)": 'position 3: the bracket "(" is never closed',
    "(M,A)@2": "position 6: loops with shared weights (@) are not supported; repeat with *n",
    "M,h": 'position 3: "h" is not a kind of layer; write H',
    "M,\nX": 'model.plan="M, X", position 4: "X" is not a kind of layer; use M (Mamba layer), A',
    "M*1001": "position 2: more than 1,000 layers",
    "(M*500)*3": "position 8: more than 1,000 layers",
    f"M*{'9' * 5000}": "position 2: more than 1,000 layers",
}


EMBEDDED_SHARED = {"pass_embedding": True, "shared_gate": True}
SKIPPING_CHANNELS = {"gate": "channel", "gate_skip_threshold": 0.1}


@pytest.mark.parametrize("plan", FAULTS, ids=lambda plan: plan[:9])
def test_a_fault_is_one_line_with_its_position(plan):
    with pytest.raises(UserError) as error:
        parse(plan)
    assert FAULTS[plan] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"plan": "M,H"}, r'"M,H" has 2 layers, model.n_layers=12; give --config.model.n_layers=2'),
        (
            {"plan": "M,H", "n_layers": 2, "family": "mamba"},
            "has other layers than M; give --config.model.family=hybrid",
        ),
        ({"plan": "A,M", "n_layers": 2, "attention_scales": ()}, r"attention_scales=\(\); give"),
        (EMBEDDED_SHARED, "shared_gate=True rules out; set one of them to false"),
        (SKIPPING_CHANNELS, 'gate="channel" has none; set the threshold to 0'),
    ],
)
def test_a_model_of_fields_that_do_not_fit_is_refused(fields, words):
    model = ModelConfig(**({"family": "hybrid"} | fields))
    with pytest.raises(UserError, match=words):
        checks.check(RunConfig(model=model))


@pytest.mark.parametrize("fields", [EMBEDDED_SHARED, SKIPPING_CHANNELS], ids=str)
@pytest.mark.parametrize(
    "without",
    [{"family": "mamba"}, {"recursion_depth": 0}, {"plan": "A,M", "n_layers": 2}],
    ids=str,
)
def test_fields_of_the_recursion_do_not_matter_without_one(fields, without):
    checks.check(RunConfig(model=ModelConfig(**({"family": "hybrid"} | fields | without))))


@pytest.mark.parametrize(
    ("size", "plan", "kept"),
    [
        ("hybrid-small", "H*8", ""),
        ("hybrid-small", " (H, H*3)*2", ""),
        ("small", "M*6", ""),
        ("hybrid-small", "M,M,H,H,M,M,H,H", "(M*2,H*2)*2"),
        ("hybrid-small", "M*8", "M*8"),
    ],
)
def test_two_spellings_are_one_model(size, plan, kept):
    config = preset_config(size)
    plain = freeze(config).model
    config.model.plan = plan
    assert freeze(config).model == dataclasses.replace(plain, plan=kept)
