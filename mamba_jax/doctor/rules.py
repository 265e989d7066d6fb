"""The table of all rules, and their application to a run."""

import dataclasses
from collections.abc import Callable, Mapping

from mamba_jax.doctor import gradients, learning, operation, structure
from mamba_jax.doctor.finding import Finding, Unchecked, Verdict
from mamba_jax.doctor.signals import RunSignals

RULES: Mapping[str, Callable[[RunSignals], Verdict]] = {  # what is checked → how
    "end of the run": operation.ended,
    "loss falls": learning.loss_not_falling,
    "learning rate": learning.learning_rate_too_high,
    "vanishing gradients": gradients.vanishing,
    "growing gradients": gradients.growing,
    "loss spikes": learning.loss_spikes,
    "overfitting": learning.overfitting,
    "Δ": structure.step_sizes,
    "A": structure.decay_rates,
    "depth gates": structure.gates,
    "skipped steps": gradients.skipped,
    "speed": operation.slowing,
    "waiting for data": operation.data_stall,
    "memory": operation.memory,
    "clipping": gradients.always_clipped,
    "warnings": operation.warned,
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What all rules report about a run.

    Attributes:
      findings: (rule, finding), the worst first.
      clear: the rules that checked and found nothing.
      unchecked: rule → what it lacks.
    """

    findings: tuple[tuple[str, Finding], ...]
    clear: tuple[str, ...]
    unchecked: Mapping[str, str]


def examine(run: RunSignals) -> Diagnosis:
    """Applies every rule."""
    verdicts = {name: rule(run) for name, rule in RULES.items()}
    findings = [(name, v) for name, v in verdicts.items() if isinstance(v, Finding)]
    findings.sort(key=lambda each: -each[1].severity)  # stable: among equals the table's order
    return Diagnosis(
        findings=tuple(findings),
        clear=tuple(name for name, v in verdicts.items() if v is None),
        unchecked={name: v.reason for name, v in verdicts.items() if isinstance(v, Unchecked)},
    )
