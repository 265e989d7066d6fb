"""Several runs side by side, against figures worked out by hand."""

import json
import math
import pathlib
import re

import pytest

from mamba_jax import report
from mamba_jax.reports.compare import Comparison, names, render
from mamba_jax.runs.recorded import read_run
from tests.support.made_run import Page, evaluated, rate, started, trained, write


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two runs that differ in rate, batch and results; and one that has just started."""
    monkeypatch.chdir(tmp_path)
    slow = [
        *(started(output_dir="x/slow"), *trained(1, 40, loss=lambda s: 4.0), rate(40, 1000.0)),
        *(evaluated(20, 3.0, bits=1.25), evaluated(40, 3.25, bits=1.5)),
    ]
    changes = {"vram__effective_batch_size": 16, "vram__batch_size": 16}
    fast = [
        started(output_dir="x/fast", training__learning_rate=0.001, parameters=99, **changes),
        *(*trained(1, 30, loss=lambda s: 2.0), rate(30, 2000.0, memory_bytes=5 << 29)),
        *(evaluated(30, 2.5, bits=1.125), {"step": 30, "ended": "OSError: no space"}),
    ]
    return [
        str(write("x/slow", slow)),
        str(write("x/fast", fast)),
        str(write("new", [started(output_dir="new")])),
    ]


EXPECTED = {  # of slow, fast and new
    "training.learning_rate": ["0.0003", "0.001", "0.0003"],
    "vram.effective_batch_size": ["8", "16", "8"],
    "vram.batch_size": ["8", "16", "8"],
    "state": ["done", "failed", "new"],
    "steps": ["40", "30", "0"],
    "steps planned": ["40", "40", "40"],
    "tokens": ["32,000", "48,000", "0"],
    "parameters": ["1,234", "99", "1,234"],
    "device": ["2 × H200", "2 × H200", "–"],
    "eval loss, last": ["3.25", "2.5", "–"],
    "eval loss, best": ["3", "2.5", "–"],
    "bits per byte, last": ["1.5", "1.125", "–"],
    "training loss": ["4", "2", "–"],
    "tokens/s": ["1,000", "2,000", "–"],
    "memory": ["3.00 GiB", "2.50 GiB", "–"],
    "time in steps": ["0 min 32 s", "0 min 24 s", "–"],
}


def test_the_table_by_hand(folders, capsys):
    assert report.main(["compare", *folders]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["slow", "fast", "new"]
    rows = {}
    for line in lines:
        title, *cells = (part.strip() for part in line.split("  ") if part.strip())
        rows.setdefault(title, cells)
    assert {title: rows.get(title) for title in EXPECTED} == EXPECTED
    assert set(rows) == set(EXPECTED) | {"… at step"}  # no other field differs
    steps = [line.split()[-3:] for line in lines if line.startswith("… at step")]
    assert steps == [["40", "30", "–"], ["20", "30", "–"]]


def test_the_page_holds_the_same_table(folders):
    assert report.main(["compare", *folders, "--out=page.html"]) == 0
    text = pathlib.Path("page.html").read_text()
    page = Page(text)
    for title in ("training.learning_rate", "vram.effective_batch_size", "state", "steps"):
        assert page.rows[title] == [title, *EXPECTED[title]]
    assert page.rows["eval_loss"][1:] == EXPECTED["eval loss, last"]
    assert page.rows["memory_bytes"][1:] == EXPECTED["memory"]
    assert "fast: failed, OSError: no space" in page.text
    best = re.findall(r'class="best">([^<]*)', text)
    assert best == ["2.5", "2.5", "1.125", "2"]  # eval loss last and best, bits, training loss


def marked(*changes):
    """The measures of which a run is marked as the best."""
    runs = []
    for place, change in enumerate(changes):
        losses = trained(1, 9, loss=lambda s, place=place: 3.0 + place)
        records = [started(**change), *losses, evaluated(9, 2.0 + place, bits=1.0 + place)]
        runs.append(read_run(write(f"m{place}", records)))
    text = render(Comparison(runs))
    return set(re.findall(r'data-row="([^"]*)"(?:(?!</tr>).)*class="best"', text))


def test_only_what_can_be_compared_has_a_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = {"eval_loss", "best_eval_loss", "train_loss"}
    bits = {"eval_bits_per_byte"}
    assert marked({}, {"training__learning_rate": 0.5}) == losses | bits
    assert marked({}, {"data__tokenizer": "bytes"}) == bits
    assert marked({}, {"data__data_dir": "b"}) == set()
    assert marked({}, {"data__data_dir": "b", "data__tokenizer": "bytes"}) == set()
    both = notes({}, {"data__data_dir": "b", "data__tokenizer": "bytes"})
    assert "bits per byte can" not in both
    bare = write("bare", [*trained(1, 3), evaluated(3, 1.0)])
    known = write("known", [started(), *trained(1, 3), evaluated(3, 2.0)])
    assert 'class="best"' not in render(Comparison([read_run(bare), read_run(known)]))


def test_results_come_first_and_many_fields_are_folded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [{}, {"data__data_dir": "b"}]
    model = {"model__d_state": 8, "model__d_conv": 3, "model__expand_factor": 3}
    training = {
        f"training__{n}": 3 for n in ("log_steps", "eval_steps", "eval_windows", "save_steps")
    }
    many = [{}, {**model, **training, "training__learning_rate": 0.5, "seed": 7}]
    parts = (">Results<", 'data-row="eval_loss"', 'data-row="device"', "Config: ", 'id="chart-')
    for changes, is_open in ((few, True), (many, False)):
        records = [[started(**change), *trained(1, 9)] for change in changes]
        folders = [write(f"r{place}", each) for place, each in enumerate(records)]
        comparison = Comparison([read_run(folder) for folder in folders])
        text = render(comparison)
        order = [text.index(part) for part in parts]
        assert order == sorted(order)
        assert ("<details open>" in text) == is_open
        assert all(text.index(note) < order[0] for note in comparison.notes())
    assert "Config: 9 fields differ" in text


def test_curves_equal_the_records_over_steps_and_tokens(folders):
    comparison = Comparison([read_run(folder) for folder in map(pathlib.Path, folders)])
    page = Page(render(comparison))
    losses = page.chart("train_loss")
    assert list(losses) == ["slow", "fast"]  # the new run has none yet
    assert losses["fast"]["x"] == list(range(1, 31)) and set(losses["fast"]["y"]) == {2}
    assert page.chart("eval_loss")["slow"]["y"] == [3, 3.25]
    assert page.chart("tokens_per_sec")["fast"]["y"] == [2000]
    assert [curve["run"] for curve in losses.values()] == [0, 1]
    assert page.data["tokens"] == [[[0, 0, 800]], [[0, 0, 1600]], [[0, 0, 800]]]
    assert (page.data["span"], page.data["token_span"]) == ([0, 40], [0, 48_000])


def test_json_is_the_table(folders, capsys):
    assert report.main(["compare", *folders, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["differences"]["training.learning_rate"] == [3e-4, 1e-3, 3e-4]
    slow, fast, new = printed["runs"]
    assert (slow["name"], slow["eval_loss"], slow["best_eval_loss"]) == ("slow", 3.25, 3.0)
    assert (fast["tokens"], fast["why"]) == (48_000, "OSError: no space")
    assert new["eval_loss"] is None and new["train_loss"] is None


def test_values_that_are_not_finite_are_null_in_json(folders, capsys):
    write("nan", [started(), evaluated(3, math.nan)])
    assert report.main(["compare", folders[0], "nan", "--json"]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text and json.loads(text)["runs"][1]["eval_loss"] is None


def test_runs_are_named_by_the_part_in_which_their_folders_differ():
    a, b = ("/", "x", "one", "run"), ("/", "x", "two", "run")
    assert names([a, b, ("/", "x", "c")]) == ["one/run", "two/run", "c"]
    assert names([a, a, b]) == ["one/run (1)", "one/run (2)", "two/run"]
    assert names([("/", "run"), ("/", "x", "run")]) == ["/run", "x/run"]
    assert names([("/",), ("/", "run")]) == ["/", "run"]


def notes(*changes):
    runs = [started(**change) for change in changes]
    folders = [write(f"run{place}", [run]) for place, run in enumerate(runs)]
    return " ".join(Comparison([read_run(folder) for folder in folders]).notes())


def test_incomparable_losses_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert notes({}, {"training__learning_rate": 0.5}) == ""
    assert "tokenizers differ" in notes({}, {"data__tokenizer": "bytes"})
    assert "data settings differ" in notes({}, {"data__data_dir": "b"})
    assert "data settings differ" not in notes({}, {"data__cache_dir": "b"})
    bare = write("bare", trained(1, 3))
    known = write("known", [started(), *trained(1, 3)])
    comparison = Comparison([read_run(bare), read_run(known)])
    (note,) = comparison.notes()
    assert note.startswith("No config is recorded for bare")
    assert comparison.differences == {}
    page = Page(render(comparison))
    assert "Not shown over tokens" in page.text
    assert page.data["tokens"] == [None, [[0, 0, 800]]]


def test_text_of_several_lines_stays_in_its_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("a", [started(sample_prompt="one\ntwo" * 20)])
    other = started(name="<b>bold</b>")
    other["run"]["config"]["<b>field"] = 1  # of a version to come
    write("b", [other])
    assert report.main(["compare", "a", "b"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("sample_prompt")]
    assert "'one\\ntwo" in line and "…" in line and len(line) < 80
    text = pathlib.Path("compare.html").read_text()
    assert "<b>bold" not in text and "<b>field" not in text and "&lt;b&gt;field" in text


def test_a_folder_name_cannot_end_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [write(f"{parent}/script>b", [started(), *trained(1, 3)]) for parent in ("<", "y")]
    page = Page(render(Comparison([read_run(folder) for folder in folders])))
    assert list(page.chart("train_loss")) == ["</script>b", "y/script>b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "only one run to compare: a; give two or more"),
        (["a", "nowhere"], "nowhere is not a run's folder: it does not exist"),
        (["a", "a", "--out=no/page.html"], "choose another --out"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("a", [started()])
    assert report.main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
