"""A figure per task: the score over steps, FLOPs and time."""

import pathlib
import statistics

from benchmarks.evidence import records
from benchmarks.evidence.compare import AXES, Group
from benchmarks.evidence.plans import PLANS
from benchmarks.evidence.tasks import TASKS


def draw(task: str, of_task: dict[str, Group], path: pathlib.Path) -> pathlib.Path:
    """Writes the curves of a task's plans: thin, each seed; thick, their mean."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = {plan: f"C{number % 10}" for number, plan in enumerate(PLANS)}
    dashes = {plan: ("-", "--")[number // 10 % 2] for number, plan in enumerate(PLANS)}
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 4), layout="constrained")
        plots = figure.subplots(1, 3, sharey=True)
        for plot, axis in zip(plots, AXES, strict=True):
            for plan, group in of_task.items():
                style = {"color": colours[plan], "linestyle": dashes[plan]}
                by_step: dict[int, list[tuple[float, float]]] = {}
                for record in group.by_seed.values():
                    points = [
                        (entry["step"], group.at(record, entry, axis), value)
                        for entry in record["curve"]
                        if (value := records.score(entry["test"], task)) is not None
                    ]
                    if len(group.by_seed) > 1:
                        plot.plot(*_columns(points), alpha=0.3, linewidth=0.7, **style)
                    for step, x, y in points:
                        by_step.setdefault(step, []).append((x, y))
                mean = [
                    (step, *(statistics.fmean(of) for of in zip(*points, strict=True)))
                    for step, points in sorted(by_step.items())
                    if len(points) == len(group.by_seed)
                ]
                label = f"{plan} ({len(group.by_seed)})"
                plot.plot(*_columns(mean), label=label, **style)
            plot.set_xlabel({"steps": "steps", "FLOPs": "FLOPs", "time": "CPU time (s)"}[axis])
        plots[0].set_ylabel(TASKS[task].score)
        plots[0].legend(fontsize=7, title="plan (seeds)")
        figure.suptitle(task)
        # Without the software's version in it, equal records give an equal file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _columns(points: list[tuple[int, float, float]]) -> tuple[list[float], list[float]]:
    return [x for _, x, _ in points], [y for _, _, y in points]
