"""An exported folder against the model it came from: logits on real prompts, and greedy text."""

import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import UserError
from mamba_jax.exporting.hf import round_to
from mamba_jax.exporting.libraries import need
from mamba_jax.exporting.tensors import EMBEDDING, from_hf
from mamba_jax.models import build

PROMPTS = (
    "The history of science is",
    "def main():\n    return ",
    "If 3 apples cost 12 coins, one apple costs",
)
GREEDY_TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order


class Verdict(NamedTuple):
    """What was found."""

    largest_difference: float  # of logits: the file in the other engine against the file in ours
    largest_logit: float
    drift: float  # of logits in ours: the file's weights against the checkpoint's
    same_greedy: int  # tokens, of ``n_greedy``
    n_greedy: int


def prompts_ids(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns int32 ids of the prompts, each begun as training begins a document."""
    return [np.r_[tokenizer.eot_id, tokenizer.encode(text)].astype(np.int32) for text in PROMPTS]


@functools.partial(jax.jit, static_argnames="config")
def _run(params: Any, config: ModelConfig, ids_bt: jax.Array) -> jax.Array:
    return build.apply(params, config, ids_bt)[0]


def check_hf(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
) -> Verdict:
    """Loads a folder with transformers and compares, both sides computing in float32.

    Args:
      folder: as written.
      tensors: what ``tensors.to_hf`` gave, unrounded.
      config: of the model.
      tokenizer: of the model; its ids must equal those of the folder's tokenizer.
      dtype: that the folder was written in.

    Raises:
      UserError: if the two differ, or torch or transformers is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # the folder must be enough
    torch, transformers = need("torch", "bench"), need("transformers", "bench")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=config.family == "hybrid"
    )
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = dataclasses.replace(config, vocab_size=len(tensors[EMBEDDING]), dtype="float32")
    exact = from_hf(tensors, config)
    rounded = from_hf(
        {k: round_to(v, dtype).astype(np.float32) for k, v in tensors.items()}, config
    )
    difference = largest = drift = 0.0
    same = total = 0
    for text, ids in zip(PROMPTS, prompts_ids(tokenizer), strict=True):
        if their_tokenizer(text)["input_ids"] != ids.tolist():
            raise UserError(f"verification failed: the tokenizers disagree on {text!r}")
        with torch.no_grad():
            found = theirs.generate(
                torch.tensor(ids[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=GREEDY_TOKENS,
                min_new_tokens=GREEDY_TOKENS,
                eos_token_id=None,
                do_sample=False,
            )[0]
            their_logits = theirs(found[None, :-1]).logits[0].numpy()
        # One full pass over their text tells at each place what ours would have said: equal
        # choices everywhere mean equal greedy texts.
        ids_bt = jnp.asarray(found[None, :-1].numpy(), jnp.int32)
        our_logits = np.asarray(_run(rounded, config, ids_bt))[0]
        unrounded = np.asarray(_run(exact, config, ids_bt))[0]
        difference = max(difference, float(np.abs(our_logits - their_logits).max()))
        drift = max(drift, float(np.abs(our_logits - unrounded).max()))
        largest = max(largest, float(np.abs(our_logits).max()))
        chosen = our_logits[len(ids) - 1 :].argmax(-1)
        same += int((chosen == found[len(ids) :].numpy()).sum())
        total += len(chosen)
    return _judge(Verdict(difference, largest, drift, same, total))


def _judge(verdict: Verdict) -> Verdict:
    # "not <=": a NaN must not pass.
    if not verdict.largest_difference <= TOLERANCE * max(verdict.largest_logit, 1.0):
        raise UserError(
            f"verification failed: logits differ by {verdict.largest_difference:.2e} "
            f"(largest logit {verdict.largest_logit:.3g}); nothing was written"
        )
    if verdict.same_greedy != verdict.n_greedy:
        raise UserError(
            f"verification failed: {verdict.same_greedy} of {verdict.n_greedy} greedy tokens are "
            "the same; nothing was written"
        )
    return verdict
