"""From a dataset of the Hugging Face Hub, or a folder laid out like one, to documents: one per row.

Everything uses the library ``datasets``, which is imported on demand because that takes seconds.
"""

from collections.abc import Callable

from mamba_jax.config import DataConfig
from mamba_jax.data.sources.hub_stream import Stream, open_stream
from mamba_jax.data.sources.hub_table import DatasetTable, open_table


def open_dataset(config: DataConfig, log: Callable[[str], None]) -> DatasetTable | Stream:
    """Finds the split and the columns that ``config`` names.

    Without ``data.dataset_streaming``, the split is downloaded first unless it is in the library's
    cache; with it, rows are fetched when their parts are read.

    Raises:
      UserError: if the dataset is not available, or has no such configuration, split or column.
    """
    return (open_stream if config.dataset_streaming else open_table)(config, log)
