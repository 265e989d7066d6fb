"""A slow, literal float64 form of both families: one document, one token at a time, no caches.

Written from the equations (arXiv 2312.00752; the hybrid's are in ``modules/block.py``), sharing no
code with the package: whatever the fast path does with chunks, bands, packing and caches must give
these results.
"""

import numpy as np


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rotate(x_hp, number):
    half = x_hp.shape[-1] // 2
    angle = number * 10_000.0 ** (-np.arange(half) / half)
    a, b = x_hp[:, :half], x_hp[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def mixer(p, config, u_td):
    rank, n = config.resolved_dt_rank, config.d_state
    x_te, z_te = np.einsum("td,dme->mte", u_td, p["in_proj"]["kernel"])
    kernel = p["conv1d"]["kernel"]
    width = len(kernel)
    state = np.zeros((config.d_inner, n))
    A = -np.exp(p["A_log"])
    out = []
    for t in range(len(u_td)):
        conv = p["conv1d"]["bias"].copy()
        for back in range(min(width, t + 1)):
            conv += kernel[width - 1 - back] * x_te[t - back]
        x = silu(conv)
        dt_r, B, C = np.split(x @ p["x_proj"]["kernel"], [rank, rank + n])
        dt = np.log1p(np.exp(dt_r @ p["dt_proj"]["kernel"] + p["dt_proj"]["bias"]))
        decay = np.exp(dt[:, None] * A)
        if config.eigenvalues == "signed":
            decay = 2 * decay - 1
        state = decay * state + (dt * x)[:, None] * B
        out.append((state @ C + p["D"] * x) * silu(z_te[t]))
    return np.stack(out) @ p["out_proj"]["kernel"]


def attention_read(p, config, source_td, query_td, t):
    """What token t reads: keys from ``source_td``, its query from ``query_td``; (d,)."""
    eps, window = config.norm_eps, config.attention_window or config.max_seq_len
    query_kernel, key_kernel, value_kernel = np.moveaxis(p["qkv"]["kernel"], 1, 0)
    normed = rms(source_td, eps) * p["norm"]["scale"]
    k_thp = np.einsum("td,dhp->thp", normed, key_kernel)
    v_thp = np.einsum("td,dhp->thp", normed, value_kernel)
    q_hp = np.einsum("d,dhp->hp", rms(query_td[t], eps) * p["norm"]["scale"], query_kernel)
    q_hp = rms(q_hp, eps) * p["query_norm"]["scale"]
    weights = np.exp(p["scale_logits"])
    weights = len(weights) * weights / weights.sum(axis=0)
    total = np.zeros_like(q_hp)
    for index, scale in enumerate(config.attention_scales):
        completed = (t + 1) // scale
        numbers = range(max(0, completed - window), completed)
        if not numbers:
            continue
        keys = np.stack(
            [
                rotate(
                    rms(k_thp[c * scale : (c + 1) * scale].mean(0), eps) * p["key_norm"]["scale"], c
                )
                for c in numbers
            ]
        )
        values = np.stack([v_thp[c * scale : (c + 1) * scale].mean(0) for c in numbers])
        scores = np.einsum("hp,chp->hc", rotate(q_hp, completed - 1), keys)
        scores = np.exp(scores / np.sqrt(q_hp.shape[-1]))
        share = scores / scores.sum(axis=1, keepdims=True)
        total += weights[index][:, None] * np.einsum("hc,chp->hp", share, values)
    return np.einsum("hp,hpd->d", total, p["o_proj"]["kernel"])


def expand(plan):
    """A plan's kinds: letters as lists, that Python adds and multiplies."""
    return eval(plan.replace(",", "+"), {kind: [kind] for kind in "MAH"})


def attention_layer(p, config, x_td):
    h = x_td + mixer(p["mixer"], config, rms(x_td, config.norm_eps) * p["norm"]["scale"])
    read = [attention_read(p["attention"], config, h, h, t) for t in range(len(h))]
    return h + np.stack(read)


def mamba_layer(p, config, x_td):
    return x_td + mixer(p["mixer"], config, rms(x_td, config.norm_eps) * p["norm"]["scale"])


def hybrid_layer(p, config, x_td):
    eps = config.norm_eps
    m = mixer(p["mixer"], config, rms(x_td, eps) * p["norm"]["scale"])
    h = x_td + m
    s = h.copy()
    inside = config.recursion_reads_attention and config.recursion_depth > 0
    read_all = lambda source, query: np.stack(
        [attention_read(p["attention"], config, source, query, t) for t in range(len(x_td))]
    )
    for k in range(config.recursion_depth):
        r = p["recursion"]
        unit = rms(s, eps)
        source = unit * r["norm"]["scale"]
        if config.pass_embedding:
            source = source + r["pass_embedding"][k]
        change = silu(source @ r["up"]["kernel"]) @ r["down"]["kernel"]
        if inside and config.attention_scales:
            change = change + read_all(h, s)
        row = 0 if config.shared_gate else k
        if config.gate == "channel":
            s = s + r["gate"]["scale"][row] * change
            continue
        gate = sigmoid(unit @ r["gate"]["kernel"][row] + r["gate"]["bias"][row])
        taken = gate > config.gate_skip_threshold
        s = s + np.where(taken, gate, 0)[:, None] * change
    r = s - h
    if config.attention_scales and not inside:
        r = r + read_all(s, s)
    if config.fusion == "sum":
        return h + r
    fused = np.concatenate([m, r], axis=-1) @ p["fusion"]["proj"]["kernel"]
    if config.fusion == "residual_zero":
        return s + fused if inside or not config.attention_scales else h + r + fused
    fused = rms(fused, eps) * p["fusion"]["norm"]["scale"]
    return h + fused if config.fusion == "residual_norm" else fused


def logits(params, config, tokens_t):
    """float64 logits (t, v) of one document."""
    as64 = lambda tree: {
        key: as64(value) if isinstance(value, dict) else np.asarray(value, np.float64)
        for key, value in tree.items()
    }
    params = as64(params)
    pick = lambda tree, i: {
        key: pick(value, i) if isinstance(value, dict) else value[i] for key, value in tree.items()
    }
    x = params["embed"]["embedding"][np.asarray(tokens_t)]
    own_kind = {"mamba": "M", "hybrid": "H"}[config.family]
    kinds = expand(config.plan) if config.plan else [own_kind] * config.n_layers
    layer_of = {"M": mamba_layer, "A": attention_layer, "H": hybrid_layer}
    for i, kind in enumerate(kinds):
        several = len(set(kinds)) > 1
        stack = params["layers"][kind] if several else params["layers"]
        x = layer_of[kind](pick(stack, kinds[:i].count(kind) if several else i), config, x)
    x = rms(x, config.norm_eps) * params["norm_f"]["scale"]
    head = params["embed"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"]
    return x @ head.T
