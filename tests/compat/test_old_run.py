"""A run that an earlier version wrote: it still resumes, generates and reports.

``run_0`` holds step 2 and the metrics of four steps, written with checkpoint format 2 before the
package was laid out as it is now, on the corpus that ``write_corpus`` makes.
"""

import pathlib
import random
import shutil

import pytest

from mamba_jax import generate, report, train
from mamba_jax.checkpoints.folder import read_metadata
from mamba_jax.runs import metrics
from mamba_jax.runs.recorded import read_run
from tests.support.tiny_run import quick_compiles  # noqa: F401

OLD = pathlib.Path(__file__).with_name("run_0")
WORDS = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lamda", "mu", "nu", "xi"),
)


def write_corpus(folder):
    draw = random.Random(3)
    folder.mkdir()
    for i in range(300):
        text = " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(60 + i % 40))
        (folder / f"{i:03}.txt").write_text(text + "\n")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    shutil.copytree(OLD, "run")
    return tmp_path


def test_it_resumes_with_the_losses_of_then(place, card):
    write_corpus(place / "texts")
    assert train.main(["--resume=run/step_2", "--output_dir=new"]) == 0
    assert read_metadata(place / "new/final").step == 4
    then, now = (
        {
            record["step"]: record["loss"]
            for record in metrics.read(folder / metrics.NAME)
            if "loss" in record
        }
        for folder in (OLD, place / "new")
    )
    # The same data in the same order, weights and optimizer; sums in another order elsewhere.
    assert now.keys() == then.keys() and [now[3], now[4]] == pytest.approx([then[3], then[4]], 1e-4)


def test_it_generates(place, capsys):
    assert generate.main(["--checkpoint=run", "--prompt=alpha", "--max_tokens=3"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("alpha") and "small, step 2" in output.err


def test_it_is_reported(place, capsys):
    assert report.main(["run", "run"]) == 0
    page = (place / "run/report.html").read_text()
    assert "small" in page and "step_2" in page
    run = read_run(place / "run")
    assert (run.saved_step, run.parameters) == (2, 7_360)
    assert metrics.series(run.records, "eval_loss") == (
        [2, 4],
        [5.409399747848511, 5.252937078475952],
    )
