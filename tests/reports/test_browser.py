"""The pages in a real browser, where one is installed: they draw, read values, and fit a phone."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest

from mamba_jax.reports.compare import Comparison
from mamba_jax.reports.compare import render as render_comparison
from mamba_jax.reports.run_page import render
from mamba_jax.runs.recorded import read_run
from mamba_jax.sweeps import sweep_page
from mamba_jax.sweeps.jobs import SweepRow
from tests.support.made_run import evaluated, rate, started, trained, write

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium is installed"),
]
# What a reader could do and would then see, in one object at the end of the page.
LOOK = """
<script>
const seen = {};
const point = (key, share) => {
  const svg = document.querySelector(`#chart-${key} svg`), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent('pointermove', {
    clientX: box.left + box.width * share, clientY: box.top + 50 }));
  return document.querySelector(`#chart-${key} .tip`).innerText;
};
const path = key => document.querySelector(`#chart-${key} .curve`)?.getAttribute('d');
const labels = key => [...document.querySelectorAll(`#chart-${key} .x`)].map(x => x.textContent);
const press = what => document.querySelector(what).click();
try {
  seen.width = [innerWidth, document.documentElement.scrollWidth];
  seen.outside = [...document.querySelectorAll('figure text')].filter(text => {
    const box = text.getBoundingClientRect(), svg = text.closest('svg').getBoundingClientRect();
    return box.left < svg.left - 1 || box.right > svg.right + 1;
  }).map(text => text.textContent);
  seen.overlap = [...document.querySelectorAll('figure svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('.x')].map(x => x.getBoundingClientRect());
    return boxes.slice(1).filter((box, i) => box.left < boxes[i].right);
  }).length;
  seen.drawn = document.querySelectorAll('figure svg').length;
  seen.empty = [...document.querySelectorAll('figure')]
    .filter(figure => !figure.querySelector('.curve, circle, .gap')).map(figure => figure.id);
  LOOKING
} catch (error) { seen.error = String(error); }
parent.postMessage(JSON.stringify(seen), '*');
</script>
"""
# A browser's window cannot be as narrow as a phone, but a frame in it can.
FRAME = """<!doctype html><iframe src="page.html" width="{width}" height="800" frameborder="0">
</iframe><pre id="seen"></pre>
<script>
addEventListener('message', event => document.getElementById('seen').textContent = event.data);
</script>
"""


def look(text, tmp_path, *flags, width=360, doing=""):
    """Opens a page, does what a reader could do, and returns what is seen."""
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    page.write_text(text + LOOK.replace("LOOKING", doing), encoding="utf-8")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=1400,900", "--virtual-time-budget=3000", *flags),
        *("--dump-dom", frame.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not logged, logged
    (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    seen = json.loads(html.unescape(found))
    assert "error" not in seen, seen
    assert seen["width"] == [width, width], "the page scrolls sideways"
    assert not seen["outside"] and not seen["overlap"] and not seen["empty"], seen
    return seen


def hybrid(folder, steps=200, layers=24, **changes):
    """A run with everything on its page, long names and NaN included."""
    records = [started(training__max_steps=steps, **changes)]
    for record in trained(1, steps, loss=lambda s: 2 + 8 * math.exp(-s / steps)):
        step = record["step"]
        if step == steps // 2:
            record |= {"loss": math.nan, "skipped": True}
        records.append(record)
        if step % 10 == 0:
            gates = {n: [0.1 * k for k in range(layers)] for n in ("gates_closed", "gates_open")}
            depth = [1 + k / 8 for k in range(layers)]
            records += [rate(step, 1e5 + step), {"step": step, "depth_mean": depth, **gates}]
        if step % 50 == 0:
            by_layer = {
                name: [sign * (k + 1) * step / 1e6 for k in range(layers)]
                for name, sign in (("dt_mean", 1), ("dt_max", 1), ("A_min", -1), ("A_max", -1))
            }
            records.append(evaluated(step, 10 - step / 50, **by_layer))
            records.append({"step": step, "prompt": "<b>", "sample": "x" * 500})
            records.append({"step": step, "warning": "/a/very/long/path" * 20})
    return read_run(write(folder, records))


@pytest.mark.parametrize("width", [360, 1280])
def test_a_runs_page(width, tmp_path):
    doing = """
    seen.loss = point('loss', 0.6);
    seen.layers = point('depth', 0.5);
    seen.unlogged = [...document.querySelectorAll('.log[hidden]')].map(b => b.closest('figure').id);
    seen.marks = [document.querySelectorAll('#chart-loss .gap').length,
      document.querySelectorAll('#chart-loss .skipped').length];
    const linear = path('learning_rate');
    press('#chart-learning_rate .log');
    seen.log = linear !== path('learning_rate');
    press('[data-part="0.1"]');
    seen.last_tenth = labels('learning_rate').map(Number);
    """
    run = hybrid(tmp_path / "run")
    seen = look(render(run), tmp_path, width=width, doing=doing)
    assert seen["unlogged"] == ["chart-A_min", "chart-A_max"]  # below 0
    assert seen["drawn"] == 15 and seen["log"] and seen["marks"] == [1, 1]
    # What the pointer reads is what was recorded at the step that it names.
    (step,) = map(int, re.findall(r"^step (\d+)", seen["loss"]))
    assert 90 < step < 140
    (shown,) = re.findall(r"training ([\d.]+)", seen["loss"])
    (recorded,) = [r["loss"] for r in run.records if r["step"] == step and "loss" in r]
    assert float(shown) == pytest.approx(recorded, rel=1e-4)
    assert re.findall(r"layer (\d+) ([\d.]+)", seen["layers"]) == [
        (str(k), f"{1 + k / 8:.5g}") for k in range(24)
    ]
    assert min(seen["last_tenth"]) >= 180 and max(seen["last_tenth"]) == 200


AXIS = """
const axis = key => [...document.querySelectorAll(`#chart-${key} .y`)]
  .map(y => Number(y.textContent));
