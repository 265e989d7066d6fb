"""The tasks of the evidence suite: every answer derived again from the tokens before it alone."""

import itertools
import statistics

import numpy as np
import pytest

from benchmarks.evidence import tasks
from benchmarks.evidence.tasks import LENGTH, NONE, SEPARATOR, TASKS, VOCABULARY, WORDS


def hop(before):
    """Follows the pairs, which end where the first token of a query repeats no new source."""
    hops = before[-1] - 32
    nodes = next(i for i, token in enumerate(before) if token > 32) // 2
    leads = dict(zip(before[0 : 2 * nodes : 2], before[1 : 2 * nodes : 2], strict=True))
    here = before[-2]
    for _ in range(hops):
        here = leads[here]
    return here, hops


def arrangement(things):
    """Applies each swap to a list of things, and looks the list up among all of them."""

    def solve(before):
        places = list(range(things))
        pairs = list(itertools.combinations(range(things), 2))
        for token in before:
            if token > 1:
                a, b = pairs[token - 2]
                places[a], places[b] = places[b], places[a]
        number = list(itertools.permutations(range(things))).index(tuple(places))
        return 64 + number, 1 + (len(before) - 1) * 6 // LENGTH

    return solve


def problem(solution, *, asks="="):
    """Solves the newest problem of the row; an answer's later tokens follow its first ones."""

    def solve(before):
        start = len(before) - list(reversed(before)).index(SEPARATOR)
        given = [WORDS[token - 1] for token in before[start:]]
        if not asks:
            return (1 + WORDS.index(solution(given)[0]), solution(given)[1])
        prompt, answered = given[: given.index(asks)], given[given.index(asks) + 1 :]
        answer, level = solution(prompt)
        assert answered == answer[: len(answered)]  # what the model was shown is right, too
        return 1 + WORDS.index(answer[len(answered)]), level

    return solve


def multi_hop(prompt):
    facts = prompt[: prompt.index(";")]
    leads = dict(zip(facts[0::3], facts[2::3], strict=True))
    here, hops = prompt[prompt.index(";") + 1], int("".join(prompt[prompt.index(";") + 2 :]))
    for _ in range(hops):
        here = leads[here]
    return [here], hops


def recall(given):
    pairs, key = given[: given.index(";")], given[-1]
    return dict(zip(pairs[0::2], pairs[1::2], strict=True))[key], len(pairs) // 2


def arithmetic(prompt):
    return list(str(eval("".join(prompt)))), sum(word in "+-*" for word in prompt)


def list_operations(prompt):
    functions = {
        "[MAX": max,
        "[MIN": min,
        "[MED": lambda v: int(statistics.median(v)),
        "[SM": lambda v: sum(v) % 10,
    }
    stack, depth = [[]], 0
    for word in prompt:
        if word in functions:
            stack.append([word])
            depth = max(depth, len(stack) - 1)
        elif word == "]":
            name, *values = stack.pop()
            stack[-1].append(functions[name](values))
        else:
            stack[-1].append(int(word))
    return [str(stack[0][0])], depth


def state_tracking(prompt):
    things, swaps = prompt[:5], prompt[6:]
    for swap in swaps:
        a, b = (int(place) - 1 for place in swap.split("-"))
        things[a], things[b] = things[b], things[a]
    return things, len(swaps)


SOLVERS = {
    "p_hop_3": hop,
    "p_hop_6": hop,
    "multi_hop": problem(multi_hop),
    "mqar": problem(recall, asks=""),
    "arithmetic": problem(arithmetic),
    "list_operations": problem(list_operations),
    "parity": arrangement(2),
    "s3": arrangement(3),
    "s5": problem(state_tracking),
}


def made(name, maker="make", side="train", n=40, step=1e9):
    return getattr(TASKS[name], maker)(np.random.default_rng(7), n, side, step)


CASES = [(name, "make") for name in SOLVERS]
CASES += [(name, "beyond") for name, task in TASKS.items() if task.beyond]


@pytest.mark.parametrize("name, maker", CASES)
def test_each_answer_follows_from_the_tokens_before_it(name, maker):
    rows = made(name, maker)
    assert rows.tokens.min() >= 0 and rows.tokens.max() < VOCABULARY
    asked = np.argwhere(rows.targets != NONE)
    assert len(asked) > 40
    for row, t in asked:
        before = rows.tokens[row, : t + 1].tolist()  # nothing after it: no answer can leak
        assert SOLVERS[name](before) == (rows.targets[row, t], rows.levels[row, t])
    assert ((rows.levels == NONE) == (rows.targets == NONE)).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_every_level_occurs_and_more_beyond(name):
    levels = set(np.unique(made(name, n=200).levels)) - {NONE}
    assert levels >= set(range(min(levels), 1 + 3)) or name == "mqar"
    if TASKS[name].beyond:
        beyond = set(np.unique(made(name, "beyond").levels)) - {NONE}
        assert min(beyond) > max(levels)


def test_no_loss_on_what_is_given():
    """In a problem with a text, only the tokens of its answer are targets."""
    for name in ("multi_hop", "arithmetic", "list_operations", "s5"):
        rows = made(name)
        equals = 1 + WORDS.index("=")
        for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
            after_equals = False
            for t in range(LENGTH):
                after_equals = tokens[t] == equals or (after_equals and tokens[t] != SEPARATOR)
                is_last = t + 1 == LENGTH or tokens[t + 1] == SEPARATOR
                assert (targets[t] != NONE) == (after_equals and not is_last)
                if targets[t] != NONE:
                    assert targets[t] == tokens[t + 1]


@pytest.mark.parametrize("name", ["arithmetic", "mqar", "s5"])
def test_no_problem_is_on_two_sides(name):
    def prompts(side):
        rows, found = made(name, side=side), set()
        for tokens in rows.tokens:
            words = " ".join(map(str, tokens))
            found |= {part for part in words.split(f" {SEPARATOR}") if part.strip()}
        return found

    sides = [prompts(side) for side in tasks.SIDES]
    assert all(len(side) > 20 for side in sides)
    for one, other in itertools.combinations(sides, 2):
        assert not one & other


def test_a_curriculum_adds_a_level_at_a_time_in_training_alone():
    assert made("multi_hop", step=299).levels.max() == 1
    assert made("multi_hop", step=300, n=200).levels.max() == 2
    assert made("multi_hop", step=0, side="test", n=200).levels.max() == 6


def test_text_asks_for_the_next_byte_of_files_of_one_side():
    rows = made("text", n=5)
    assert (rows.targets[:, :-1] == rows.tokens[:, 1:]).all()
    assert rows.tokens[0].astype(np.uint8).tobytes() in tasks.corpus("train").tobytes()
    sizes = {side: len(tasks.corpus(side)) for side in tasks.SIDES}
    assert sizes["train"] > 2 * (sizes["validation"] + sizes["test"])
    train = tasks.corpus("train").tobytes()
    assert tasks.corpus("test").tobytes()[:400] not in train


def test_a_stream_is_a_function_of_its_seed():
    one, same, other = (
        TASKS["arithmetic"].make(np.random.default_rng(seed), 4, "train", 0) for seed in (3, 3, 4)
    )
    assert (one.tokens == same.tokens).all() and (one.tokens != other.tokens).any()
