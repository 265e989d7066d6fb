"""A space to search: learning rate, weight decay and dropout.

    python launch/sweep.py --config=configs/hybrid_small.py --sweep=configs/sweeps/search.py \
        --search optuna --trials 30 --out sweeps/search

Without --search it is a random search of sixteen runs.
"""


def get_hyper(h):
    """Returns the settings to try."""
    return h.zipit(
        [
            h.loguniform("config.training.learning_rate", h.interval(1e-4, 1e-2)),
            h.loguniform("config.training.weight_decay", h.interval(1e-2, 1.0)),
            h.uniform("config.model.dropout", h.discrete([0.0, 0.1, 0.2])),
        ],
        length=16,
    )
