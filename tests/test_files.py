"""Files are written whole or not at all, everywhere in the package."""

import ast
import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

import mamba_jax
from mamba_jax.files import write_atomic

ROOT = pathlib.Path(mamba_jax.__file__).parent
# What is written without ``write_atomic``, and why that is safe.
DIRECT = {
    "files.py": "the one place",
    "estimator/compiled.py": "standard output, no file",
    "checkpoints/folder.py": "a folder aside that is renamed when it is complete",
    "checkpoints/arrays.py": "a folder aside",
    "data/cache/shards.py": "a folder aside",
    "exporting/gguf_file.py": "a folder aside",
    "exporting/hf.py": "a folder aside",
    "exporting/onnx_file.py": "a folder aside",
    "exporting/onnx_graph.py": "a folder aside",
    "import_hf.py": "a folder aside",
}


def writes(call):
    """Whether a call replaces what a file holds."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("write_text", "write_bytes"):
        return True
    modes = [word.value for word in [*call.args, *(k.value for k in call.keywords)]
             if isinstance(word, ast.Constant) and isinstance(word.value, str)]  # fmt: skip
    return name in ("open", "fdopen") and any(
        m in ("w", "wb", "w+", "wt", "x", "xb") for m in modes
    )


def test_state_files_are_written_through_one_function():
    found = {
        str(file.relative_to(ROOT))
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and writes(node)
    }
    assert found == DIRECT.keys()


@pytest.mark.parametrize("content", ["né\n", b"\x00\xff"])
def test_the_content_is_as_given(content, tmp_path):
    file = tmp_path / "a"
    for _ in range(2):
        write_atomic(file, content)
        expected = content if isinstance(content, bytes) else content.encode()
        assert file.read_bytes() == expected and os.listdir(tmp_path) == ["a"]
    previous = os.umask(0)
    os.umask(previous)
    assert file.stat().st_mode & 0o777 == 0o666 & ~previous


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_keeps_the_previous_content(failing, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "state.json"
    file.write_text("before")
    monkeypatch.setattr(*((os, failing) if failing == "fsync" else (pathlib.Path, failing)), full)
    with pytest.raises(OSError) as raised:
        write_atomic(file, "after")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(file))
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["state.json"]


def test_a_kill_before_the_rename_keeps_the_previous_content(tmp_path):
    file = tmp_path / "state.json"
    file.write_text("before")
    program = (
        "import os, signal, sys; from mamba_jax.files import write_atomic\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(sys.argv[1], 'x' * 100_000)"
    )
    subprocess.run([sys.executable, "-c", program, file])
    assert file.read_text() == "before"
    # The next writer leaves the temporary file alone while its writer may be alive, then removes
    # it; what merely has a similar name is not ours.
    (left,) = tmp_path.glob(".part-*")
    others = [tmp_path / ".part-book", tmp_path / f"x{left.name}", tmp_path / f"{left.name[:-1]}g"]
    for other in others:
        other.write_text("mine")
    for minutes, remains in ((50, True), (70, False)):
        for path in (left, *others):
            os.utime(path, (time.time() - 60 * minutes,) * 2)
        write_atomic(file, "after")
        assert left.exists() == remains and file.read_text() == "after"
    assert {path.name for path in tmp_path.iterdir()} == {file.name, *(o.name for o in others)}


def test_one_that_cannot_be_removed_does_not_stop_the_clean_up(tmp_path):
    names = [tmp_path / f".part-{number:016x}" for number in range(20)]
    for path in names:
        path.mkdir() if int(path.name[-1], 16) % 2 else path.touch()  # a folder cannot be unlinked
        os.utime(path, (time.time() - 7200,) * 2)
    write_atomic(tmp_path / "file", "text")
    left = {path for path in names if path.exists()}
    assert left == {path for path in names if path.is_dir()} and len(left) == 10


def test_links_modes_and_pipes_are_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomic(link, "after")
    assert link.is_symlink() and real.read_text() == "after"
    assert real.stat().st_mode & 0o777 == 0o640
    program = "from mamba_jax.files import write_atomic; write_atomic('/dev/stdout', 'seen')"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "seen"
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path, "x")
    with pytest.raises(FileNotFoundError) as raised:
        write_atomic(tmp_path / "no" / "such", "x")
    assert raised.value.filename == str(tmp_path / "no" / "such")
