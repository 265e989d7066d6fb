"""Greedy answers against the argmax of whole forwards, and what is counted of them."""

import ast
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax import evaluate
from mamba_jax.data.tasks.problem import split_of
from mamba_jax.errors import UserError
from mamba_jax.evaluating import lm_eval_tasks
from mamba_jax.evaluating.scorer import Scorer
from mamba_jax.evaluating.tasks import on_problems, wilson
from mamba_jax.generation import generate_text
from mamba_jax.models import build
from tests.support.tiny_models import TOKENIZER, model_of

PROMPTS = ["x = ", "", "def f(a, b):"]
LENGTH = 32  # for whole forward passes: compiled once
apply = jax.jit(build.apply, static_argnums=1)


def scorer_of(*models, batch_size=2):
    return Scorer(models, batch_size=batch_size, chunk_tokens=4)


def greedily(models, prompt, n_tokens):
    """The most likely tokens under the mean of probabilities, each from a whole forward pass."""
    row = [TOKENIZER.eot_id, *TOKENIZER.encode(prompt).tolist()]
    made = []
    for _ in range(n_tokens):
        padded = jnp.array([row + made + [0] * (LENGTH - len(row) - len(made))])
        at = len(row) + len(made) - 1
        mean = sum(
            jax.nn.softmax(apply(m.params, m.config, padded)[0][0, at, : TOKENIZER.vocab_size])
            for m in models
        )
        made.append(int(mean.argmax()))
        if made[-1] == TOKENIZER.eot_id:
            return made[:-1]
    return made


@pytest.mark.parametrize("names", [[("mamba", 0)], [("mamba", 0), ("mamba", 2)]], ids=str)
def test_continuations_are_greedy_whatever_shares_their_batch(names):
    models = [model_of(*name) for name in names]
    sequences = [np.array([TOKENIZER.eot_id, *TOKENIZER.encode(p)], np.int32) for p in PROMPTS]
    never = lambda index, token: False
    made = scorer_of(*models).continuations(sequences, 12, never)
    assert made == [greedily(models, prompt, 12) for prompt in PROMPTS]
    assert len(set(map(tuple, made))) == 3
    if len(models) == 1:
        text = generate_text(
            models[0].params, models[0].config, TOKENIZER, PROMPTS[:1],
            max_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0,
        )  # fmt: skip
        assert text == [TOKENIZER.decode(made[0])]
    output = [[] for _ in sequences]
    two = lambda index, token: output[index].append(token) or len(output[index]) == 2
    assert scorer_of(*models).continuations(sequences, 12, two) == [row[:2] for row in made]
    assert output == [row[:2] for row in made]


def test_texts_end_before_the_first_stop():
    scorer = scorer_of(model_of("mamba"))
    (free,) = lm_eval_tasks.continue_texts(scorer, ["x = "], 12, [])
    stops = [free[5:7], free[3:6]]
    (cut,) = lm_eval_tasks.continue_texts(scorer, ["x = "], 12, stops)
    assert len(free) > 7 and cut == free[: min(free.find(stop) for stop in stops)]


class Oracle:
    """Answers every second problem rightly."""

    tokenizer = TOKENIZER

    def __init__(self):
        self.requested = []

    def continuations(self, sequences, max_tokens, is_complete):
        made = []
        for index, sequence in enumerate(sequences):
            prompt = TOKENIZER.decode(sequence[1:])
            self.requested.append(prompt)
            expression = prompt.removesuffix(" =")
            right = len(self.requested) % 2
            made.append(list(f" {eval(expression) + 1 - right}\nmore".encode()))
            assert any(is_complete(index, token) for token in made[-1])
            assert max_tokens >= len(str(eval(expression))) + 1
        return made


def test_problems_come_from_the_test_split_and_are_counted_exactly():
    scorer = Oracle()
    (metric,), samples = on_problems(scorer, "arithmetic:2", 31, 2)
    assert len(set(scorer.requested)) == 31 and {*map(split_of, scorer.requested)} == {"test"}
    assert metric["value"] == 16 / 31 and metric["of"] == "arithmetic:2"
    assert (metric["low"], metric["high"]) == wilson(16, 31)
    assert [sample["prompt"] for sample in samples] == scorer.requested[:2]
    assert samples[0]["answer"].strip() == samples[0]["target"]
    assert samples[1]["answer"].strip() != samples[1]["target"]


def test_wilson_inverts_the_score_test():
    """At an end of the interval the observed share is 1.96 standard errors of that end away."""
    for successes, trials in ((0, 10), (3, 10), (50, 100), (99, 100), (7, 7)):
        for end in wilson(successes, trials):
            if 0 < end < 1:
                distance = abs(successes / trials - end) / (end * (1 - end) / trials) ** 0.5
                assert distance == pytest.approx(1.959964, rel=1e-6)
    assert wilson(0, 10)[0] == 0 and wilson(7, 7)[1] == 1


def test_the_command_answers_tasks_alone_and_as_an_ensemble(run_dir, tmp_path, capsys):
    flags = ["--tasks=recall:2,arithmetic:1", "--limit=6", "--samples=1", "--batch_size=4"]
    results = []
    for models in (["--checkpoint", run_dir], ["--ensemble", run_dir, run_dir]):
        out = tmp_path / "result.json"
        assert evaluate.main([*models, *flags, f"--json={out}"]) == 0
        results.append(json.loads(out.read_text()))
        shown = capsys.readouterr().out
        assert "recall:2" in shown and "expected: " in shown and ">>> " in shown
    one, two = results
    assert one["metrics"] == two["metrics"] and one["samples"] == two["samples"]
    assert two["combined"] == "mean of the probabilities of 2 models"
    assert [metric["of"] for metric in one["metrics"]] == ["recall:2", "arithmetic:1"]


