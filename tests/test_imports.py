"""Data flows one way: which part may import which, no import of a command, and no cycle."""

import ast
import graphlib
import pathlib

import pytest

import mamba_jax

ROOT = pathlib.Path(mamba_jax.__file__).parent
BASE = {"errors", "files", "paths"}  # what every part may import
COMMANDS = {path.stem for path in ROOT.glob("*.py")} - {"__init__", *BASE}
# What each part may import, besides itself and the base.
ALLOWED: dict[str, set[str]] = {
    "paths": set(),
    "errors": {"paths"},
    "files": set(),
    "ops": set(),
    "pages": set(),
    "config": set(),
    "modules": {"ops", "config"},
    "costs": {"config"},
    "data": {"config"},
    "parallel": {"config"},
    "models": {"modules", "ops", "config"},
    "checkpoints": {"models", "config"},
    "runs": {"checkpoints", "costs", "config"},
    "generation": {"checkpoints", "models", "modules", "config", "data"},
    "exporting": {"generation", "checkpoints", "models", "config", "data"},
    "training": {
        *("generation", "runs", "checkpoints", "models", "modules", "costs", "ops", "parallel"),
        *("data", "config"),
    },
    "evaluating": {"generation", "models", "config", "data"},
    "serving": {"generation", "models", "parallel", "config", "data"},
    "doctor": {"runs", "checkpoints", "config"},
    "sweeps": {"pages", "runs", "checkpoints", "config"},
    "estimator": {
        "training",
        "checkpoints",
        "costs",
        "models",
        "parallel",
        "ops",
        "data",
        "config",
    },
    "cli": {
        *("estimator", "training", "runs", "checkpoints", "data", "costs", "config"),
    },
    "reports": {"cli", "pages", "runs", "checkpoints", "costs", "models", "data", "config"},
}


def imports(file: pathlib.Path) -> set[str]:
    """The modules of mamba_jax that a file imports, inside its functions too.

    ``from mamba_jax.data import store`` names the module ``mamba_jax.data.store``.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if exists(inner) else node.module or "")
    return {name for name in found if name.startswith("mamba_jax.")}


def exists(module: str) -> bool:
    path = ROOT.parent.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_of(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def parts_of(file: pathlib.Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file)}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_before_it(part):
    path = ROOT / part
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        extra = parts_of(file) - ALLOWED[part] - {part, *BASE}
        assert not extra, f"{file} imports {extra}"


def test_the_parts_have_an_order():
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises on a cycle
    assert set(order) == set(ALLOWED)


def test_no_cycle_even_inside_a_part():
    """Imports inside functions count too: they only hide a cycle."""
    files = {module_of(file): file for file in ROOT.rglob("*.py")}
    # A package's __init__ re-exports names of its own files, which never import it.
    graph = {module: imports(file) & files.keys() - {module} for module, file in files.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_every_part_has_its_place():
    parts = {p.parent.name for p in ROOT.glob("*/__init__.py")} | BASE
    assert parts == set(ALLOWED)


def test_no_part_imports_a_command():
    for file in ROOT.rglob("*.py"):
        if file.parent == ROOT and file.stem in {*COMMANDS, "__init__"}:  # the public face
            continue
        assert not parts_of(file) & COMMANDS, file


def test_training_is_imported_by_few():
    """What ten other parts need belongs below it: into ``checkpoints``, ``runs``, ``costs`` …"""
    users = {
        (file.parent.name if file.parent == ROOT else file.relative_to(ROOT).parts[0])
        for file in ROOT.rglob("*.py")
        if "training" in parts_of(file) and "training" not in file.parts
    }
    assert len(users) <= 5, users
