"""The table of all cells: which plans learn which tasks, at which learning rates and seeds.

For every task and plan a sweep comes first: each learning rate on a seed of its own. The rate with
the best score on validation rows is the one of the main cells, which are judged on test rows.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.evidence.plans import PLANS
from benchmarks.evidence.tasks import TASKS
from mamba_jax.errors import UserError, did_you_mean

LEARNING_RATES = (3e-3, 6e-3, 1.2e-2)
SWEEP_SEED = 1000  # of no main cell
EVAL_STEPS = 200
MAIN_PLANS = ("M*6", "AMAMA", "MMHMM", "AMHMA")
# (plan, baseline): compared seed by seed.
PAIRS = (("MMHMM", "M*6"), ("AMHMA", "M*6"), ("MMHMM", "AMAMA"), ("AMHMA", "AMAMA"))
_QUICK = (("p_hop_3", "M*6"), ("p_hop_3", "MMHMM"), ("text", "M*6"))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run: equal cells give equal numbers.

    ``learning_rate`` is None while the sweep that chooses it is not finished.
    """

    task: str
    plan: str
    learning_rate: float | None
    seed: int
    steps: int
    eval_steps: int = EVAL_STEPS

    def spec(self) -> str:
        """The cell as ``parse`` reads it."""
        fields = dataclasses.asdict(self)
        return ",".join(f"{name}={value}" for name, value in fields.items())

    @property
    def sweeps(self) -> bool:
        return self.seed == SWEEP_SEED


def parse(spec: str) -> Cell:
    """Reads ``task=…,plan=…,learning_rate=…,seed=…,steps=…`` (``eval_steps`` has a default).

    Raises:
      UserError: on a field that is missing, unknown or out of range.
    """
    values: dict[str, Any] = {"eval_steps": str(EVAL_STEPS)}
    names = [field.name for field in dataclasses.fields(Cell)]
    for word in spec.split(","):
        name, sign, value = word.partition("=")
        if name not in names or not sign:
            raise UserError(f'--cell: "{word}" is not one of {"=, ".join(names)}=')
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"--cell={spec}: add {', '.join(f'{name}=' for name in missing)}")
    known(values["task"], TASKS, "task")
    known(values["plan"], PLANS, "plan")
    for name, kind in {
        "learning_rate": float,
        "seed": int,
        "steps": int,
        "eval_steps": int,
    }.items():
        try:
            values[name] = kind(values[name])
            good = values[name] > (-1 if name == "seed" else 0)
        except ValueError:
            good = False
        if not good:
            least = "of at least 0" if name == "seed" else "greater than 0"
            raise UserError(f"--cell: {name}={values[name]} must be a number {least}")
    return Cell(**values)


def known(name: str, names: Iterable[str], what: str) -> None:
    """Raises a UserError if there is no such task or plan."""
    if name not in names:
        near = did_you_mean(name, names)
        raise UserError(f'unknown {what} "{name}"{near} (choices: {", ".join(names)})')


def cells(best: Mapping[tuple[str, str], float]) -> list[Cell]:
    """Returns all cells in the order in which to run them: seed by seed, so that an early end
    leaves tables without holes.

    Args:
      best: (task, plan) → its learning rate, where the sweep is finished.
    """
    made = []
    for task, of_task in TASKS.items():
        for plan in PLANS:
            half = -(-of_task.steps // 2 // EVAL_STEPS) * EVAL_STEPS
            made += [Cell(task, plan, rate, SWEEP_SEED, half) for rate in LEARNING_RATES]
        for seed in range(5):
            for plan in PLANS:
                if plan in MAIN_PLANS or seed < 3:
                    made.append(Cell(task, plan, best.get((task, plan)), seed, of_task.steps))
    return made


def quick_cells() -> list[Cell]:
    """A few cells of some seconds each."""
    return [Cell(task, plan, 3e-3, 0, steps=4, eval_steps=2) for task, plan in _QUICK]


def only(made: list[Cell], words: list[str]) -> list[Cell]:
    """Keeps the cells that all ``name=value`` words fit; a value may be several, by commas.

    Raises:
      UserError: on an unknown field or value.
    """
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("task", "plan", "seed"):
            raise UserError(f'--only: "{word}" is not one of task=, plan=, seed=')
        values = value.split(",")
        for one in values if name != "seed" else ():
            known(one, TASKS if name == "task" else PLANS, name)
        made = [cell for cell in made if str(getattr(cell, name)) in values]
    return made
