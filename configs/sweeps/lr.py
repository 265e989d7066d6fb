"""Sweep of the peak learning rate, half a decade apart around the presets'.

    python launch/sweep.py --config=configs/hybrid_small.py --sweep=configs/sweeps/lr.py \
        --executor local --out sweeps/lr --slots 2

Five runs. Begin with short ones: `--config.training.max_steps=2000` after the command; the order of
learning rates rarely changes later, but the distances do.
"""


def get_hyper(h):
    """Returns the settings to try."""
    return h.sweep("config.training.learning_rate", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
