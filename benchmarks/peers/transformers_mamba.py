"""transformers' MambaForCausalLM: its slow path, or mambapy's parallel scan in it.

Where mamba_ssm's kernels are installed, transformers uses them by itself.
"""

import os
import time
from typing import Any

import numpy as np

from benchmarks.harness import Context, Prepared, import_peer
from benchmarks.peers.torch_common import memory_of, on_device, wait
from mamba_jax.config import ModelConfig, TrainingConfig

SLOW, MAMBAPY = "transformers", "transformers, mambapy"


def make_model(model: ModelConfig, use_mambapy: bool, context: Context) -> Any:
    """The same structure as ours, with random weights, float32."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    transformers = import_peer("transformers")
    if use_mambapy:
        import_peer("mambapy")
    config = transformers.MambaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        state_size=model.d_state,
        num_hidden_layers=model.n_layers,
        expand=model.expand_factor,
        conv_kernel=model.d_conv,
        time_step_rank=model.resolved_dt_rank,
        tie_word_embeddings=model.tie_embeddings,
        layer_norm_epsilon=model.norm_eps,
        use_mambapy=use_mambapy,
        bos_token_id=None,
        eos_token_id=None,  # no row ends
        pad_token_id=0,
    )
    import_peer("torch").manual_seed(0)
    return on_device(transformers.MambaForCausalLM(config), context)


def prepare_train_step(
    model: ModelConfig, windows: np.ndarray, context: Context, *, use_mambapy: bool
) -> Prepared:
    """One step of AdamW with clipping; under bfloat16 autocast on a GPU, float32 on a CPU.

    Args:
      model: the structure.
      windows: int32 (b, t + 1); the last token, which ours has as a target, is not used.
      context: of the run.
      use_mambapy: instead of the slow path.
    """
    torch = import_peer("torch")
    memory = memory_of(context)
    peer = make_model(model, use_mambapy, context).train()
    training = TrainingConfig()
    optimizer = torch.optim.AdamW(
        peer.parameters(),
        lr=1e-6,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
    )
    tokens = on_device(torch.from_numpy(windows[:, :-1].astype(np.int64)), context)
    device = "cuda" if context.platform == "gpu" else "cpu"

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=context.platform == "gpu"):
            loss = peer(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(context)

    if context.platform == "gpu":
        run()  # makes the optimizer's state, which is part of the peak of every later step
    count = sum(parameter.numel() for parameter in peer.parameters())
    return Prepared(run, memory, {"parameters": count})


def prepare_generation(
    model: ModelConfig,
    prompts: np.ndarray,
    n_tokens: int,
    context: Context,
    *,
    use_mambapy: bool = False,
) -> Prepared:
    """``generate`` with its cache, greedy; what is timed is as in ``workloads``.

    Args:
      model: the structure.
      prompts: int32 (b, t).
      n_tokens: tokens to time after the first one; 0: time the first one.
      context: of the run.
      use_mambapy: instead of the slow path; it only affects the prefill.
    """
    torch = import_peer("torch")
    memory = memory_of(context)
    peer = make_model(model, use_mambapy, context).eval()
    if context.platform == "gpu":
        peer = peer.to(torch.bfloat16)
    tokens = on_device(torch.from_numpy(prompts.astype(np.int64)), context)
    moments: list[float] = []

    def clock(input_ids: Any, scores: Any, **_: Any) -> Any:  # after every token
        wait(context)
        moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run() -> float:
        moments.clear()
        begin = time.perf_counter()
        with torch.no_grad():
            peer.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=1 + n_tokens,
                do_sample=False,
                use_cache=True,
                stopping_criteria=[clock],
            )
        assert len(moments) == 1 + n_tokens, len(moments)
        return moments[-1] - moments[0] if n_tokens else moments[0] - begin

    return Prepared(run, memory)
