"""The command: what it prints, its exit status, and that the flags it suggests exist."""

import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys

import pytest

import mamba_jax
from mamba_jax import explain
from mamba_jax.cli import train_arguments
from mamba_jax.cli.main import COMMANDS
from mamba_jax.doctor import rules, text
from mamba_jax.runs import exit_status, metrics
from mamba_jax.runs.background import Record

from .synthetic import Plan, changed, from_records, records
from .test_rules import NOISY, PLAIN, SHOWN, case, ended_by, layer, warn

ESCAPE = re.compile(r"\033\[[\d;]*m")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def write(folder, lines) -> None:
    (folder / metrics.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_healthy_run(folder, capsys):
    write(folder, records())
    assert explain.main(["out"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("synthetic  (out)\ndone · step 2,000 of 2,000 · loss ")
    assert "No problems found.\nChecked, no problem found: end of the run, loss falls" in out
    assert "Too little" not in out and "new run" not in out


def test_a_short_run_says_what_it_could_not_judge(folder, capsys):
    write(folder, records(Plan(steps=60, max_steps=1_000)))
    assert explain.main(["out"]) == 0
    out = capsys.readouterr().out
    assert "step 60 of 1,000" in out
    assert "No problems found." in out
    assert re.search("\n  loss falls +needs 200 steps after the warm-up; the run has 0\n", out)


def test_a_finding(folder, capsys):
    write(folder, records(PLAIN, changed(dt_max=layer(2, 350.0)), NOISY))
    assert explain.main(["out"]) == 0
    out = capsys.readouterr().out
    assert "CRITICAL  The loss does not fall\n  seen  loss 10." in out
    assert "\n  why   The loss normally falls" in out
    assert "\n  do    Check the data" in out
    assert "\n          --data_dir PATH\n" in out
    assert out.index("CRITICAL") < out.index("WARNING  Δ runs away")
    assert out.count("Lower the learning rate") == 1 and "See above." in out
    assert "No problems found" not in out
    assert "Flags without a command are for a new run" in out
    assert "\033" not in out


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("row", SHOWN, ids=case)
def test_lines_fit_the_terminal(row, width, tmp_path):
    _, _, plan, faults, *_ = row
    run = from_records(tmp_path, records(plan, *faults))
    run = dataclasses.replace(run, folder=tmp_path.relative_to(tmp_path))
    page = text.render(run, rules.examine(run), text.TextPage(width, colours=True))
    longest = max(page.splitlines(), key=lambda line: len(ESCAPE.sub("", line)))
    # A flag cannot be broken; the longest has 49 characters behind 10 spaces.
    assert len(ESCAPE.sub("", longest)) <= max(width, 62), longest
    plain = text.render(run, rules.examine(run), text.TextPage(width))
    assert plain == ESCAPE.sub("", page), "colours move something"


@pytest.mark.parametrize("command", [False, True])
@pytest.mark.parametrize("row", SHOWN, ids=case)
def test_what_is_advised_exists(row, command, tmp_path, monkeypatch):
    """Every command of the project that a remedy gives is read by that command's own parser."""
    _, _, plan, faults, *_ = row
    monkeypatch.chdir(tmp_path)
    plan = dataclasses.replace(plan, max_steps=2 * plan.steps)
    run = from_records(tmp_path, records(plan, *faults))
    if command:  # there is a checkpoint to resume from
        for step in (1_000, 2_000):
            (tmp_path / f"step_{step}").mkdir()
            (tmp_path / f"step_{step}" / "MANIFEST.json").write_text("{}")
    for _, finding in rules.examine(run).findings:
        for remedy in finding.remedies:
            words = shlex.split(remedy.command)
            if not words or words[0] == "nvidia-smi":
                continue
            if words[0] == "mamba-jax":
                name, words = words[1], words[2:]
                assert name in COMMANDS
                if name != "train":
                    continue
                assert command and words[0] == "--resume"
                assert words[1] in (str(tmp_path), str(tmp_path / "step_1000"))
                words = words[2:]
            train_arguments.read(words)  # raises on an unknown flag or an invalid value


def test_json(folder, capsys):
    write(folder, records(PLAIN, warn(5, "the disk is full"), ended_by("OSError: gone")))
    assert explain.main(["out", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(f["rule"], f["severity"]) for f in result["findings"]] == [
        ("end of the run", "critical"),
        ("warnings", "note"),
    ]
    assert result["findings"][1]["evidence"] == ["step 5: the disk is full"]
    assert result["findings"][0]["remedies"][0].keys() == {"text", "command"}
    assert (result["run"], result["name"], result["step"]) == ("out", "synthetic", 2_000)
    names = {f["rule"] for f in result["findings"]} | set(result["in_order"])
    assert names | result["too_little_recorded"].keys() == set(rules.RULES)


@pytest.mark.parametrize(
    "made,message",
    [
        (lambda folder: folder.rmdir(), "out is not a folder; give the output_dir of a run"),
        (lambda folder: None, "out: metrics.jsonl is missing"),
        (lambda folder: (folder / metrics.NAME).touch(), "out: metrics.jsonl is empty or damaged"),
        (
            lambda folder: (folder / metrics.NAME).write_bytes(b"\xff\xfe not JSON"),
            "out: metrics.jsonl is empty or damaged",
        ),
    ],
)
def test_mistakes_are_one_line(made, message, folder, capsys):
    made(folder)
    assert explain.main(["out"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_run_without_a_step(folder, capsys):
    """It ended before the first step, and the output says so."""
    write(folder, [records()[0], {"step": 0, "ended": "OSError: [Errno 28] No space left"}])
    assert explain.main(["out"]) == 0
    out = capsys.readouterr().out
    assert "OSError ended the run" in out and "No space left" in out


@pytest.mark.parametrize(
    ("code", "title", "evidence"),
    [
        (75, "The run was stopped", "after step 900: stopped by a signal and saved"),
        (137, "An error ended the run", "after step 900: killed by SIGKILL"),
    ],
)
def test_an_end_that_only_the_exit_code_tells(code, title, evidence, folder, capsys):
    write(folder, records(Plan(steps=900, max_steps=1_000)))
    record = Record.claim(folder)
    record.begin(log="log")
    assert explain.main(["out"]) == 0
    assert "(out)\nrunning · step 900" in (out := capsys.readouterr().out) and title not in out
    record.end(code, exit_status.meaning(code))
    record.release()
    assert explain.main(["out", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (found,) = [f for f in result["findings"] if f["rule"] == "end of the run"]
    assert found["title"] == title and found["evidence"][0].startswith(evidence)
    assert result["state"] == {75: "stopped", 137: "failed"}[code]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream,environment,colours",
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": ""}, True),  # as no-color.org has it
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_colours_are_for_terminals(stream, environment, colours, folder, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write(folder, records(PLAIN, NOISY))
    out = stream()
    monkeypatch.setattr(sys, "stdout", out)
    assert explain.main(["out"]) == 0
    assert ("\033[1;31mCRITICAL" in out.getvalue()) == colours
    assert ("\033" in out.getvalue()) == colours


def test_a_closed_pipe_ends_it_quietly(folder):
    write(folder, records(PLAIN, NOISY))
    root = mamba_jax.__path__[0] + "/.."
    command = [sys.executable, "-m", "mamba_jax.explain", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_it_needs_no_jax():
    code = (
        "import sys, mamba_jax.doctor.rules, mamba_jax.doctor.text, mamba_jax.explain; "
        "sys.exit('jax' in sys.modules)"
    )
    root = mamba_jax.__path__[0] + "/.."
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_help_says_what_the_exit_status_means(capsys):
    with pytest.raises(SystemExit) as end:
        explain.main(["--help"])
    assert end.value.code == 0
    assert "exit status: 0 with or without problems" in capsys.readouterr().out