const above = () => document.querySelector('#chart-loss .above')?.firstChild.textContent ?? null;
seen.axis = axis('loss');
seen.above = above();
press('[data-part="0.5"]');
seen.half = [axis('loss'), above()];
press('[data-part="1"]');
press('#chart-loss .log');
seen.log = [axis('loss'), above()];
"""


def test_a_spike_does_not_set_the_range_of_the_loss_axis(tmp_path):
    """The quick start's own: it falls from 10.9 to 4.6, and one step is at 21 nats."""
    loss = lambda s: 21.05 if s == 40 else 3 + 7.9 * math.exp(-s / 20)
    folder = write(tmp_path / "a", [started(training__max_steps=200), *trained(1, 200, loss)])
    seen = look(render(read_run(folder)), tmp_path, doing=AXIS)
    assert seen["above"] == "▲ 21.05 at step 40"
    assert 9 <= max(seen["axis"]) <= 11  # the loss at the start is on it
    assert max(seen["half"][0]) < 4 and seen["half"][1] is None
    assert max(seen["log"][0]) >= 20 and seen["log"][1] is None
    usual = lambda s: 3 + 7.9 * math.exp(-s / 20) + (s % 5) / 10
    folder = write(tmp_path / "b", [started(training__max_steps=200), *trained(1, 200, usual)])
    assert look(render(read_run(folder)), tmp_path, doing=AXIS)["above"] is None


