"""Makes original.bin: a tiny model in the layout of state-spaces/mamba, saved by torch.

Run with torch installed (made with torch 2.13.0):
    python tests/exporting/golden/make_original.py
"""

import pathlib

import torch

SHAPES = {  # d 16, e 32, n 4, r 1, k 4, 12 rows
    "backbone.embedding.weight": (12, 16),
    "backbone.layers.0.norm.weight": (16,),
    "backbone.layers.0.mixer.in_proj.weight": (64, 16),
    "backbone.layers.0.mixer.conv1d.weight": (32, 1, 4),
    "backbone.layers.0.mixer.conv1d.bias": (32,),
    "backbone.layers.0.mixer.x_proj.weight": (9, 32),
    "backbone.layers.0.mixer.dt_proj.weight": (32, 1),
    "backbone.layers.0.mixer.dt_proj.bias": (32,),
    "backbone.layers.0.mixer.A_log": (32, 4),
    "backbone.layers.0.mixer.D": (32,),
    "backbone.layers.0.mixer.out_proj.weight": (16, 32),
    "backbone.norm_f.weight": (16,),
}
state = {}
for place, (name, shape) in enumerate(SHAPES.items()):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape) / 8 + place
    if name.endswith("in_proj.weight"):
        tensor = tensor.T.contiguous().T  # strides of its own
    if name.endswith("x_proj.weight"):
        tensor = torch.stack([tensor, -tensor])[0]  # a part of a larger storage
    if name.endswith("A_log"):
        tensor = tensor.bfloat16()
    if name.endswith("out_proj.weight"):
        tensor = tensor.half()
    state[name] = tensor
state["lm_head.weight"] = state["backbone.embedding.weight"]  # one storage, as the tied ones have
torch.save(state, pathlib.Path(__file__).with_name("original.bin"))
