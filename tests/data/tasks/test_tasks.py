"""Each task's answers against an independent evaluation, and the laws of its split."""

import itertools
import re

import numpy as np
import pytest

from mamba_jax.config import DataConfig, SourceConfig, default_config, freeze
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.sources.task_rows import open_tasks
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tasks import SPLITS, TASKS, Problem, parse, problems
from mamba_jax.data.tasks.problem import split_of
from mamba_jax.errors import UserError

every_task = pytest.mark.parametrize("name", TASKS)
DIFFICULTIES = [2, 3, 7, 12]


def question(problem):
    assert problem.prompt.endswith(" =")
    return problem.prompt.removesuffix(" =")


def arithmetic(problem):
    """By Python itself."""
    text = question(problem)
    assert re.fullmatch(r"[\d+*() -]+", text)
    assert len(re.findall(r"[+*-]", text)) == problem.difficulty
    assert all(int(number) <= 20 for number in re.findall(r"\d+", text))
    return str(eval(text, {"__builtins__": {}}))


def list_operations(problem):
    """By a stack of tokens, which can also read the paper's own data."""
    stack, depth, deepest = [[]], 0, 0
    for word in question(problem).split():
        if word.startswith("["):
            stack.append([word[1:]])
            depth += 1
            deepest = max(deepest, depth)
        elif word == "]":
            (name, *values), depth = stack.pop(), depth - 1
            values.sort()
            stack[-1].append(
                {
                    "MAX": values[-1],
                    "MIN": values[0],
                    "SM": sum(values) % 10,
                    "MED": (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2,
                }[name]
            )
        else:
            stack[-1].append(int(word))
    assert depth == 0 and deepest == problem.difficulty
    return str(stack[0][0])


def multi_hop(problem):
    facts, _, start = question(problem).partition(" ; ")
    follow = dict(fact.split(">") for fact in facts.split())
    assert len(follow) == 2 * problem.difficulty == len(facts.split())
    here, hops = start.split()
    assert int(hops) == problem.difficulty
    for _ in range(int(hops)):
        here = follow[here]
    assert here not in follow
    return here


def recall(problem):
    pairs, _, requested = question(problem).partition(" ; ")
    words = pairs.split()
    known = (
        dict(itertools.batched(words, 2))
        if hasattr(itertools, "batched")
        else dict(zip(words[::2], words[1::2], strict=True))
    )
    assert len(known) == problem.difficulty and len(requested.split()) == -(
        -problem.difficulty // 2
    )
    assert len(set(requested.split())) == len(requested.split())
    return " ".join(known[key] for key in requested.split())


def state_tracking(problem):
    """By matrices: the product of transpositions."""
    start, _, swaps = question(problem).partition(" ; ")
    things, product = start.split(), np.eye(5, dtype=int)
    assert sorted(things) == list("abcde") and len(swaps.split()) == problem.difficulty
    for swap in swaps.split():
        one, other = (int(place) - 1 for place in swap.split("-"))
        assert 0 <= one < other < 5
        move = np.eye(5, dtype=int)
        move[[one, other]] = move[[other, one]]
        product = move @ product
    return " ".join(things[int(index)] for index in product @ np.arange(5))


SOLVERS = {
    solver.__name__: solver
    for solver in (arithmetic, list_operations, multi_hop, recall, state_tracking)
}


@every_task
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_answers_are_right(name, difficulty):
    found = list(problems(name, difficulty, "train", seed=1, count=200))
    for problem in found:
        answer = SOLVERS[name](problem)
        assert problem.answer == answer
        assert problem.is_solved_by(f" {answer}\nand more") and problem.is_solved_by(f"{answer} ")
    # No answer can be guessed: the commonest is far from all.
    answers = [problem.answer for problem in found]
    assert max(map(answers.count, set(answers))) < 0.4 * len(answers)


def test_arithmetic_nests_on_both_sides():
    prompts = [problem.prompt for problem in problems("arithmetic", 3, "train", 0, 200)]
    shapes = {re.sub(r"\d+", "0", re.sub(r"[+*-]", "+", prompt)) for prompt in prompts}
    assert shapes == {
        "0 + (0 + (0 + 0)) =",
        "0 + ((0 + 0) + 0) =",
        "(0 + 0) + (0 + 0) =",
        "(0 + (0 + 0)) + 0 =",
        "((0 + 0) + 0) + 0 =",
    }


@every_task
def test_the_hardest_can_be_made_and_is_of_bounded_length(name):
    (problem,) = problems(name, TASKS[name].HARDEST, "train", seed=0, count=1)
    assert problem.answer == SOLVERS[name](problem)
    assert len(problem.prompt) < 3_000


@every_task
def test_no_prompt_is_on_both_sides_whatever_the_seeds(name):
    sides = {
        split: {
            problem.prompt
            for difficulty in (2, 3)
            for seed in range(4)
            for problem in problems(name, difficulty, split, seed, 100)
        }
        for split in ("train", "test")
    }
    assert not sides["train"] & sides["test"]
    assert min(map(len, sides.values())) > 150
    assert all(split_of(prompt) == split for split, texts in sides.items() for prompt in texts)


@every_task
def test_problems_are_distinct_and_a_function_of_their_arguments(name):
    def draw(seed=0, count=50, stream=0):
        return [p.prompt for p in problems(name, 3, "train", seed, count, stream)]

    assert draw() == draw() and len(set(draw())) == 50
    assert draw(count=20) == draw()[:20]
    assert draw(seed=1) != draw() != draw(stream=1)


def test_about_a_tenth_of_all_prompts_is_for_tests():
    sides = [split_of(f"{i} + {j} =") for i in range(100) for j in range(100)]
    assert 0.09 < sides.count("test") / len(sides) < 0.11  # 10,000 draws: ± 0.6 % twice


def test_the_check_is_exact():
    problem = Problem("arithmetic", 1, "3 + 9 =", "12")
    assert all(map(problem.is_solved_by, ("12", " 12", "\n12\n", "12\n13", "12 \r\nx")))
    assert not any(
        map(problem.is_solved_by, ("", "1", "120", "12.", "012", "12 13", "= 12", "x\n12", "-12"))
    )


def test_an_easy_task_gives_all_its_problems():
    """One operator: 21 · 21 · 3 expressions, on one side or the other."""
    sides = {s: [p.prompt for p in problems("arithmetic", 1, s, 0, 9_999)] for s in SPLITS}
    assert len(set(sides["train"])) == len(sides["train"])
    assert 0.99 * 1_323 <= sum(map(len, sides.values())) <= 1_323
    requested = list(open_tasks("arithmetic:1-2,recall:1", 10_000).parts())  # the default's count
    rows = DataSummary("")
    found = [piece.text for part in requested for piece in part.pieces(rows) if piece.begins]
    assert rows.rows == len(found) > 10_000


def test_specs():
    assert parse("recall:4, arithmetic:1-3") == [
        ("recall", 4),
        ("arithmetic", 1),
        ("arithmetic", 2),
        ("arithmetic", 3),
    ]
    for spec, words in {
        "recal:3": 'task "recal" is not one of arithmetic, .*; did you mean "recall"',
        "recall": r"recall.*: give a difficulty from 1 to 100, or a range.*recall:1-3",
        "recall:0": "from 1 to 100",
        "recall:101": "from 1 to 100",
        "recall:5-3": "from 1 to 100",
        "recall:x": "is not one of",
        "recall:": "is not one of",
        f"recall:{'9' * 5_000}": "is not one of",
        "": 'task "" is not one of',
    }.items():
        with pytest.raises(UserError, match=words):
            parse(spec)


@pytest.fixture
def corpus_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**fields):
        fields = {"tokenizer": "bytes", "cache_dir": "cache", "window": "document"} | fields
        return prepare(DataConfig(**fields), seq_len=64, seed=0, log=lambda line: None)

    return make


