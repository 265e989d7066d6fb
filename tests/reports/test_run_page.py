"""The page of a run: it shows what was recorded and needs no network."""

import html
import importlib
import math
import re
import shlex
import shutil

import pytest

from mamba_jax import report
from mamba_jax.checkpoints.folder import Metadata, write_manifest, write_metadata
from mamba_jax.cli import train_arguments
from mamba_jax.config import from_dict
from mamba_jax.reports.run_page import render
from mamba_jax.runs.background import Record
from mamba_jax.runs.recorded import read_run
from tests.support.made_run import Page, config, evaluated, rate, started, trained, write

EVIL = '</script></pre><script>alert("x")</script><img src=x onerror=alert(1)> &amp; é'


def page_of(folder, records):
    return Page(render(read_run(write(folder, records))))


def gates(step, *depths):
    layers = len(depths)
    return {
        "step": step,
        "depth_mean": list(depths),
        "gates_closed": [0.25] * layers,
        "gates_open": [0.5] * layers,
    }


def hybrid_records():
    layers = {"dt_mean": [0.01, 0.02], "dt_max": [0.5, 7.0], "A_min": [-16.5, -17.0]}
    return [
        started(),
        *trained(1, 40),
        rate(10, 5000.25),
        rate(20, 6000.5, memory_bytes=4 << 30, data_wait=0.5),
        gates(10, 1.5, 1.25),
        gates(20, 1.625, 0.0),
        evaluated(20, 4.125, bits=1.75, **layers, A_max=[-0.5, -0.75]),
        evaluated(40, 3.5, bits=1.5, **layers, A_max=[-0.25, -0.125]),
    ]


def test_curves_equal_the_records(tmp_path):
    records = hybrid_records()
    page = page_of(tmp_path, records)
    steps = list(range(1, 41))
    assert page.data["span"] == [0, 40]
    for chart, name, key in (
        ("loss", "training", "loss"),
        ("learning_rate", "Learning rate", "learning_rate"),
        ("gradient_norm", "Gradient norm", "gradient_norm"),
    ):
        curve = page.chart(chart)[name]
        assert curve["x"] == steps and curve["size"] == 1 and "low" not in curve
        assert curve["y"] == pytest.approx([r[key] for r in records if key in r], rel=1e-5)
    curve = page.chart("loss")["evaluation"]
    assert (curve["x"], curve["y"], curve["look"]) == ([20, 40], [4.125, 3.5], "dots")
    curve = page.chart("bits_per_byte").popitem()[1]
    assert (curve["y"], curve["look"]) == ([1.75, 1.5], "dots")
    perplexities = page.chart("perplexity").popitem()[1]["y"]
    assert perplexities == pytest.approx([math.exp(4.125), math.exp(3.5)], rel=1e-5)
    assert list(page.chart("loss")) == ["training", "evaluation"]
    records[0]["run"]["unigram_nll"] = 6.5
    level = page_of(tmp_path, records).chart("loss")["token frequencies alone"]
    assert (level["x"], level["y"], level["look"]) == ([0, 40], [6.5, 6.5], "level")
    assert page.chart("tokens_per_sec").popitem()[1]["y"] == [5000.25, 6000.5]
    assert page.chart("memory").popitem()[1]["y"] == pytest.approx([3 << 30, 4 << 30], rel=1e-5)
    assert page.chart("data_wait").popitem()[1]["y"] == [0.25, 0.5]
    for chart, first, second in (
        ("depth", [1.5, 1.625], [1.25, 0]),
        ("gates_closed", [0.25] * 2, [0.25] * 2),
        ("gates_open", [0.5] * 2, [0.5] * 2),
        ("dt_mean", [0.01] * 2, [0.02] * 2),
        ("dt_max", [0.5] * 2, [7.0] * 2),
        ("A_min", [-16.5] * 2, [-17.0] * 2),
        ("A_max", [-0.5, -0.25], [-0.75, -0.125]),
    ):
        curves = page.chart(chart)
        assert list(curves) == ["layer 0", "layer 1"]
        assert [curve["y"] for curve in curves.values()] == [first, second]
        assert [curve["share"] for curve in curves.values()] == [0, 1]
    logarithmic = {chart["key"] for chart in page.data["charts"] if chart["log"]}
    assert logarithmic == {"perplexity", "gradient_norm"}
    assert "Not recorded" not in page.text


