"""The generate command on a real, tiny checkpoint."""

import dataclasses
import io
import pathlib
import runpy
import signal

import jax
import jax.numpy as jnp
import pytest

import mamba_jax.generation
from mamba_jax import generate
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.data.tokenizers import json_tokenizer
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.generation import generate_text
from mamba_jax.generation.chat import STOP
from tests.support.small_tokenizers import byte_level
from tests.support.tiny import MAMBA, params_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

CONFIG = RunConfig(
    name="tiny",
    model=dataclasses.replace(MAMBA, vocab_size=257, tie_embeddings=False),
    data=DataConfig(tokenizer="bytes"),
)
SETTINGS = {"max_tokens": 9, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def params():
    return jax.jit(params_of, static_argnums=0)(CONFIG.model)


@pytest.fixture(scope="module")
def run_dir(params, tmp_path_factory):
    """A run with the same weights at every checkpoint but step 1."""
    folder = tmp_path_factory.mktemp("run")
    with CheckpointWriter(folder, keep_last=3, keep_every=0, log=print) as writer:
        for name, step in (("step_1", 1), ("step_2", 2), ("final", 2)):
            weights = jax.tree.map(jnp.zeros_like, params) if step == 1 else params
            state = {"params": weights, "step": jnp.int32(step)}
            writer.save(name, state, Metadata(CONFIG, step, 0, "none"))
    return folder


@pytest.fixture(scope="module")
def expected(params):
    def text_of(*prompts, **more):
        tokenizer = load_tokenizer("bytes")
        return generate_text(params, CONFIG.model, tokenizer, prompts, **SETTINGS, **more)

    return text_of


@pytest.mark.parametrize("place", ["step_2", "final", ""])
def test_prompt_and_text_from_any_kind_of_folder(place, run_dir, expected, capsys):
    assert generate.main(["--checkpoint", str(run_dir / place), "--prompt=def ", *FLAGS]) == 0
    output = capsys.readouterr()
    assert output.out == "def " + expected("def ")[0] + "\n"
    assert "tiny, step 2" in output.err


def test_the_named_step_generates(run_dir, expected, capsys):
    assert generate.main(["--checkpoint", str(run_dir / "step_1"), "--prompt=def ", *FLAGS]) == 0
    output = capsys.readouterr()
    assert "tiny, step 1" in output.err
    assert output.out != "def " + expected("def ")[0] + "\n"


def test_the_newest_may_be_damaged(run_dir, expected, capsys, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "step_2").symlink_to(run_dir / "step_2")
    broken = copy / "step_3"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert generate.main(["--checkpoint", str(copy), "--prompt=def ", *FLAGS]) == 0
    output = capsys.readouterr()
    assert output.out == "def " + expected("def ")[0] + "\n"
    assert "step_3" in output.err


def test_a_suffix_needs_a_model_trained_with_it(run_dir, params, tmp_path, capsys):
    arguments = ["--prompt=def ", "--suffix=return", *FLAGS]
    assert generate.main(["--checkpoint", str(run_dir), *arguments]) == 2
    assert "trained without data.fim_rate" in capsys.readouterr().err
    model = dataclasses.replace(CONFIG.model, vocab_size=260)
    config = dataclasses.replace(
        CONFIG, model=model, data=dataclasses.replace(CONFIG.data, fim_rate=0.5)
    )
    with CheckpointWriter(tmp_path, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": params, "step": jnp.int32(1)}
        writer.save("final", state, Metadata(config, 1, 0, "none"))
    assert generate.main(["--checkpoint", str(tmp_path), *arguments]) == 0
    tokenizer = load_tokenizer("bytes")
    (text,) = generate_text(params, model, tokenizer, ["def "], **SETTINGS, suffix="return")
    assert capsys.readouterr().out.endswith("def " + text + "return\n")


def test_the_checkpoint_carries_its_tokenizer(params, tmp_path, capsys):
    """The folder of the tokenizer that it was trained with no longer exists."""
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    tokenizer = json_tokenizer.from_file(str(file), file)
    model = dataclasses.replace(CONFIG.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(CONFIG, model=model, data=DataConfig(tokenizer=str(file)))
    state = {"params": jax.jit(params_of, static_argnums=0)(model), "step": jnp.int32(1)}
    run = tmp_path / "run"
    run.mkdir()
    files = tokenizer.files
    with CheckpointWriter(run, keep_last=1, keep_every=0, log=print, files=files) as writer:
        writer.save("final", state, Metadata(config, 1, 0, "none"))
    file.unlink()
    assert generate.main(["--checkpoint", str(run), "--prompt=def ", *FLAGS]) == 0
    (text,) = generate_text(state["params"], model, tokenizer, ["def "], **SETTINGS)
    assert capsys.readouterr().out.endswith("def " + text + "\n")


@pytest.mark.parametrize("source", ["file", "dash", "pipe"])
def test_one_prompt_per_line(source, run_dir, expected, capsys, tmp_path, monkeypatch):
    lines = "a b\n\nimport\né\n"
    flags = {"file": [f"--prompt_file={tmp_path / 'p.txt'}"], "dash": ["--prompt_file=-"]}
    (tmp_path / "p.txt").write_text(lines, "utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(lines if source != "file" else ""))
    arguments = ["--checkpoint", str(run_dir), *flags.get(source, []), "--batch_size=2", *FLAGS]
    assert generate.main(arguments) == 0
    texts = expected("a b", "import", "é")
    assert capsys.readouterr().out == "\n".join(
        f"==> {i + 1} of 3 <==\n{prompt}{text}\n"
        for i, (prompt, text) in enumerate(zip(["a b", "import", "é"], texts, strict=True))
    )


def test_rows_print_in_order_and_the_first_unfinished_one_streams(capsys):
    printer = generate.InOrder(["A", "B"])
    printer(1, "one ")
    assert capsys.readouterr().out == "==> 1 of 2 <==\nA"
    printer(0, "zero")
    assert capsys.readouterr().out == "zero"
    printer(1, "ends")
    printer(1, None)
    assert capsys.readouterr().out == ""
    printer(0, None)
    assert capsys.readouterr().out == "\n\n==> 2 of 2 <==\nBone ends\n"


def test_ctrl_c_keeps_what_was_printed(run_dir, capsys, monkeypatch):
    def interrupted(*_, on_text, **__):
        on_text(0, "some text")
        raise KeyboardInterrupt

    monkeypatch.setattr(mamba_jax.generation, "generate_text", interrupted)
    assert generate.main(["--checkpoint", str(run_dir), "--prompt=def "]) == 130
    output = capsys.readouterr()
    assert output.out == "def some text\n" and "Traceback" not in output.err


def test_an_ensemble_of_a_model_with_itself_gives_its_text(run_dir, expected, capsys):
    ensemble = ["--ensemble", str(run_dir), str(run_dir / "step_2")]
    assert generate.main([*ensemble, "--prompt=def ", *FLAGS]) == 0
    output = capsys.readouterr()
    assert output.out == "def " + expected("def ")[0] + "\n"
    assert output.err.count("tiny, step 2") == 2


def test_an_ensemble_needs_one_tokenizer(run_dir, capsys, monkeypatch):
    tokenizers = iter([load_tokenizer("bytes"), load_tokenizer("gpt2")])
    monkeypatch.setattr("mamba_jax.generation.load.load_saved", lambda *_: next(tokenizers))
    ensemble = ["--ensemble", str(run_dir), str(run_dir / "step_2")]
    assert generate.main([*ensemble, "--prompt=def "]) == 2
    assert "error: the models of an ensemble need the same tokenizer" in capsys.readouterr().err


def test_the_text_ends_before_a_stop(run_dir, expected, capsys):
    (free,) = expected("def ")
    stops = [f"--stop={free[5:7]}", f"--stop={free[4:6]}"]
    assert generate.main([f"--checkpoint={run_dir}", "--prompt=def ", *stops, *FLAGS]) == 0
    end = min(free.find(free[5:7]), free.find(free[4:6]))
    assert capsys.readouterr().out == f"def {free[:end]}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [(r"\n\nuser:", "\n\nuser:"), (r"a\tb\r", "a\tb\r"), (r"\\n \d é", "\\n \\d é")],
)
def test_escapes_in_a_stop(given, meant):
    assert generate.parse(["--checkpoint=a", f"--stop={given}"]).stop == [meant]


def test_the_guides_command_generates(run_dir, expected, capsys, monkeypatch):
    arguments = ["inference.py", f"--checkpoint={run_dir}", "--prompt=def ", *FLAGS]
    monkeypatch.setattr("sys.argv", arguments)
    script = pathlib.Path(__file__).parents[2] / "launch/inference.py"
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "def " + expected("def ")[0] + "\n"


# --- --chat ---------------------------------------------------------------------------------------


class Speaker:
    """A conversation with fixed pieces, one of which may be a Ctrl-C."""

    def __init__(self, *pieces):
        self._pieces = pieces
        self.heard = []

    def say(self, text):
        self.heard.append(text)
        for piece in self._pieces:
            if piece == "^C":
                signal.raise_signal(signal.SIGINT)
            else:
                yield piece

    def reset(self):
        self.heard.append(None)


def test_a_chat_over_a_pipe(run_dir, expected, capsys, monkeypatch):
    lines = "hi\n\n  \n/reset\n hi \n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert generate.main([f"--checkpoint={run_dir}", "--chat", *FLAGS]) == 0
    (text,) = expected("user: hi\n\nassistant:", stops=[STOP])
    output = capsys.readouterr()
    assert output.out == f"{text.removeprefix(' ')}\n" * 2
    assert "user: " not in output.err


def test_a_chat_ends_with_its_input_and_asks_a_terminal(capsys, monkeypatch):
    terminal = io.StringIO("one\n/reset\n/path is text\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    generate.chat(speaker := Speaker("It is", " 2."))
    assert speaker.heard == ["one", None, "/path is text"]
    output = capsys.readouterr()
    assert output.out == "It is 2.\nIt is 2.\n"
    assert output.err == "user: assistant: user: user: assistant: user: \n"


def test_ctrl_c_ends_an_answer_and_a_second_one_the_chat(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    generate.chat(speaker := Speaker("one ", "^C", "two ", "three"))
    assert speaker.heard == ["a", "b"]
    assert capsys.readouterr().out == "one two \none two \n"
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    with pytest.raises(KeyboardInterrupt):
        generate.chat(Speaker("one ", "^C", "^C", "two"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_ends_with_130(run_dir, monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert generate.main([f"--checkpoint={run_dir}", "--chat"]) == 130


def test_a_chat_in_another_encoding_is_one_line(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert generate.main([f"--checkpoint={run_dir}", "--chat"]) == 2
    assert capsys.readouterr().err.endswith(
        "standard input is not utf-8 text: invalid start byte\n"
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt=a", "--checkpoint=nowhere"], "nowhere does not exist"),
        (["--prompt=a", "--temperature=-1"], "temperature=-1.0"),
        (["--prompt=a", "--top_p=0"], "top_p=0.0"),
        (["--prompt=a", "--top_p=1.5"], "top_p=1.5"),
        (["--prompt=a", "--top_k=-2"], "top_k=-2"),
        (["--prompt=a", "--max_tokens=0"], "max_tokens=0"),
        (["--prompt=a", "--batch_size=0"], "batch_size=0"),
        (["--prompt=a", "--head=int4"], "unknown head=int4: choose one of exact, int8"),
        (["--prompt=a", "--stop="], '--stop "" would end'),
        (["--prompt=a", "--system=b"], "--system needs --chat"),
        (["--chat", "--prompt=a"], "leave --prompt out"),
        (["--chat", "--prompt_file=-"], "leave --prompt_file out"),
        (["--chat", "--suffix=a"], "leave --suffix out"),
        (["--prompt_file=missing.txt"], "prompt file missing.txt: No such file"),
        (["--prompt_file=EMPTY"], "contains no prompt; write one prompt per line"),
        (["--prompt_file=BINARY"], "not UTF-8"),
        (["--prompt_file=-"], "standard input contains no prompt"),
    ],
)
def test_mistakes_are_one_line(flags, named, run_dir, capsys, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\xff")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert generate.main([f"--checkpoint={run_dir}", *flags]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert named in output.err


def test_without_a_prompt_a_terminal_gets_an_error_that_names_the_flags(
    run_dir, capsys, monkeypatch
):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert generate.main([f"--checkpoint={run_dir}"]) == 2
    assert "give --prompt TEXT" in capsys.readouterr().err
