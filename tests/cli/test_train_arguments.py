"""From the command line to a config: defaults, precedence, one line for mistakes."""

import dataclasses
import json
import pathlib

import pytest

from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.cli.train_arguments import read
from mamba_jax.config import RunConfig, presets, size_fields, to_dict, training_fields
from mamba_jax.errors import UserError

PYTHON = """
from mamba_jax.config import default_config

def get_config():
    config = default_config()
    config.name = "mine"
    config.model.d_model = 96
    config.training.update(max_steps=450, learning_rate=3e-3)
    return config
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PYTHON)
    return tmp_path


def config_of(*argv: str) -> RunConfig:
    return read(list(argv)).config


def value(config: RunConfig, field: str):
    for part in field.split("."):
        config = getattr(config, part)
    return config


def write_json(**values) -> str:
    pathlib.Path("custom.json").write_text(json.dumps(values))
    return "--config=custom.json"


def test_defaults_are_those_of_the_guide():
    config = config_of()
    assert to_dict(config) == to_dict(config_of("--model_size", "medium"))
    assert (config.name, config.output_dir, config.seed) == ("medium", "checkpoints", 42)
    assert (config.model.d_model, config.model.n_layers) == (768, 12)
    assert config.training.max_steps == 100_000 and config.training.learning_rate == 3e-4
    vram = config.vram
    assert (vram.memory_gb, vram.auto, vram.safety_margin_mb) == (16.0, False, 2048)
    assert (config.data.dataset, config.data.dataset_split) == ("", "train")


@pytest.mark.parametrize("size", presets.SIZES)
@pytest.mark.parametrize("preset", presets.TRAINING_PRESETS)
def test_a_size_and_a_preset_set_their_rows_and_nothing_else(size, preset):
    config, row = (
        config_of("--model_size", size, f"--training_preset={preset}"),
        presets.SIZES[size],
    )
    assert (
        dataclasses.asdict(config.training).items()
        >= dataclasses.asdict(presets.TRAINING_PRESETS[preset]).items()
    )
    model = config.model
    assert (model.family, model.d_model, model.n_layers) == (row.family, row.d_model, row.n_layers)
    assert row.family == "mamba" or model.recursion_depth == row.depth
    expected = to_dict(RunConfig(name=size))
    for group, fields in (size_fields(size) | training_fields(preset)).items():
        expected[group] |= fields
    assert to_dict(config) == expected


# Each chain from the lowest to the highest precedence; each step adds one argument.
CHAINS = {
    "model.d_model": (
        (768, None),
        (384, "--model_size=small"),
        (512, {"model": {"d_model": 512}}),
        (640, "--config.model.d_model=640"),
    ),
    "training.learning_rate": (
        (3e-4, None),
        (5e-4, "--training_preset=fast"),
        (1e-3, {"training": {"learning_rate": 1e-3}}),
        (2e-3, "--config.training.learning_rate=2e-3"),
    ),
    "seed": ((42, None), (7, {"seed": 7}), (8, "--seed=8"), (9, "--config.seed=9")),
    "vram.memory_gb": (
        (16, None),
        (24, {"vram": {"memory_gb": 24}}),
        (32, "--vram=32"),
        (48, "--config.vram.memory_gb=48"),
    ),
    "vram.auto": (
        (False, None),
        (True, {"vram": {"auto": True}}),
        (False, "--vram=16"),  # gives the amount instead of detecting it
        (True, "--vram_auto"),
        (False, "--config.vram.auto=false"),
    ),
    "data.data_dir": (
        ("", None),
        ("a", {"data": {"data_dir": "a"}}),
        ("b", "--data_dir=b"),
        ("c", "--config.data.data_dir=c"),
    ),
}


@pytest.mark.parametrize("field", CHAINS)
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "order reversed"])
def test_precedence(field, backwards):
    argv = []
    for expected, layer in CHAINS[field]:
        if layer is not None:
            argv.append(write_json(**layer) if isinstance(layer, dict) else layer)
        # The order of the arguments has no effect.
        assert value(config_of(*(argv[::-1] if backwards else argv)), field) == expected


def test_sizes_and_presets_set_different_fields():
    groups = [set(size_fields(size)) for size in presets.SIZES]
    assert not set.union(*groups) & set(training_fields("fast"))


# --- config files ---------------------------------------------------------------------------------


def test_a_python_file_is_a_whole_config():
    arguments = read(["--config=mine.py"])
    assert not arguments.notes
    config = arguments.config
    assert (config.name, config.model.d_model, config.training.max_steps) == ("mine", 96, 450)


def test_a_size_or_preset_overrides_a_python_file_and_logs_it():
    arguments = read(["--config=mine.py", "--training_preset=fast"])
    assert arguments.config.training.max_steps == 50_000 and arguments.config.model.d_model == 96
    (note,) = arguments.notes
    assert note.startswith("--training_preset fast overrides mine.py: ")
    assert "training.max_steps 450 → 50000" in note and "training.learning_rate 0.003 → " in note
    assert "gradient_clip" not in note  # the same in both

    arguments = read(["--config=mine.py", "--model_size=small", "--config.training.max_steps=3"])
    assert arguments.config.model.d_model == 384 and arguments.config.training.max_steps == 3
    assert "model.d_model 96 → 384" in arguments.notes[0]


def test_a_json_file_changes_what_it_names_and_gives_its_name():
    path = write_json(
        model={"d_model": 64, "attention_scales": [1, 2]}, training={"max_steps": 2e3}
    )
    config = config_of(path, "--model_size=hybrid-large")
    assert config.name == "custom"
    assert (config.model.d_model, config.model.n_layers) == (64, 16)
    assert config.model.attention_scales == (1, 2) and config.training.max_steps == 2_000
    assert config_of(write_json(name="other")).name == "other"


BAD_JSON = {
    '{"model": {"expand": 2}}': 'unknown config field "model.expand"; did you mean "model.expand_',
    '{"modle": {"d_model": 2}}': 'unknown config field "modle"',
    '{"model": {"learning_rate": 1}}': 'did you mean "training.learning_rate"?',
    '{"model": {"d_model": "wide"}}': "model.d_model='wide' is not a whole number",
    '{"model": {"d_model": 2.5}}': "model.d_model=2.5 is not a whole number",
    '{"model": {"d_model": 4, "d_model": 8}}': '"d_model" is given twice',
    '{"model": 3}': "config group model must contain fields, not 3",
    '{"model": {"d_model": 2},}': "is not JSON: ",
    "[1]": 'must contain an object with groups such as "model", not [1]',
    '{"training": {"learning_rate": NaN}}': "training.learning_rate=nan must be greater than 0",
    '{"vram": {"batch_size": 5}}': "vram.effective_batch_size=32 is not batch_size=5",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_mistakes_in_json_are_named(text):
    pathlib.Path("bad.json").write_text(text)
    with pytest.raises(UserError) as error:
        read(["--config", "bad.json"])
    assert BAD_JSON[text] in str(error.value) and "\n" not in str(error.value)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [("16gb", 16), ("24", 24), ("20.5", 20.5), ("16GB", 16), ("16384mb", 16), ("8 GiB", 8),
     ("12g", 12), (".5gb", 0.5), ("15.5", 15.5)],
)  # fmt: skip
def test_amounts_of_memory(text, gigabytes):
    config = config_of("--vram", text, "--vram_safety_margin=100")
    assert config.vram.memory_gb == gigabytes and config.vram.safety_margin_mb == 100


BAD = {
    "--plan=M*2,X": 'model.plan="M*2,X", position 5: "X" is not a kind of layer; use M (Mamba',
    "--plan=M*2,A": 'model.plan="M*2,A" has 3 layers, model.n_layers=12; give --config.model.n_la',
    "--vram=banana": "--vram=banana is not an amount of memory; give GB such as 16gb",
    "--vram=-4": "--vram=-4 is not an amount of memory",
    "--vram=0": "--vram=0 is not an amount of memory",
    "--vram=16tb": "--vram=16tb is not",
    "--vram=nan": "--vram=nan is not",
    "--vram=": "--vram= is not",
    "--vram_safety_margin=-1": "vram.safety_margin_mb=-1 must not be negative",
    "--config.model.dropout=1": "model.dropout=1.0 must be at least 0 and below 1",
    "--config.data.fim_rate=1.5": "data.fim_rate=1.5 must be between 0 and 1",
    "--config.data.mixture=texts": "data.mixture='texts' is not a list of groups of fields",
    "--vram_safety_margin=2gb": "--vram_safety_margin='2gb' is not a whole number",
    "--vram_safety_margin=16384": "vram.safety_margin_mb=16384 leaves nothing of vram.memory_gb=16",
    "--model_size=hybrid-smal": 'unknown model size "hybrid-smal"; did you mean "hybrid-small"?',
    "--training_preset=quick": 'unknown training preset "quick"',
    "--seed=one": "--seed='one' is not a whole number",
    "--model-size=small": 'unknown flag --model-size; did you mean "--model_size"?',
    "--datasets=x": 'unknown flag --datasets; did you mean "--dataset"?',
    "--text_column=a": 'data.text_column="a" has no effect without a data.dataset',
    "--dataset_split=test": 'data.dataset_split="test" has no effect without a data.dataset',
    "--output_dir=": "output_dir must not be empty",
    "--config=mine.yaml": 'config file mine.yaml does not exist; did you mean "mine.py"?',
    "--config=mine.toml": "config file mine.toml does not exist",
}


@pytest.mark.parametrize("argument", BAD)
def test_mistakes_are_one_line_that_names_them(argument):
    with pytest.raises(UserError) as error:
        read([argument])
    assert BAD[argument] in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_kind_is_refused():
    pathlib.Path("config.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"neither a \.py file .* nor \.json"):
        read(["--config=config.yaml"])


# --- settings of a checkpoint ---------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> pathlib.Path:
    """The checkpoint of a hybrid that detected its memory."""
    folder = pathlib.Path("runs/first/step_50")
    folder.mkdir(parents=True)
    config = config_of(
        *("--model_size=hybrid-small", "--vram_auto", "--seed=7", "--output_dir=runs/first"),
        "--config.training.weight_decay=0.3",
    )
    model = dataclasses.replace(config.model, vocab_size=50257)
    config = dataclasses.replace(config, model=model)
    checkpoint_folder.write_metadata(folder, Metadata(config, 50, 1600, "these data"))
    checkpoint_folder.write_manifest(folder)
    return folder


def test_a_resumed_run_has_the_checkpoints_settings_and_those_given(checkpoint):
    saved = checkpoint_folder.read_metadata(checkpoint).config
    assert to_dict(config_of("--resume", str(checkpoint))) == to_dict(saved)
    arguments = read(
        ["--resume", str(checkpoint), "--training_preset", "careful", "--output_dir", "other"]
    )
    assert arguments.resume == str(checkpoint) and not arguments.notes
    careful = dataclasses.asdict(presets.TRAINING_PRESETS["careful"])
    expected = dataclasses.replace(
        saved, output_dir="other", training=dataclasses.replace(saved.training, **careful)
    )
    assert to_dict(arguments.config) == to_dict(expected)
    # A JSON file changes its fields, as beside a size.
    changed = config_of("--resume", str(checkpoint), write_json(training={"max_steps": 60}))
    assert changed.training.max_steps == 60 and changed.model == saved.model
    assert changed.name == saved.name


def test_a_moved_run_resumes_in_its_new_folder(checkpoint):
    checkpoint.parent.rename("moved")
    assert config_of("--resume=moved/step_50").output_dir == "moved"
    assert config_of("--resume=moved").seed == 7


def test_auto_continues_with_what_is_in_output_dir(checkpoint):
    saved = checkpoint_folder.read_metadata(checkpoint).config
    assert to_dict(config_of("--resume=auto", "--output_dir=runs/first")) == to_dict(saved)
    fresh = config_of("--resume=auto", "--output_dir=runs/second")
    assert (fresh.name, fresh.output_dir) == ("medium", "runs/second")
    # A .py file is whole there too.
    assert config_of("--resume=auto", "--output_dir=runs/first", "--config=mine.py").name == "mine"


def test_memory_given_with_a_checkpoint_is_not_detected_again(checkpoint):
    vram = config_of("--resume", str(checkpoint), "--vram=8gb").vram
    assert (vram.memory_gb, vram.auto) == (8.0, False)


# --- help -----------------------------------------------------------------------------------------


def test_help_shows_flags_sizes_presets_and_precedence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        read(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        *("--vram_auto", "--vram", "--vram_safety_margin", "--model_size", "--training_preset"),
        *("--data_dir", "--dataset", "--dataset_split", "--text_column", "--output_dir"),
        *("--config", "--resume", "--seed", "--dry_run", "--profile"),
    ):
        assert f"  {flag} " in text or f"  {flag}\n" in text, flag
    for size in presets.SIZES.values():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [size.name]]
        assert f"{size.parameters / 1e6:.1f}M" in line.split() and size.nominal in line.split()
    for name, row in presets.TRAINING_PRESETS.items():
        rows = [line for line in text.splitlines() if len(line.split()) == 5]
        (line,) = [line for line in rows if line.split()[0] == name]
        assert f"{row.max_steps:,}" in line and f"{row.save_steps:,}" in line
    assert "built-in < --model_size < --training_preset < --config FILE < other flags <" in text
    assert max(map(len, text.splitlines())) <= 100