@pytest.mark.parametrize(
    ("plan", "numbers"), [("M,H,H", (1, 2)), ("H,M,M,H", (0, 3)), ("", (0, 1)), ("(H)@2", (0, 1))]
)
def test_gates_bear_the_numbers_of_their_layers(tmp_path, plan, numbers):
    records = hybrid_records()
    records[0]["run"]["config"]["model"]["plan"] = plan
    page = page_of(tmp_path, records)
    assert list(page.chart("depth")) == [f"layer {number}" for number in numbers]


def test_the_head_shows_the_state_of_the_run(tmp_path):
    text = page_of(tmp_path, hybrid_records()).text
    for words in (
        "done",
        "steps 40 of 40 100%",
        "tokens 32,000",
        "evaluation loss, last 3.5 at step 40; perplexity 33.12, 1.5 bits per byte",
        "evaluation loss, best 3.5 at step 40",
        "tokens per second 5,500",
        "memory 4.00 GiB",
        "parameters 1,234",
        "device 2 × H200",
        "started 2026-01-02 03:04:05",
    ):
        assert words in text, words


def test_every_place_of_a_chart_is_there_once(tmp_path):
    page = page_of(tmp_path, hybrid_records())
    places = [marks["id"] for tag, marks in page.tags if tag == "figure"]
    assert places == [f"chart-{chart['key']}" for chart in page.data["charts"]]


def test_the_mean_line_is_that_of_the_last_steps(tmp_path):
    records = [started(training__max_steps=200), *trained(1, 200, loss=lambda s: 0.25 * (s % 8))]
    curves = page_of(tmp_path, records).chart("loss")
    smooth = curves["mean of 5 steps"]["y"]
    assert smooth[:2] == [0.25, 0.375]  # of fewer at the beginning
    assert smooth[9] == pytest.approx(0.25 * (6 + 7 + 0 + 1 + 2) / 5)
    assert curves["training"]["look"] == "faint"


def test_two_hundred_thousand_steps_make_a_small_page_with_every_spike(tmp_path):
    records = trained(1, 200_000, loss=lambda s: 14.0 if s == 123_456 else 3.0 + s % 11 / 10)
    layers = [gates(s, *(s % 13 / 10 + n for n in range(24))) for s in range(10, 200_001, 10)]
    layers[5_000]["depth_mean"][3] = 77.0
    run = read_run(write(tmp_path, [started(training__max_steps=200_000)]))
    run.records.extend([*records, *layers])
    text = render(run)
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    curve = page.chart("loss")["training"]
    assert len(curve["x"]) == 1000 and curve["size"] == 200 and curve["x"][-1] == 200_000
    assert max(curve["high"]) == 14 and min(curve["low"]) == 3
    (place,) = [i for i, high in enumerate(curve["high"]) if high == 14]
    assert curve["from"][place] <= 123_456 <= curve["x"][place]
    assert max(page.chart("depth")["layer 3"]["high"]) == 77
    assert "Each point represents up to 200 values" in page.text


def test_values_that_are_not_finite_are_gaps_and_reported(tmp_path):
    records = [started(), *trained(1, 10)]
    records[4]["loss"], records[5]["gradient_norm"] = math.nan, math.inf
    page = page_of(tmp_path, [*records, evaluated(10, math.nan)])
    curve = page.chart("loss")["training"]
    assert curve["y"][3] is None and curve["gaps"] == [[4, 1, "nan"]]
    assert page.chart("loss")["evaluation"]["y"] == [None]
    assert page.chart("gradient_norm").popitem()[1]["gaps"] == [[5, 1, "inf"]]
    assert "not finite" in page.text and "evaluation loss, last nan" in page.text
    clean = page_of(tmp_path / "clean", [started(), *trained(1, 10)])
    assert "not finite" not in clean.text and "skipped steps 0" in clean.text


