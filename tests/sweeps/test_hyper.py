"""Sweep files mean what users of Flax projects expect."""

import itertools
import math
import pathlib

import pytest

from mamba_jax.errors import UserError
from mamba_jax.sweeps.hyper import Hyper, Interval, load

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def h():
    return Hyper()


def first(sweep, count):
    return list(itertools.islice(sweep, count))


def test_sweep_gives_each_value_and_drops_the_config_in_front(h):
    sweep = h.sweep("config.training.learning_rate", [1e-3, 1e-4])
    assert list(sweep) == [{"training.learning_rate": 1e-3}, {"training.learning_rate": 1e-4}]
    assert list(sweep) == list(sweep) and sweep.length == 2
    assert list(h.sweep("seed", h.discrete(range(3)))) == [{"seed": n} for n in range(3)]
    assert list(h.sweep("x", h.categorical(["a", "b"]))) == [{"x": "a"}, {"x": "b"}]


def test_product_is_every_combination_and_the_last_varies_fastest(h):
    sweep = h.product([h.sweep("a", [1, 2]), h.sweep("b", "xy"), h.fixed("c", 0)])
    expected = [{"a": a, "b": b, "c": 0} for a in (1, 2) for b in "xy"]
    assert list(sweep) == expected and sweep.length == 4
    assert list(h.product([])) == [{}]


def test_a_name_of_a_product_is_prefixed(h):
    assert list(h.product([h.sweep("trial", range(2))], name="config")) == [
        {"trial": 0},
        {"trial": 1},
    ]
    inner = h.product([h.sweep("dropout", [0.1])], name="config.model")
    assert list(inner) == [{"model.dropout": 0.1}]


def test_zip_advances_together_and_ends_with_the_shortest(h):
    sweep = h.zipit([h.sweep("a", [1, 2, 3]), h.sweep("b", [4, 5])])
    assert list(sweep) == [{"a": 1, "b": 4}, {"a": 2, "b": 5}] and sweep.length == 2
    assert list(h.zipit([h.sweep("a", [1, 2, 3])], length=2)) == [{"a": 1}, {"a": 2}]
    # As Flax projects write it: fixed values as long as those that they are zipped with.
    both = h.zipit([h.sweep("a", [1, 2]), h.fixed("b", 0, length=2)])
    assert list(both) == [{"a": 1, "b": 0}, {"a": 2, "b": 0}]


def test_chain_is_one_after_the_other(h):
    sweep = h.chainit([h.sweep("a", [1, 2]), h.zipit([h.sweep("a", [3]), h.sweep("b", [4])])])
    assert list(sweep) == [{"a": 1}, {"a": 2}, {"a": 3, "b": 4}] and sweep.length == 3


def test_samples_are_the_same_each_time_and_differ_by_field_and_seed(h):
    drawn = first(h.uniform("x", h.interval(2, 3)), 5)
    assert drawn == first(h.uniform("x", h.interval(2, 3)), 5)
    other = [row["y"] for row in first(h.uniform("y", h.interval(2, 3)), 5)]
    assert [row["x"] for row in drawn] != other
    assert drawn != first(Hyper(seed=1).uniform("x", Interval(2, 3)), 5)


def test_uniform_and_loguniform_have_their_distributions(h):
    n = 4000
    flat = sorted(row["x"] for row in first(h.uniform("x", h.interval(-1.0, 3.0)), n))
    logs = sorted(
        math.log10(row["x"]) for row in first(h.loguniform("x", h.interval(1e-5, 1e-1)), n)
    )
    # The largest distance between the empirical and the true distribution, at the 0.1% level.
    bound = 1.95 / math.sqrt(n)
    for values, low, high in ((flat, -1, 3), (logs, -5, -1)):
        gaps = [abs((v - low) / (high - low) - i / n) for i, v in enumerate(values)]
        assert max(gaps) < bound
    picked = {row["x"] for row in first(h.uniform("x", h.discrete([1, 5])), 40)}
    assert picked == {1, 5}


def test_a_zip_of_samples_has_its_length_and_combines_with_lists(h):
    drawn = h.zipit([h.uniform("x", h.interval(0, 1)), h.uniform("y", h.interval(0, 1))], length=3)
    assert drawn.length == 3 and len({tuple(row.values()) for row in drawn}) == 3
    both = list(h.product([h.sweep("a", [1, 2]), drawn]))
    assert len(both) == 6 and [r["x"] for r in both[:3]] == [r["x"] for r in both[3:]]


