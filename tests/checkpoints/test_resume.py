"""What a run resumes and what it refuses; all of it decided from files, before any array."""

import dataclasses
import pathlib

import pytest

from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints import resume
from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError


def config_for(output_dir: pathlib.Path, **model) -> RunConfig:
    base = RunConfig(output_dir=str(output_dir))
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model))


def put_checkpoint(folder: pathlib.Path, name: str, step: int) -> pathlib.Path:
    """A checkpoint without arrays: nothing here looks at them."""
    path = folder / name
    (path / "params").mkdir(parents=True)
    config = config_for(folder, vocab_size=257)
    checkpoint_folder.write_metadata(path, Metadata(config, step, 8 * step, "these data"))
    checkpoint_folder.write_manifest(path)
    return path


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
    for step in (2, 4):
        put_checkpoint(tmp_path / "run", f"step_{step}", step)
    return tmp_path / "run"


def start_of(config: RunConfig, what: str) -> tuple[pathlib.Path | None, list[str]]:
    output: list[str] = []
    start = resume.find_start(config, what, output.append)
    return (start.path if start else None), output


def test_auto_resumes_from_the_newest_or_starts_anew(run, tmp_path):
    path, output = start_of(config_for(run), "auto")
    assert path == run / "step_4" and output == [f"continuing from {path}: step 4"]
    path, output = start_of(config_for(tmp_path / "new"), "auto")
    assert path is None
    assert output == [f"no checkpoint in {tmp_path / 'new'} yet: starting from the beginning"]


def test_a_folder_means_a_checkpoint_or_the_newest_of_a_run(run, tmp_path):
    elsewhere = config_for(tmp_path / "other")
    assert start_of(elsewhere, str(run))[0] == run / "step_4"
    assert start_of(elsewhere, f"{run / 'step_2'}/")[0] == run / "step_2"


def test_a_checkpoint_can_be_given_as_a_link_or_as_the_current_folder(run, tmp_path, monkeypatch):
    for name in ("latest", "step_9"):  # its name says nothing
        (tmp_path / name).symlink_to(run / "step_2")
        assert start_of(config_for(tmp_path / "other"), str(tmp_path / name))[0] == run / "step_2"
    monkeypatch.chdir(run / "step_2")
    for name in (".", "./", "../step_2"):
        path, output = start_of(config_for(tmp_path / "other"), name)
        assert path is not None and path.samefile(run / "step_2"), output
    monkeypatch.chdir(run / "step_2/params")
    assert start_of(config_for(run), "..")[0] == run / "step_2"
    monkeypatch.chdir(run)
    assert start_of(config_for(run), ".")[0].samefile(run / "step_4")
    (tmp_path / "link").symlink_to(run)
    assert start_of(config_for(run), str(tmp_path / "link"))[0].samefile(run / "step_4")
    (run / "step_4/config.json").write_text("{}")
    (tmp_path / "damaged").symlink_to(run / "step_4")
    assert start_of(config_for(run), str(tmp_path / "damaged"))[0] == run / "step_2"


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(run):
    (run / "step_4/config.json").write_text("{}")
    for what in ("auto", str(run / "step_4")):
        path, output = start_of(config_for(run), what)
        assert path == run / "step_2"
        assert output[0] == (
            f"skipped: checkpoint {run / 'step_4'} is damaged: config.json does not match its hash"
        )
    (run / "step_2/MANIFEST.json").unlink()
    with pytest.raises(UserError, match=r"step_2 is incomplete.*no intact one before it"):
        start_of(config_for(run), str(run / "step_2"))
    with pytest.raises(UserError, match="holds no intact checkpoint; remove the damaged ones"):
        start_of(config_for(run), "auto")


def test_changed_settings_are_logged(run):
    config = config_for(run, vocab_size=257)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, max_steps=7), log_dir="elsewhere"
    )
    _, output = start_of(config, "auto")
    assert output[1:] == ["changed since that checkpoint: training.max_steps 100000 → 7"]


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ({"d_model": 32}, "model.d_model 768 there, 32 here"),
        ({"family": "hybrid"}, "model.family mamba there, hybrid here"),
        (
            {"family": "hybrid", "plan": "(M,H)*6"},
            r"model.plan M\*12 there, \(M,H\)\*6 here",
        ),
        ({"vocab_size": 50257}, "model.vocab_size 257 there, 50257 here"),
        ({"d_model": 32, "n_layers": 3}, "d_model 768 there, 32 here; model.n_layers 12 there"),
    ],
)
def test_another_model_is_refused_and_the_fields_named(run, model, difference):
    with pytest.raises(UserError, match=f"step_4 does not match this model: .*{difference}"):
        start_of(config_for(run, **model), "auto")