def test_skipped_steps_and_resumes_are_marked(tmp_path):
    before, after = trained(1, 20), trained(21, 40)
    before[6]["skipped"] = after[0]["skipped"] = True
    again = started(20, at="2026-02-03 00:00:00", training__learning_rate=0.5)
    page = page_of(tmp_path, [started(), *before, again, *after])
    assert page.data["marks"] == {"resumed": [[20]], "skipped": [[7], [21]]}
    assert "skipped steps 2" in page.text
    assert (
        "at step 20 (2026-02-03 00:00:00): training.learning_rate 0.0003 → 0.5" in page.text
        and page.text.count("→") == 1
    )
    marking = {chart["key"] for chart in page.data["charts"] if chart["skips"]}
    assert marking == {"loss", "gradient_norm"}


def test_very_many_skipped_steps_are_thinned(tmp_path):
    records = trained(1, 2000)
    for record in records:
        record["skipped"] = True
    page = page_of(tmp_path, [started(), *records])
    assert len(page.data["marks"]["skipped"]) <= 300 and "skipped steps 2,000" in page.text


def test_the_config_is_complete_and_marks_changed_fields(tmp_path):
    page = page_of(tmp_path, hybrid_records())
    assert page.rows["model.d_model"] == ["d_model", "512default 768"]
    assert page.rows["model.dropout"] == ["dropout", "0"]
    assert page.rows["model.attention_scales"] == ["attention_scales", "[1, 2, 4]"]
    assert page.rows["sample_prompt"] == ["sample_prompt", "''"]
    marked = {m["data-field"] for tag, m in page.tags if tag == "tr" and m.get("class")}
    assert marked == {
        *("name", "output_dir", "model.family", "model.d_model", "model.n_layers"),
        *("model.vocab_size", "model.max_seq_len", "training.max_steps", "training.warmup_steps"),
        *("vram.effective_batch_size", "vram.batch_size"),
    }


def test_warnings_alike_are_one_line(tmp_path):
    spikes = [
        {"step": s, "warning": f"step {s}: gradient norm {s}.5e+02 is a spike; step skipped"}
        for s in (5, 1007, 2009)
    ]
    text = page_of(tmp_path, [started(), *spikes, {"step": 9, "warning": "the disk is full"}]).text
    assert text.count("is a spike") == 1
    assert (
        "step 2009: gradient norm 2009.5e+02 is a spike; step skipped (3 similar ones, steps 5"
        in text
    )
    assert "the disk is full" in text


def test_no_text_of_a_run_becomes_markup(tmp_path):
    records = [
        started(name=EVIL, data__data_dir=EVIL, at=EVIL),
        *trained(1, 3),
        rate(3, 5.0, kind=EVIL),
        {"step": 3, "warning": EVIL},
        {"step": 3, "prompt": EVIL, "sample": EVIL},
        {"step": 3, "ended": EVIL},
    ]
    folder = tmp_path / "<img src=y>"
    page = page_of(folder, records)
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the page's own
    assert not any(tag == "img" or "onerror" in marks for tag, marks in page.tags)
    assert page.text.count(EVIL) >= 6
    assert EVIL in page.rows["data.data_dir"][1]


def test_the_newest_sample_comes_first_and_very_many_are_cut(tmp_path):
    samples = [{"step": s, "prompt": "say", "sample": f" word{s}."} for s in range(1, 31)]
    text = page_of(tmp_path, [started(), *samples]).text
    assert text.index("word30.") < text.index("19 earlier samples") < text.index("word29.")
    assert "word11." in text and "word10." not in text and "10 older ones are not shown" in text
    text = page_of(tmp_path, [started(), {"step": 1, "prompt": "", "sample": "x" * 9000}]).text
    assert "x" * 4000 + " …" in text and "x" * 4001 not in text


def saved(folder, step, loss=None):
    """A checkpoint, as far as its folder describes it."""
    path = folder / ("final" if step == 40 else f"step_{step}")
    path.mkdir(parents=True)
    metrics = {} if loss is None else {"eval_loss": loss}
    run = from_dict(config())
    write_metadata(path, Metadata(run, step, step, "corpus", metrics, {}, "cpu", "bytes"))
    write_manifest(path)