MISTAKES = {
    "no values": (lambda h: h.sweep("a", []), "no values"),
    "twice": (lambda h: list(h.product([h.sweep("a", [1]), h.sweep("a", [2])])), "sets a twice"),
    "upside down": (lambda h: h.interval(2, 1), "h.interval(2, 1)"),
    "log of zero": (lambda h: h.loguniform("a", h.interval(0, 1)), "above 0"),
    "log of a list": (lambda h: h.loguniform("a", [1, 2]), "needs an h.interval"),
    "endless product": (
        lambda h: list(h.product([h.sweep("a", [1]), h.uniform("b", h.interval(0, 1))])),
        "h.zipit([…], length=N)",
    ),
    "endless chain": (
        lambda h: list(h.chainit([h.uniform("b", h.interval(0, 1)), h.sweep("a", [1])])),
        "are never reached",
    ),
    "empty zip": (lambda h: h.zipit([]), "nothing to zip"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_reported(h, case):
    make, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        make(h)
    assert message in str(error.value)


# --- searches -------------------------------------------------------------------------------------


class Asked:
    """Answers with the middle, or with given values, and records the questions."""

    def __init__(self, **answers):
        self.answers = answers
        self.questions = {}

    def real(self, name, low, high, *, log):
        assert self.questions.setdefault(name, ("real", low, high, log))
        return self.answers.get(name, math.sqrt(low * high) if log else (low + high) / 2)

    def choice(self, name, count):
        assert self.questions.setdefault(name, ("choice", count)) == ("choice", count)
        return self.answers.get(name, 0)


def test_a_search_queries_only_what_varies(h):
    sweep = h.product(
        [
            h.sweep("a", ["x", "y", "z"]),
            h.loguniform("b", h.interval(1e-4, 1e-2)),
            h.zipit([h.sweep("c", [1, 2]), h.sweep("d", [3, 4])]),
            h.fixed("e", 7),
            h.uniform("f", h.discrete([5, 6])),
        ]
    )
    asked = Asked(a=2, f=1, **{"c + d": 1})
    assert sweep.suggest(asked) == {
        "a": "z",
        "b": pytest.approx(1e-3),
        "c": 2,
        "d": 4,
        "e": 7,
        "f": 6,
    }
    assert asked.questions == {
        "a": ("choice", 3),
        "b": ("real", 1e-4, 1e-2, True),
        "c + d": ("choice", 2),
        "f": ("choice", 2),
    }


def test_a_search_queries_only_the_chosen_branch_of_a_chain(h):
    sweep = h.chainit(
        [h.uniform("a", h.interval(0, 1)), h.zipit([h.sweep("a", [5, 6]), h.fixed("b", 1, 2)])]
    )
    asked = Asked(chain=1, **{"a + b": 1})
    assert sweep.suggest(asked) == {"a": 6, "b": 1}
    assert set(asked.questions) == {"chain", "a (2)", "a + b"} - {"a (2)"}


def test_two_parameters_never_share_a_name(h):
    chain = lambda values: h.chainit([h.sweep("a", values), h.sweep("a", values + values)])
    sweep = h.chainit([chain([1, 2]), chain([3, 4, 5])])
    names = []
    for outer, inner in itertools.product((0, 1), (0, 1)):
        asked = Asked(chain=inner, **{"chain (2)": inner, "chain (3)": outer})
        sweep.suggest(asked)
        names += [(name, kind) for name, kind in asked.questions.items()]
    assert len({name for name, _ in names}) == len(set(names))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/sweeps").glob("*.py")), ids=lambda p: p.stem
)
def test_the_included_sweep_files(file):
    sweep = load(str(file), Hyper())
    assert sweep.length and len(list(sweep)) == sweep.length


def test_the_ensemble_of_the_guide():
    assert [row["seed"] for row in load(str(ROOT / "configs/sweeps/seeds.py"), Hyper())] == [
        42, 123, 789
    ]  # fmt: skip


def test_a_file_can_define_dataclasses(tmp_path):
    """With annotations as text they look for their module among the imported ones."""
    (tmp_path / "rates.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n\n"
        "@dataclasses.dataclass\nclass Rate:\n    value: float\n\n"
        "def get_hyper(h): return h.sweep('a', [Rate(0.5).value])\n"
    )
    assert list(load(str(tmp_path / "rates.py"), Hyper())) == [{"a": 0.5}]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rates.json").write_text("{}")
    with pytest.raises(UserError, match=r"rates.json is not a .py file with a get_hyper\(h\)"):
        load(str(tmp_path / "rates.json"), Hyper())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, 'does not exist; did you mean "near.py"?'),
        ("def get_hyper(h: pass", "failed: SyntaxError"),
        ("x = 1", "has no attribute 'get_hyper'; it must define get_hyper(h)"),
        ("def get_hyper(h): return [1]", "must return the result of h.sweep"),
        ("def get_hyper(h): return h.sweep('a', [])", "has no values"),
    ],
)
def test_broken_files_are_reported(tmp_path, text, message):
    (tmp_path / "near.py").write_text("")
    file = tmp_path / ("neer.py" if text is None else "file.py")
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        load(str(file), Hyper())
    assert message in str(error.value) and str(file) in str(error.value)
