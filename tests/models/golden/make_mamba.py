"""Makes mamba.npz: weights, logits and gradients of a tiny model of Hugging Face transformers.

Run with torch and transformers installed (made with torch 2.13.0, transformers 5.23.0):
    python tests/models/golden/make_mamba.py
"""

import pathlib

import numpy as np
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
config = MambaConfig(
    vocab_size=61,
    hidden_size=40,  # dt_rank = ceil(40 / 16) = 3
    state_size=16,
    num_hidden_layers=3,
    conv_kernel=4,
    expand=2,
    use_mambapy=False,
    tie_word_embeddings=True,
    layer_norm_epsilon=1e-5,
)
model = MambaForCausalLM(config).float().eval()
with torch.no_grad():  # off the special points of the initialisation: norm scales, D, biases
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
tokens = torch.randint(0, config.vocab_size, (2, 23))
logits = model(tokens, use_cache=False).logits
direction = torch.randn_like(logits)  # gradients of <direction, logits>
(direction * logits).sum().backward()
arrays = {"tokens": tokens, "logits": logits, "direction": direction}
for name, parameter in model.named_parameters():
    arrays[f"weight/{name}"] = parameter
    arrays[f"gradient/{name}"] = parameter.grad
np.savez_compressed(
    pathlib.Path(__file__).with_name("mamba.npz"),
    **{name: array.detach().numpy() for name, array in arrays.items()},
)
