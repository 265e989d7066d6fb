"""Three seeds of one config: an ensemble, or how far two runs differ by chance alone.

    python launch/sweep.py --config=configs/hybrid_small_standard.py \
        --sweep=configs/sweeps/seeds.py --out checkpoints/ensemble

Weights, data order, dropout and the held-out split follow the seed. A difference between other
settings that is smaller than that between these three means nothing.
"""


def get_hyper(h):
    """Returns the settings to try."""
    return h.sweep("config.seed", [42, 123, 789])
