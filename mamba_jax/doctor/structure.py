"""Rules on the state of the layers: Δ and A of the scan, the gates of the recursion.

A state with decay rate A forgets by exp(Δ·A) a token; with signed eigenvalues it is multiplied by
2 exp(Δ·A) − 1, which approaches −1 where exp(Δ·A) approaches 0. A starts at −1 … −d_state, Δ
between 0.001 and 0.1 (arXiv 2312.00752, section 3.6).
"""

from collections.abc import Iterable

import numpy as np

from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import RunSignals

FORGETS = 5.0  # Δ·|A| of the slowest state at the mean Δ: e⁻⁵, 0.7%, is left after one token
DT_LEAST = 1e-4  # mean Δ: a tenth of the smallest that a layer starts with
DT_MOST = 100.0  # of any token: e⁻¹⁰⁰ is 0, and only a broken layer needs it
DT_GROWS_FROM = 20.0  # and doubles over half of the evaluations: it will get there
DT_EVALUATIONS = 4  # before growth is judged
A_FASTER = 20.0  # × the fastest at the start
A_SLOWER = 1e-3  # × the slowest at the start: a memory a thousand times as long
GATE_SHARE = 0.95  # of all gates, or of the depth
GATE_RECORDS = 3  # after the warm-up


def step_sizes(run: RunSignals) -> Verdict:
    """Δ of a layer runs away, or collapses towards 0."""
    mean, most = run["dt_mean"], run["dt_max"]
    if not len(mean) or not len(most):
        return Unchecked("Δ is not recorded; an evaluation measures it")
    slowest_l = np.abs(run["A_max"].values[:, -1]) if len(run["A_max"]) else 1.0
    mean_l, most_l = mean.values[:, -1], most.values[:, -1]
    forgets_l = mean_l * slowest_l > FORGETS
    grows_l = np.zeros_like(forgets_l)
    if len(most) >= DT_EVALUATIONS:
        grows_l = (most_l > DT_GROWS_FROM) & (most_l > 2 * most.values[:, len(most) // 2 - 1])
    away_l = (most_l > DT_MOST) | grows_l
    closed_l = mean_l < DT_LEAST
    bad_l = forgets_l | away_l | closed_l
    if not bad_l.any():
        return None
    worst = int(np.argmax(np.where(bad_l, np.maximum(most_l, 1 / mean_l), 0)))
    evidence = [
        f"{_layers(np.flatnonzero(bad_l))} of {len(bad_l)}, at step {most.steps[-1]:,}",
        f"layer {worst}: mean Δ {mean.values[worst, 0]:.2g} at step {mean.steps[0]:,}, "
        f"{mean_l[worst]:.2g} now; largest Δ {most.values[worst, 0]:.2g}, {most_l[worst]:.2g} now",
    ]
    if closed_l[worst]:
        title = "Δ collapses towards 0"
        why = "With such a small step the state neither absorbs new input nor forgets: the layer "
        why += "ignores its input."
    else:
        title = "Δ runs away"
        why = "A large step makes the state forget everything before it: the layer sees little "
        why += "more than the current token, and its gradients become extreme."
        if _signed(run):
            why = "With so large a step a state only changes its sign from token to token: it "
            why += "neither forgets nor selects, and its gradients become extreme."
    decay = 2 * (run.config.training.weight_decay if run.config is not None else 0.1) or 0.1
    more_decay = Remedy(
        "Raise the weight decay, which limits the weights that produce Δ",
        remedies.resume(run, f"--config.training.weight_decay={decay:.2g}"),
    )
    options = (remedies.lower_rate(run), more_decay)
    return Finding(Severity.WARNING, title, tuple(evidence), why, options)


def decay_rates(run: RunSignals) -> Verdict:
    """A of a layer runs away from where it started."""
    fast, slow = run["A_min"], run["A_max"]
    if not len(fast) or not len(slow):
        return Unchecked("A is not recorded; an evaluation measures it")
    states = run.config.model.d_state if run.config is not None else None
    fast_l, slow_l = np.abs(fast.values), np.abs(slow.values)
    start_fast = states or float(fast_l[:, 0].max())
    start_slow = 1.0 if states else float(slow_l[:, 0].min())
    faster_l = fast_l[:, -1] > A_FASTER * start_fast
    slower_l = slow_l[:, -1] < A_SLOWER * start_slow
    bad_l = faster_l | slower_l
    if not bad_l.any():
        return None
    worst = int(np.argmax(np.where(bad_l, np.maximum(fast_l[:, -1], 1 / slow_l[:, -1]), 0)))
    far = "changes its sign at every token" if _signed(run) else "forgets within one token"
    return Finding(
        Severity.WARNING,
        "The decay rates A run away",
        (
            f"{_layers(np.flatnonzero(bad_l))} of {len(bad_l)}, at step {fast.steps[-1]:,}",
            f"layer {worst}: A from {fast.values[worst, -1]:.3g} to {slow.values[worst, -1]:.3g}; "
            f"at the start from {-start_fast:.3g} to {-start_slow:.3g}",
        ),
        f"A sets how long the state remembers. Far below its initial value the state {far}; near 0 "
        "it never forgets and accumulates noise.",
        (remedies.lower_rate(run), remedies.skip_spikes(run)),
    )


def gates(run: RunSignals) -> Verdict:
    """Depth gates that are closed, or open, for every token."""
    model = None if run.config is None else run.config.model
    if model is not None and not (model.gated_layers and model.gate == "token"):
        return None  # there are none; or they select no tokens
    depth = run["depth_mean"].after(run.warm_step)
    if len(depth) < GATE_RECORDS:
        return too_few(len(depth), GATE_RECORDS, "records of gates")
    recent = depth.last(0.1, GATE_RECORDS)
    depth_l = np.median(recent.values, axis=1)
    shares = {
        name: np.median(curve.last(0.1, GATE_RECORDS).values, axis=1)
        if len(curve := run[name].after(run.warm_step)) and len(curve.values) == len(depth_l)
        else np.zeros_like(depth_l)
        for name in ("gates_closed", "gates_open")
    }
    deepest = run.config.model.recursion_depth if run.config is not None else np.inf
    shut_l = shares["gates_closed"] >= GATE_SHARE
    open_l = shares["gates_open"] >= GATE_SHARE
    if np.isfinite(deepest):
        shut_l |= depth_l <= (1 - GATE_SHARE) * deepest
        open_l |= depth_l >= GATE_SHARE * deepest
    stuck = int((shut_l | open_l).sum())
    if not stuck:
        return None
    numbers, n_layers = np.arange(len(depth_l)), len(depth_l)
    if run.config is not None and len(run.config.model.gated_layers) == n_layers:
        numbers, n_layers = np.array(run.config.model.gated_layers), run.config.model.n_layers
    evidence, why = [], ""
    of = f" of {deepest}" if np.isfinite(deepest) else ""
    for stuck_l, state, share in (
        (shut_l, "closed", shares["gates_closed"]),
        (open_l, "open", shares["gates_open"]),
    ):
        if stuck_l.any():
            layers = np.flatnonzero(stuck_l)
            evidence.append(
                f"{state}: {_layers(numbers[layers])} of {n_layers}; mean depth "
                f"{depth_l[layers].mean():.3g}{of}, {share[layers].mean():.0%} of the gates "
                f"(medians over {recent.span})"
            )
    options = []
    if shut_l.any():
        why += "A closed gate adds nothing: its recursion is computed for every token and "
        why += "discarded. "
        if np.isfinite(deepest):
            fewer = f"--config.model.recursion_depth={int(deepest) // 2}"
            options.append(Remedy("Start a new run with fewer recursion steps", fewer))
        options.append(
            Remedy(
                "Or start a new run with gates that are initially open",
                "--config.model.gate_bias=1",
            )
        )
    if open_l.any():
        why += "A gate that is always open selects nothing: every token gets the full depth. "
        options.append(
            Remedy(
                "Start a new run with gates that are initially almost closed",
                "--config.model.gate_bias=-1",
            )
        )
    options.append(remedies.lower_rate(run))
    severity = Severity.WARNING if 2 * stuck >= len(depth_l) else Severity.NOTE
    ends = [name for stuck_l, name in ((shut_l, "closed"), (open_l, "open")) if stuck_l.any()]
    title = f"Depth gates are stuck {' or '.join(ends)}"
    return Finding(severity, title, tuple(evidence), why.strip(), tuple(options))


def _signed(run: RunSignals) -> bool:
    return run.config is not None and run.config.model.eigenvalues == "signed"


def _layers(layers: Iterable[int]) -> str:
    """Returns "layers 0, 3 and 4"; a long list is shortened."""
    names = [str(layer) for layer in layers]
    if len(names) > 6:
        return f"layers {', '.join(names[:5])} and {len(names) - 5} more"
    if len(names) == 1:
        return f"layer {names[0]}"
    return f"layers {', '.join(names[:-1])} and {names[-1]}"
