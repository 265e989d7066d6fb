"""Every code block of the README and of ``docs/`` runs as printed or says why not; links lead
somewhere.

A shell block is run by a real shell in which the programs that it names only record how they were
called. The recorded commands then run in this process, beside two tiny trained models. What trains
for long runs with ``--dry_run``.
"""

import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest

from mamba_jax import train
from mamba_jax.cli import main
from tests.support.tiny_run import quick_compiles  # noqa: F401

from .pages import PAGES, ROOT, anchors, blocks, links

RUN = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]
LANGUAGES = {"bash", "python", "text"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# The README's two commands and what they call are run by CI itself.
SET_UP = {"./launch/quickstart.sh", "./launch/test.sh", "source"}
RECORDED = ("mamba-jax", "python", "pip", "source")
TINY = {
    "model.d_model": "16", "model.n_layers": "1", "model.max_seq_len": "32",
    "model.attention_window": "8", "model.attention_scales": "(2,)", "model.recursion_depth": "1",
    "data.tokenizer": "bytes", "training.max_steps": "2", "training.save_steps": "2",
    "training.eval_steps": "2", "training.eval_windows": "8", "training.log_steps": "1",
    "vram.effective_batch_size": "8",
}  # fmt: skip


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with texts, a book and two trained models."""
    place = tmp_path_factory.mktemp("docs")
    (place / "texts").mkdir()
    for i in range(20):
        lines = "".join(f"import os  # text {i} has line {j}\n" for j in range(40))
        (place / "texts" / f"{i}.txt").write_text(lines)
    (place / "book.txt").write_text("Once upon a time there was a book. " * 9)
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "launch").mkdir()
    for script in sorted(ROOT.glob("launch/*.sh")):
        stub = place / "launch" / script.name
        stub.write_text('#!/bin/sh\nprintf "%s\\0" "$0" "$@" >>"$RECORD"; echo >>"$RECORD"\n')
        stub.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        for size, family in (("small", "mamba"), ("quickstart", "hybrid")):
            fields = TINY | {"model.family": family, "output_dir": f"checkpoints/{size}"}
            flags = [f"--config.{field}={value}" for field, value in fields.items()]
            assert train.main(["--model_size=small", "--data_dir=texts", *flags]) == 0
        yield place
    jax.config.update("jax_compilation_cache_dir", None)


def recorded(text: str, place: pathlib.Path) -> list[list[str]]:
    """Runs a block in ``place`` and returns the commands that it calls, with their arguments."""
    record = place / "record"
    record.write_text("")
    stubs = "".join(
        f'{each}() {{ printf "%s\\0" {each} "$@" >>"$RECORD"; echo >>"$RECORD"; }}\n'
        for each in RECORDED
    )
    ran = subprocess.run(
        ["bash", "-euc", stubs + text],
        cwd=place,
        env={"PATH": "/usr/bin:/bin", "RECORD": str(record)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


def run(argv: list[str], monkeypatch) -> None:
    """Runs one recorded command."""
    program, *arguments = argv
    if program in SET_UP:
        assert program == "source" or (ROOT / program).is_file()
    elif program == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", shlex.join(arguments)):
            assert set(extra.split(",")) <= set(EXTRAS), extra
    elif program == "python":
        script, *rest = arguments
        monkeypatch.setattr(sys, "argv", [script, *rest])
        runpy.run_path(script, run_name="__main__")
    elif program in ("./launch/train_background.sh", "./launch/view_training_log.sh"):
        assert (ROOT / program).is_file()
        if arguments and arguments[0] not in ("--status", "--stop"):
            assert main.main(["train", *arguments, "--dry_run"]) == 0
    else:
        assert program == "mamba-jax", argv
        if arguments[0] == "train" and "--list_files" not in arguments:
            arguments += [] if "--dry_run" in arguments else ["--dry_run"]
        try:
            status = main.main(arguments)
        except SystemExit as ended:  # how argparse ends --help
            status = ended.code
        assert status == 0, argv


@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run_as_printed(page, place, card, monkeypatch):
    for block in blocks(page):
        if block.excuse or block.language == "text":
            continue
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), {})
            continue
        commands = recorded(block.text, place)
        assert commands, f"{block.place} calls nothing"
        for command in commands:
            run(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_name_a_language_and_skipped_ones_a_reason(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, block.place
        assert not block.excuse or len(block.excuse.split()) > 3, block.place


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


def test_every_page_is_linked_from_the_readme():
    readme = ROOT / "README.md"
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme)}
    assert set(PAGES) - {readme} <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_config_reference_is_that_of_the_schema():
    script = runpy.run_path(str(ROOT / "scripts/config_reference.py"))
    written = script["FILE"].read_text(encoding="utf-8")
    assert written == script["page"](), "run python scripts/config_reference.py"
    assert "| `learning_rate` | a number | `0.0003` | Peak of the schedule. It must be" in written
