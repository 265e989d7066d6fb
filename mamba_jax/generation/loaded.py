"""A trained model for use from Python: ``mamba_jax.load_model``."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mamba_jax.config import ModelConfig, RunConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.generation.generate import generate_text
from mamba_jax.generation.load import find
from mamba_jax.models import build


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
      params: nested dict of float32 arrays, as ``models.build`` takes them.
      config: that of the run that trained the model, with the fields given to ``load_model``.
      tokenizer: the one that the model was trained with.
    """

    params: build.Params
    config: RunConfig
    tokenizer: Tokenizer

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.95,
        seed: int = 0,
        stops: Sequence[str] = (),
    ) -> str | list[str]:
        """Continues one prompt, or a batch of them.

        Args:
          prompt: a text, or several.
          max_tokens: for each prompt, ≥ 1.
          temperature: 0 takes the most likely token each time.
          top_k: sample among this many of the most likely tokens; 0: among all.
          top_p: sample among the fewest tokens that together have this probability; 1: among all.
          seed: 0 … 2³² - 1; the same seed gives the same text.
          stops: a text ends before the first of these.

        Returns:
          The new text without the prompt: a string for a string, else a list in order.

        Raises:
          UserError: if a number is out of range.
        """
        alone = isinstance(prompt, str)
        texts = generate_text(
            self.params,
            self.config.model,
            self.tokenizer,
            [prompt] if alone else prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stops=stops,
        )
        return texts[0] if alone else texts

    def logits(self, text: str) -> Float[np.ndarray, "t v"]:
        """Returns the logits after the separator and after each token of a text.

        Returns:
          float32 (tokens + 1, vocabulary): row i predicts token i of ``tokenizer.encode(text)``.
        """
        tokens = np.concatenate([[self.tokenizer.eot_id], self.tokenizer.encode(text)])
        logits_btv = _logits(self.params, self.config.model, jnp.asarray(tokens, jnp.int32)[None])
        return np.asarray(logits_btv[0])


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: build.Params, config: ModelConfig, tokens_bt: jax.Array) -> jax.Array:
    return build.apply(params, config, tokens_bt)[0]


def load_model(
    folder: str | os.PathLike[str],
    *,
    scan: str | None = None,
    gate_skip_threshold: float | None = None,
    recursion_depth: int | None = None,
) -> LoadedModel:
    """Loads a trained model.

    Args:
      folder: a checkpoint, or a run's folder for its newest intact checkpoint.
      scan: an implementation of the selective scan; None: the checkpoint's.
      gate_skip_threshold: a token skips the recursion steps whose gates do not exceed this; 0:
        none; None: the checkpoint's.
      recursion_depth: steps, of a model trained with ``model.shared_gate``; None: as trained.

    Raises:
      UserError: if there is no checkpoint, or a value cannot be used here.
    """
    found = find(os.fspath(folder), lambda _: None)
    model = found.load(
        scan=scan, gate_skip_threshold=gate_skip_threshold, recursion_depth=recursion_depth
    )
    config = dataclasses.replace(found.metadata.config, model=model.config)
    return LoadedModel(model.params, config, model.tokenizer)