def documents(windows):
    """(text, text that is trained on) of windows that hold one document each."""
    for window in windows:
        tokens = np.where(window < 0, ~window, window)
        text = bytes(tokens[tokens < 256].tolist()).decode()
        yield text, bytes(window[(window >= 0) & (window < 256)].tolist()).decode()


def test_only_answers_are_trained_on(corpus_of):
    corpus = corpus_of(tasks="arithmetic:1-2,recall:3", task_examples=80, loss_on="answer")
    found = [*documents(corpus.train), *documents(corpus.eval)]
    assert len(found) == 240
    expected = {
        f"{p.prompt} {p.answer}": f" {p.answer}"
        for name, difficulty in parse("arithmetic:1-2,recall:3")
        for p in problems(name, difficulty, "train", 0, 80)
    }
    assert dict(found) == expected


def test_problems_fill_parts_and_those_in_two_are_kept_once(corpus_of, monkeypatch):
    monkeypatch.setattr("mamba_jax.data.sources.task_rows._PART_PROBLEMS", 100)
    parts = list(open_tasks("arithmetic:1", 250).parts())
    assert [part.count for part in parts] == [100, 100, 50]
    assert len({part.key() for part in parts}) == 3
    corpus = corpus_of(tasks="arithmetic:1", task_examples=250)
    texts = [text for text, _ in (*documents(corpus.train), *documents(corpus.eval))]
    assert len(texts) == len(set(texts)) and 180 < len(texts) < 250
    assert corpus.summary.duplicates == 250 - len(texts)


def test_tasks_beside_files_and_in_mixtures(corpus_of, tmp_path):
    (tmp_path / "texts").mkdir()
    lines = (f"plain text {number**5} of a file\n" for number in range(40))
    (tmp_path / "texts" / "a.txt").write_text("".join(lines))
    both = corpus_of(data_dir="texts", tasks="recall:2", task_examples=30)
    texts = [text for text, _ in documents(both.train)] + [t for t, _ in documents(both.eval)]
    assert sum(" ; " in text for text in texts) == 30 and any("plain" in text for text in texts)
    mixed = corpus_of(
        mixture=(
            SourceConfig(data_dir="texts", weight=1.0),
            SourceConfig(tasks="recall:2", task_examples=30, weight=3.0),
        )
    )
    batch = next(mixed.train_batches(40, 0))
    assert sum(" ; " in text for text, _ in documents(batch)) == 30


def test_settings_that_make_no_sense_are_refused():
    config = default_config()
    config.data.update(tasks="recall:2", dataset="a/b")
    with pytest.raises(UserError, match="make each a source of a mixture"):
        freeze(config)
    config.data.update(dataset="", task_examples=0)
    with pytest.raises(UserError, match="task_examples=0 must be at least 1"):
        freeze(config)
