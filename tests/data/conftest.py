"""Small texts and a prepare() that needs one line."""

import pytest

from mamba_jax.config import DataConfig
from mamba_jax.data.pipeline import prepare

BYTES_EOT = 256


def words(count: int, prefix: str = "w") -> str:
    """Text in which every word, and so every window, occurs once."""
    return " ".join(f"{prefix}{i:05d}" for i in range(count))


@pytest.fixture
def many_files(tmp_path):
    """60 different documents of 150 to 209 bytes: none is cut into blocks."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(60):
        text = words(150, f"d{i}-")[: 150 + i]
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def make(tmp_path):
    """prepare() with the bytes tokenizer and a private cache; the log is `make.log`."""

    def make(data_dir, seq_len=32, seed=0, **config):
        values = {"tokenizer": "bytes", "tokenise_workers": 1} | config
        values.setdefault("cache_dir", str(tmp_path / "cache"))
        return prepare(
            DataConfig(data_dir=str(data_dir), **values),
            seq_len=seq_len,
            seed=seed,
            log=make.log.append,
        )

    make.log = []
    return make