def commands(page):
    (block,) = re.findall(r'<pre class="commands">(.*?)</pre>', page, re.DOTALL)
    return [shlex.split(html.unescape(line)) for line in block.splitlines()]


def test_the_best_checkpoint_and_the_commands_for_it(tmp_path):
    folder = tmp_path / "a run"
    records = [started(), *trained(1, 30)]
    for step, loss in ((10, 3.0), (20, 2.5), (25, 2.25), (30, 2.75)):
        records.append(evaluated(step, loss))
    for step, loss in ((10, 3.0), (20, 2.5), (30, 2.75)):
        saved(folder, step, loss)
    text = render(read_run(write(folder, records)))
    page = Page(text)
    assert "Best: step_20, evaluation loss 2.5 at step 20." in page.text
    assert "The best evaluation, 2.25 at step 25, has no checkpoint." in page.text
    assert "resumes from the newest, step_30." in page.text
    best = str(folder / "step_20")
    assert commands(text) == [
        ["mamba-jax", "generate", "--checkpoint", best, "--prompt", ""],
        [*("mamba-jax", "export", "--checkpoint", best, "--format", "hf"),
         *("--out", "a run-step_20-hf")],
        ["mamba-jax", "train", "--resume", str(folder)],
    ]  # fmt: skip
    for _, name, *flags in commands(text):
        if name != "train":
            importlib.import_module(f"mamba_jax.{name}").parse(flags)
        else:
            assert train_arguments.read(flags).resume == str(folder)
    shutil.rmtree(folder / "step_20")  # as ``keep_last`` does
    assert "Best: step_30, evaluation loss 2.75" in Page(render(read_run(folder))).text


def test_a_run_that_trains_has_no_command_to_resume_it(tmp_path):
    saved(tmp_path, 10, 2.0)
    record = Record.claim(tmp_path)
    record.begin()
    text = render(read_run(write(tmp_path, [started(), *trained(1, 12), evaluated(10, 2.0)])))
    record.release()
    assert "Best: step_10" in text and "--resume" not in text


def test_checkpoints_of_a_run_that_is_done_or_was_never_evaluated(tmp_path):
    saved(tmp_path / "a", 40, 2.0)
    done = render(read_run(write(tmp_path / "a", [started(), *trained(1, 40), evaluated(40, 2.0)])))
    assert "Best: final" in done and "--resume" not in done
    saved(tmp_path / "b", 10)
    text = render(read_run(write(tmp_path / "b", [started(), *trained(1, 12)])))
    assert "Newest: step_10, at step 10; none was evaluated." in text
    assert "<h2>Checkpoints" not in render(read_run(write(tmp_path / "c", [started()])))


def test_an_empty_run_is_shown_as_empty(tmp_path):
    for records in ([], [started()]):
        page = page_of(tmp_path, records)
        assert page.data is None and "No curves" in page.text
        assert "new : no step is recorded yet" in page.text
    assert "steps 0 of 40" in page.text
    plain = page_of(tmp_path, [started(), *trained(1, 3)])
    assert "Not recorded: Perplexity, held-out text; Bits per byte" in plain.text


def test_the_page_needs_no_network(tmp_path):
    text = render(read_run(write(tmp_path, hybrid_records())))
    page = Page(text)
    assert not any({"src", "href"} & marks.keys() for _, marks in page.tags)
    addresses = set(re.findall(r"https?://[^'\"]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, not a request
    assert "@import" not in text and "url(http" not in text and "fetch(" not in text


def test_the_command_writes_one_file_and_prints_its_path(tmp_path, capsys):
    folder = write(tmp_path / "a", hybrid_records())
    assert report.main(["run", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().err
    assert Page((folder / "report.html").read_text()).chart("loss")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]
    assert report.main(["run", str(folder), "--out", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_text() == (folder / "report.html").read_text()


def test_mistakes_are_one_line(tmp_path, capsys):
    folder = write(tmp_path / "a", hybrid_records())
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "is not a run's folder: it does not exist"),
        ([str(folder), f"--out={tmp_path}/no/such.html"], "choose another --out"),
        ([str(folder), f"--out={tmp_path}"], "cannot write the page"),
    ):
        assert report.main(["run", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
