"""What a train step needs on one device, part by part, by formula."""

import dataclasses

from mamba_jax.config import ModelConfig
from mamba_jax.models.cost import parameter_count
from mamba_jax.models.flops import Setting

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes by part at the moment that needs most."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


def account(model: ModelConfig, setting: Setting, *, chunk_tokens: int) -> Account:
    count = parameter_count(model).total
    rows = setting.batch_size // setting.devices
    tokens = rows * setting.seq_len
    d = model.d_model
    parts = {
        "weights": 4 * count,
        "optimizer": 8 * count,
        "gradients": 4 * count * (2 if setting.accumulation_steps > 1 else 1),
        "activations": tokens * 4 * d * model.n_layers,
        "workspace": tokens * 50 * model.d_inner,
        "loss": 10 * chunk_tokens * model.vocab_size,
    }
    return Account(parts)