def test_a_sweeps_page(tmp_path):
    """Its axes fit a phone, and labels do not overlap."""
    rows = [
        SweepRow(f"rate={rate},kind={kind}", {"rate": rate, "kind": kind, "n": 10 * n}, "done", "",
            {"eval_loss": 3 + n + rate * 10}, n % 2 == 0)
        for rate in (1e-4, 1.1e-4, 3e-4, 1e-3)
        for n, kind in enumerate(("none", "a long name of a kind " * 3, "full", "dots"))
    ]  # fmt: skip
    doing = """
    const box = document.querySelector('.parallel').getBoundingClientRect();
    const labels = [...document.querySelectorAll('.parallel span, .parallel b')];
    seen.cut = labels.filter(label => { const b = label.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1; }).map(label => label.textContent);
    seen.covered = labels.flatMap(one => labels.filter(other => {
      const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
      return one !== other && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1
        && b.top < a.bottom - 1; }).map(other => [one.textContent, other.textContent]));
    seen.labels = labels.map(label => label.textContent);
    seen.lines = [...document.querySelectorAll('polyline')].filter(line => {
      const b = line.getBoundingClientRect();
      return b.left >= box.left - 3 && b.right <= box.right + 3; }).length;
    """
    for width in (360, 1280):
        page = sweep_page.render(rows, "eval_loss", "kinds")
        seen = look(page, tmp_path, width=width, doing=doing)
        assert not seen["cut"] and not seen["covered"] and seen["lines"] == 16, seen
        for label in (
            "rate",
            "kind",
            "n",
            "eval_loss (lower is better)",
            "0.0001",
            "0.001",
            "full",
        ):
            assert label in seen["labels"]


def test_a_comparison_has_all_results_on_a_phone(tmp_path):
    runs = [hybrid(tmp_path / f"warmup_of_2000_steps_{name}", steps=50) for name in "abcd"]
    doing = """
    seen.cut = [...document.querySelectorAll('.compared td')].filter(cell => {
      const box = cell.getBoundingClientRect();
      return box.right > innerWidth || !box.width; }).length;
    seen.first = document.querySelector('[data-row="eval_loss"]').getBoundingClientRect().bottom;
    """
    seen = look(render_comparison(Comparison(runs)), tmp_path, doing=doing)
    assert seen["cut"] == 0 and seen["first"] < 640  # the first screen of a phone


def test_a_comparison(tmp_path):
    doing = """
    seen.steps = labels('train_loss');
    seen.loss = point('eval_loss', 0.99);
    seen.between = point('eval_loss', 0.62);
    press('[data-axis="tokens"]');
    seen.tokens = point('train_loss', 0.99);
    press('#chart-train_loss .legend button');
    seen.pressed = document.querySelector('#chart-train_loss .legend button').ariaPressed;
    seen.curves = document.querySelectorAll('#chart-train_loss .curve').length;
    """
    wide = {"vram__effective_batch_size": 16, "vram__batch_size": 16}
    runs = [
        hybrid(tmp_path / "a" / ("long_name_of_a_run_" * 4), steps=200),
        hybrid(tmp_path / "b", steps=100, **wide),
        hybrid(tmp_path / "c" / "b", steps=100, training__learning_rate=0.125),
    ]
    seen = look(render_comparison(Comparison(runs)), tmp_path, doing=doing)
    assert seen["steps"][-1] == "200"
    assert "160,000 tokens" in seen["tokens"]  # 200 × 8 × 100; and 100 × 16 × 100
    assert "step 200" in seen["loss"] and " 6" in seen["loss"]
    assert "/b" not in seen["loss"]  # these runs ended long before
    assert "step 100" in seen["between"] and seen["between"].count("b 8") == 2  # 10 − 100 / 50
    assert seen["pressed"] == "false" and seen["curves"] == 2  # of three


def test_an_empty_page(tmp_path):
    seen = look(render(read_run(write(tmp_path / "run", [started()]))), tmp_path)
    assert seen["drawn"] == 0


def test_runs_with_one_step_or_no_finite_value(tmp_path):
    one = read_run(write(tmp_path / "one", [started(), *trained(1, 1)]))
    assert look(render(one), tmp_path)["drawn"] == 3
    none = trained(1, 3, loss=lambda s: math.nan)
    seen = look(render(read_run(write(tmp_path / "none", [started(), *none]))), tmp_path)
    assert seen["drawn"] == 3


def test_dark_is_the_viewers_preference(tmp_path):
    text = render(hybrid(tmp_path / "run", steps=20, layers=2))
    doing = "seen.paper = getComputedStyle(document.body).backgroundColor;"
    light = look(text, tmp_path, doing=doing)["paper"]
    dark = look(text, tmp_path, "--force-dark-mode", doing=doing)["paper"]
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
