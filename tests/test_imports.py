"""The direction of imports: data flows one way, and nobody imports a command."""

import ast
import pathlib

import pytest

import mamba_jax

ROOT = pathlib.Path(mamba_jax.__file__).parent
COMMANDS = {
    "autotune",
    "background",
    "explain",
    "memory",
    "sweep",
    "train",
    "prepare_data",
    "generate",
    "evaluate",
    "export",
    "import_hf",
    "report",
    "serve",
    "cli",
    "__main__",
}
# Who may import whom, besides itself, errors and files.
ALLOWED = {
    "paths": set(),
    "errors": {"paths"},
    "files": set(),
    "tables": set(),
    "presets": set(),
    "ops": set(),
    "config": {"paths", "presets", "config_checks"},
    "config_checks": {"config"},  # for its types alone
    "modules": {"ops", "config"},
    "models": {"modules", "ops", "config", "presets"},
    "data": {"config"},
    "parallel": {"config"},
    "training": {"models", "ops", "parallel", "config"},
    "generation": {"models", "modules", "training", "config", "data"},
    "evaluating": {"generation", "models", "config", "data"},
    "serving": {"generation", "models", "training", "config", "data"},
    "exporting": {"generation", "models", "training", "config", "config_checks", "data"},
    "estimator": {"models", "training", "parallel", "ops", "data", "config", "presets"},
    "arguments": {"config", "presets", "training"},
    "launching": {"training"},
    "doctor": {"training", "config"},
    "sweeps": {"launching", "training", "config"},
    "reports": {"tables", "models", "data", "training", "launching", "config", "presets"},
    "starting": {"config", "modules", "models", "data", "parallel", "training", "estimator"},
    "dry_run": {"starting", "arguments", "config", "presets", "models", "data", "training"},
}


def imported_parts(file: pathlib.Path) -> set[str]:
    """The top-level parts of mamba_jax that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("mamba_jax.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_before_it(part):
    path = ROOT / part
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        extra = imported_parts(file) - ALLOWED[part] - {part, "errors", "files"}
        assert not extra, f"{file} imports {extra}"


def test_every_part_has_its_place():
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert parts - {"__init__"} == set(ALLOWED) | COMMANDS


def test_no_part_imports_a_command():
    for file in ROOT.rglob("*.py"):
        if file.parent == ROOT and file.stem in COMMANDS:
            continue
        assert not imported_parts(file) & COMMANDS, file