@pytest.mark.parametrize(
    ("tasks", "named"),
    [("recall:0", "from 1 to 100"), ("recal:2", "did you mean"), ("recall", "give a difficulty")],
)
def test_mistakes_are_one_line_before_a_model_is_read(tasks, named, capsys):
    assert evaluate.main(["--checkpoint=nowhere", f"--tasks={tasks}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and named in error


# --- lm_eval


def test_lm_eval_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert evaluate.main(["--checkpoint=nowhere", "--tasks=recall:2,gsm8k"]) == 2
    assert "pip install 'mamba_jax[eval]'" in capsys.readouterr().err


def test_loglikelihoods_are_sums_over_the_continuation():
    model = model_of("mamba")
    pairs = [("x = ", "1"), ("", "ab"), ("a  ", " b"), ("f(a", ")")]
    found = lm_eval_tasks.loglikelihoods(scorer_of(model), pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        row = np.array([TOKENIZER.eot_id, *TOKENIZER.encode(context + continuation)])
        n = len((context + continuation).encode()) - len(context.rstrip().encode())
        padded = jnp.array([[*row, *[0] * (LENGTH - len(row))]])
        logits = apply(model.params, model.config, padded)[0][0, : len(row)]
        log_probs = np.asarray(jax.nn.log_softmax(logits[:, : TOKENIZER.vocab_size]), np.float64)
        of_targets = log_probs[np.arange(len(row) - 1), row[1:]][-n:]
        # White space at the context's end belongs to what follows, as in lm_eval's models.
        assert total == pytest.approx(of_targets.sum(), rel=1e-5)
        assert greedy == bool((log_probs.argmax(-1)[:-1] == row[1:])[-n:].all())


def test_each_setting_of_requests_has_its_answers():
    scorer = scorer_of(model_of("mamba"))
    (text,) = lm_eval_tasks.continue_texts(scorer, ["x = "], 9, [])
    requests = [
        ("x = ", {"until": [text[4]], "max_gen_toks": 9}),
        ("x = ", {"max_gen_toks": 3}),
        ("x = ", {"until": text[4], "max_gen_toks": 9}),
    ]
    cut = text[: text.find(text[4])]
    (short,) = lm_eval_tasks.continue_texts(scorer, ["x = "], 3, [])
    assert short != text and lm_eval_tasks.generate(scorer, requests) == [cut, short, cut]
    with pytest.raises(UserError, match="samples its answers"):
        lm_eval_tasks.generate(scorer, [("x", {"do_sample": True})])


GENERATING = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["@"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# Two solved examples, always the same, before each question.
CHOOSING = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: multiple_choice
test_split: train
fewshot_split: train
num_fewshot: 2
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["7", "8", "99"]
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
READING = """
task: reading
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


@pytest.mark.slow
def test_custom_task_files_through_lm_eval(run_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    scorer = scorer_of(model_of("mamba"))
    questions = ["x = ", "y(", "z z"]
    answers = lm_eval_tasks.continue_texts(scorer, questions, 6, ["@"])
    rows = zip(questions, [answers[0], "no", answers[2]], strict=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in (("sums", GENERATING), ("choices", CHOOSING), ("reading", READING)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))

    def run(tasks):
        flags = [f"--task_dir={tmp_path / 'tasks'}", "--samples=1", "--batch_size=2"]
        flags += ["--chunk_tokens=4", f"--json={tmp_path / 'r.json'}"]
        assert evaluate.main([f"--checkpoint={run_dir}", f"--tasks={tasks}", *flags]) == 0
        return json.loads((tmp_path / "r.json").read_text())

    result = run("sums,choices,reading,recall:1")
    by_name = {(metric["of"], metric["metric"]): metric for metric in result["metrics"]}
    sums = by_name["sums", "exact_match"]
    assert sums["value"] == pytest.approx(2 / 3) and "0-shot" in sums["variant"]
    # The standard error of a mean of three: lm_eval's.
    half = 1.96 * np.std([1, 0, 1], ddof=1) / 3**0.5
    assert (sums["high"] - sums["low"]) / 2 == pytest.approx(half, rel=1e-3)
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "bits_per_byte" in shown and "recall:1" in shown
    assert {s["task"] for s in result["samples"]} == {"sums", "choices", "reading", "recall:1"}

    # lm_eval's metric, from our likelihoods by whole forward passes.
    pairs = [("", question) for question in questions]
    of_texts = lm_eval_tasks.loglikelihoods(scorer, pairs)
    n_bytes = sum(map(len, questions))
    bits = -sum(total for total, _ in of_texts) / n_bytes / np.log(2)
    assert by_name["reading", "bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert "2-shot" in by_name["choices", "acc"]["variant"]
    (sample,) = [sample for sample in result["samples"] if sample["task"] == "choices"]
    assert sample["prompt"] == "y( 8\n\nz z 8\n\nx = "
    choices = [(sample["prompt"], f" {choice}") for choice in (7, 8, 99)]
    expected = lm_eval_tasks.loglikelihoods(scorer_of(model_of("mamba"), batch_size=1), choices)
    for (total, _), (theirs, _) in zip(expected, ast.literal_eval(sample["answer"]), strict=True):
        assert theirs == pytest.approx(total, rel=1e-5)