def test_how_a_model_is_computed_may_change(run):
    how = {"remat": "full", "scan": "chunked", "dtype": "bfloat16", "dropout": 0.1}
    config = config_for(run, **how, gate_skip_threshold=0.1)
    assert start_of(config, "auto")[0] == run / "step_4"


def test_another_tokenizer_is_refused(run):
    start = resume.find_start(config_for(run), "auto", print)
    metadata = dataclasses.replace(start.metadata, tokenizer_identity="this one")
    start = dataclasses.replace(start, metadata=metadata)
    resume.check_same_tokenizer(start, "moved/tokenizer.json", "this one")
    with pytest.raises(UserError, match=r"data\.tokenizer gpt2 there, bytes here"):
        resume.check_same_tokenizer(start, "bytes", "another")
    with pytest.raises(UserError, match=r"data\.tokenizer gpt2 has changed since"):
        resume.check_same_tokenizer(start, "gpt2", "another")


def test_other_data_is_refused(run):
    start = resume.find_start(config_for(run), "auto", print)
    resume.check_same_data(start, "these data")
    with pytest.raises(
        UserError, match=r"trained on other data .fingerprint these data there, thos"
    ):
        resume.check_same_data(start, "those data")


def test_an_occupied_output_dir_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"already holds .*step_4.*--resume auto.*--output_dir"):
        start_of(config_for(run), "")
    other = put_checkpoint(tmp_path / "other", "step_1", 1)
    with pytest.raises(UserError, match=r"already holds checkpoints .*not of the one in .*other"):
        start_of(config_for(run), str(other))


def test_nothing_to_resume_from_is_refused(tmp_path):
    config = config_for(tmp_path / "run")
    with pytest.raises(UserError, match="missing: the folder does not exist"):
        start_of(config, str(tmp_path / "missing"))
    with pytest.raises(UserError, match="the folder holds no intact checkpoint"):
        start_of(config, str(tmp_path))


def test_later_checkpoints_are_set_aside_not_deleted(run):
    put_checkpoint(run, "final", 6)
    output: list[str] = []
    resume.set_newer_aside(run, 2, output.append)
    (aside,) = run.glob("superseded_*")
    assert sorted(path.name for path in aside.iterdir()) == ["final", "step_4"]
    assert start_of(config_for(run), "auto")[0] == run / "step_2"
    assert output == [f"moved later checkpoints (final, step_4) to {aside}"]


def test_the_end_is_the_final_of_this_folder_at_the_last_step(run):
    put_checkpoint(run, "final", 6)
    start = resume.find_start(config_for(run), "auto", print)

    def ends(max_steps: int, folder: pathlib.Path = run) -> bool:
        config = config_for(folder)
        training = dataclasses.replace(config.training, max_steps=max_steps)
        return start.ends(dataclasses.replace(config, training=training))

    assert ends(6) and not ends(7) and not ends(6, run.parent)
    assert not resume.find_start(config_for(run), str(run / "step_4"), print).ends(config_for(run))


def test_the_layout_stays_unless_something_that_it_depends_on_changed(tmp_path):
    requested = config_for(tmp_path, vocab_size=257)
    layout = {
        "model": {"remat": "dots"},
        "vram": {"batch_size": 4, "gradient_accumulation_steps": 8},
    }
    path = tmp_path / "step_2"
    path.mkdir()
    metadata = Metadata(requested, 2, 64, "these data", layout=layout, device="1 × card")
    checkpoint_folder.write_metadata(path, metadata)
    checkpoint_folder.write_manifest(path)
    start = resume.find_start(requested, "auto", print)

    def microbatch(config: RunConfig, device: str = "1 × card") -> int:
        return resume.laid_out_as_before(start, config, device).vram.batch_size

    kept = resume.laid_out_as_before(start, requested, "1 × card")
    assert (kept.vram.batch_size, kept.vram.accumulation_steps, kept.model.remat) == (4, 8, "dots")
    assert checkpoint_folder.layout_of(requested, kept) == layout
    other = dataclasses.replace(requested.training, max_steps=7)
    assert microbatch(dataclasses.replace(requested, training=other)) == 4
    assert microbatch(requested, "2 × card") == 0
    for field in ({"memory_gb": 8.0}, {"safety_margin_mb": 1}, {"effective_batch_size": 64}):
        assert (
            microbatch(
                dataclasses.replace(requested, vram=dataclasses.replace(requested.vram, **field))
            )
            == 0
        )
    assert microbatch(config_for(tmp_path, vocab_size=257, remat="full")) == 0
    mine = dataclasses.replace(requested.vram, batch_size=8)
    assert microbatch(dataclasses.replace(requested, vram=mine)) == 8
