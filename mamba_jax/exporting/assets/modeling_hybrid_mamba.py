"""Hybrid Recursive Mamba for transformers: the model that mamba_jax trains, in PyTorch.

A layer is a Mamba mixer, then a recursion whose steps are weighted by learned depth gates and read
causal attention over mean-pooled blocks at several scales, then a fusion:

    m = mixer(norm(x));  h = x + m;  s = recursion(h);  x' = h + rms(W [m ; s - h])

``layer_pattern`` has a letter for each layer: H such a one, A the mixer and one read of the
attention, x' = h + attention(h), M the mixer alone.

Each row is one document; padding is skipped wherever the attention mask marks it. The cache is of
fixed size. Residual stream, norms, gates and softmax are float32; matrix products are in the dtype
of the weights.

Runs in transformers 5.0 and newer.

Legend: b batch, t time, d hidden size, e inner size, n state size, r rank of dt, k conv width,
h heads, p head size, j tokens remembered, c blocks, s scale.
"""

import dataclasses
import typing

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import utils as generation_utils
from transformers.utils import ModelOutput

OLDEST_TRANSFORMERS = "5.0.0"
if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"this model needs transformers {OLDEST_TRANSFORMERS} or newer: {transformers.__version__} "
        f"is installed; run pip install 'transformers>={OLDEST_TRANSFORMERS}'"
    )
# generate keeps the cache under the first of its names: "cache" since transformers 5.24,
# "past_key_values" before. Beam search in the oldest releases reorders no other.
CACHE_NAME = getattr(generation_utils, "ALL_CACHE_NAMES", ("cache",))[0]
CACHE_NAMES = ["cache", "cache_params", "past_key_values"]

CHUNK_TOKENS = 256  # processed at a time, so that memory is linear in the length of the text
ROPE_BASE = 10_000.0


class HybridMambaConfig(PretrainedConfig):
    model_type = "hybrid_mamba"
    keys_to_ignore_at_inference = CACHE_NAMES  # Trainer gathers the other outputs

    def __init__(
        self,
        vocab_size=257,
        hidden_size=768,
        num_hidden_layers=12,
        state_size=16,
        conv_kernel=4,
        expand=2,
        time_step_rank=48,
        layer_norm_epsilon=1e-5,
        recursion_depth=3,
        recursion_expand=2,
        recursion_reads_attention=True,
        attention_scales=(1, 2, 4),
        attention_window=256,
        attention_head_size=64,
        fusion="residual_norm",
        eigenvalues="positive",
        gate="token",
        shared_gate=False,
        pass_embedding=False,
        layer_pattern=None,
        tie_word_embeddings=True,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        self.expand = expand
        self.intermediate_size = expand * hidden_size
        self.time_step_rank = time_step_rank
        self.layer_norm_epsilon = layer_norm_epsilon
        self.recursion_depth = recursion_depth
        self.recursion_expand = recursion_expand
        self.recursion_reads_attention = recursion_reads_attention
        self.attention_scales = list(attention_scales)
        self.attention_window = attention_window
        self.attention_head_size = attention_head_size
        self.fusion = fusion
        self.eigenvalues = eigenvalues
        self.gate = gate
        self.shared_gate = shared_gate
        self.pass_embedding = pass_embedding
        self.layer_pattern = layer_pattern or "H" * num_hidden_layers
        if len(self.layer_pattern) != num_hidden_layers:
            raise ValueError(
                f"layer_pattern={layer_pattern} does not have num_hidden_layers="
                f"{num_hidden_layers} letters; give one for each layer"
            )
        self.use_cache = use_cache
        kwargs.pop("intermediate_size", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class HybridMambaCache:
    """The state after a text: per layer a dict of tensors whose first axis is the batch.

    Every call of the model that takes a cache also updates it.
    """

    is_compileable = is_croppable = False
    is_linear = (False,)  # generate then removes the cached text from a prompt

    def __init__(self, layers, length_b):
        self.layers = layers
        self.length_b = length_b  # tokens read, padding not counted
        self.seen_tokens = 0  # padding counted

    def get_seq_length(self, layer_idx=0):
        return self.seen_tokens

    def reorder_cache(self, beam_idx):
        self.length_b = self.length_b[beam_idx]
        self.layers = [{name: x[beam_idx] for name, x in layer.items()} for layer in self.layers]


def normalise(x, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def product(linear, x):
    """A matrix product in the dtype of the weights."""
    return linear(x.to(linear.weight.dtype))


class RowLinear(nn.Linear):
    """A matrix product with some rows of the weight; result and bias are float32.

    PEFT and accelerate replace or move modules around their calls, so no other code uses the
    weight.
    """

    def forward(self, x, rows=slice(None), dtype=None):
        weight = self.weight[rows].to(dtype or self.weight.dtype)
        y = F.linear(x.to(weight.dtype), weight).float()
        return y if self.bias is None else y + self.bias[rows].float()


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return normalise(x, self.eps) * self.weight.float()


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, e, n, r = (
            config.hidden_size,
            config.intermediate_size,
            config.state_size,
            config.time_step_rank,
        )
        self.sizes = (r, n, n)
        self.signed = config.eigenvalues == "signed"
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, config.conv_kernel, groups=e)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = RowLinear(r, e)
        self.A_log = nn.Parameter(torch.zeros(e, n))
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=False)

    def forward(self, u_btd, valid_bt, cache):
        valid_bt1 = valid_bt[..., None]
        x_bte, z_bte = product(self.in_proj, u_btd).chunk(2, dim=-1)
        # Padding before a text acts like the start of a text: zeros.
        x_bet = torch.cat([cache["conv"].to(x_bte.dtype), (x_bte * valid_bt1).mT], dim=-1)
        width = self.conv1d.weight.shape[-1]
        conv_state = x_bet[..., x_bet.shape[-1] - width + 1 :]
        x_bte = F.silu(self.conv1d(x_bet).mT)
        dt_btr, B_btn, C_btn = product(self.x_proj, x_bte).split(self.sizes, dim=-1)
        dt_bte = (
            F.softplus(self.dt_proj(dt_btr)) * valid_bt1
        )  # a step of length 0 does not change the state
        A_en, x_bte = -self.A_log.float().exp(), x_bte.float()
        decay_bten = torch.exp(dt_bte[..., None] * A_en)
        if self.signed:
            decay_bten = 2 * decay_bten - 1
        input_bten = (dt_bte * x_bte)[..., None] * B_btn.float()[:, :, None]
        state_ben, states = cache["ssm"], []
        for t in range(u_btd.shape[1]):
            state_ben = decay_bten[:, t] * state_ben + input_bten[:, t]
            states.append(state_ben)
        y_bte = torch.einsum("bten,btn->bte", torch.stack(states, dim=1), C_btn.float())
        y_bte = (y_bte + self.D.float() * x_bte) * F.silu(z_bte.float())
        out_btd = product(self.out_proj, y_bte).float()
        return out_btd, {"conv": conv_state, "ssm": state_ben}


class ChannelGate(nn.Module):
    """A factor per step and channel, the same for all tokens; it is called as a RowLinear is."""

    def __init__(self, size, rows):
        super().__init__()
        self.scale = nn.Parameter(torch.full((rows, size), 0.5))

    def forward(self, x, rows, dtype):
        return self.scale[rows].to(dtype)


class Recursion(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, hidden = config.hidden_size, config.recursion_expand * config.hidden_size
        self.depth, self.shared_gate = config.recursion_depth, config.shared_gate
        self.by_token = config.gate == "token"
        self.norm = RMSNorm(d, config.layer_norm_epsilon)
        self.up = nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)
        gate = RowLinear if self.by_token else ChannelGate
        self.gate = gate(d, 1 if self.shared_gate else self.depth)
        zeros_kd = torch.zeros(self.depth, d)
        self.pass_embedding = nn.Parameter(zeros_kd) if config.pass_embedding else None

    def forward(self, s_btd, read):
        for step in range(self.depth):
            row = 0 if self.shared_gate else step
            unit_btd = normalise(s_btd, self.norm.eps)
            gate = self.gate(unit_btd, slice(row, row + 1), torch.float32)
            if self.by_token:
                gate = gate.sigmoid()
            input_btd = self.norm(s_btd)
            if self.pass_embedding is not None:
                input_btd = input_btd + self.pass_embedding[step].float()
            change_btd = product(self.down, F.silu(product(self.up, input_btd))).float()
            if read is not None:
                change_btd = change_btd + read(s_btd)
            s_btd = s_btd + gate * change_btd
        return s_btd


def rotate(x_bthp, number_bt):
    half = x_bthp.shape[-1] // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=x_bthp.device).float() / half)
    angle = number_bt[..., None, None].float() * frequency
    a, b = x_bthp[..., :half], x_bthp[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """At scale s a token reads the newest ``window`` complete blocks of s tokens: their means."""

    def __init__(self, config):
        super().__init__()
        d, p = config.hidden_size, config.attention_head_size
        self.shape = (d // p, p)
        self.scales, self.window = config.attention_scales, config.attention_window
        self.norm = RMSNorm(d, config.layer_norm_epsilon)
        self.qkv = RowLinear(d, 3 * d, bias=False)
        self.query_norm = RMSNorm(p, config.layer_norm_epsilon)
        self.key_norm = RMSNorm(p, config.layer_norm_epsilon)
        self.scale_logits = nn.Parameter(torch.zeros(len(self.scales), self.shape[0]))
        self.o_proj = nn.Linear(d, d, bias=False)

    def remember(self, x_btd, position_bt, cache):
        """Returns per scale keys and values (b, c, h, p) and block numbers (b, c); the cache."""
        kv_btd = self.qkv(self.norm(x_btd), slice(x_btd.shape[-1], None))
        kv_bjd = torch.cat([cache["kv"], kv_btd], dim=1)
        n_tokens, t = kv_bjd.shape[1], x_btd.shape[1]
        last_b = position_bt[:, -1]
        memories = []
        for scale in self.scales:
            n_blocks = self.window + -(-t // scale)
            done_b = torch.div(last_b + 1, scale, rounding_mode="floor")
            number_bc = (done_b - n_blocks)[:, None] + torch.arange(n_blocks, device=x_btd.device)
            token = number_bc[..., None] * scale + torch.arange(scale, device=x_btd.device)
            index = (n_tokens - 1 - (last_b[:, None, None] - token)).clamp(min=0).flatten(1)
            taken = kv_bjd.gather(1, index[..., None].expand(-1, -1, kv_bjd.shape[-1]))
            pooled = taken.unflatten(1, (n_blocks, scale)).mean(2).unflatten(-1, (2, *self.shape))
            k = rotate(self.key_norm(pooled[:, :, 0]), number_bc)
            memories.append((k, pooled[:, :, 1], number_bc))
        return memories, {"kv": kv_bjd[:, n_tokens - cache["kv"].shape[1] :]}

    def forward(self, x_btd, position_bt, memories):
        q = self.qkv(self.norm(x_btd), slice(x_btd.shape[-1])).unflatten(-1, self.shape)
        q = self.query_norm(q)
        mix_sh = self.scale_logits.float().softmax(0) * len(self.scales)
        y_bthp = torch.zeros_like(q)
        for mix_h, scale, (k, v, number_bc) in zip(mix_sh, self.scales, memories, strict=True):
            newest_bt = torch.div(position_bt + 1, scale, rounding_mode="floor") - 1
            behind_btc = newest_bt[..., None] - number_bc[:, None]
            seen = (behind_btc >= 0) & (behind_btc < self.window) & (number_bc[:, None] >= 0)
            scores = torch.einsum("bthp,bchp->bhtc", rotate(q, newest_bt), k) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1) * seen[:, None]  # no complete block: zeros
            y_bthp = y_bthp + mix_h[:, None] * torch.einsum("bhtc,bchp->bthp", weights, v)
        return product(self.o_proj, y_bthp.flatten(-2)).float()


class Fusion(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.form = config.fusion
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if self.form != "residual_zero":
            self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, h_btd, m_btd, r_btd):
        fused_btd = product(self.proj, torch.cat([m_btd, r_btd], dim=-1))
        if self.form == "residual_zero":
            return h_btd + r_btd + fused_btd.float()
        fused_btd = self.norm(fused_btd)
        return h_btd + fused_btd if self.form == "residual_norm" else fused_btd


class Layer(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        recursive = kind == "H" and config.recursion_depth > 0
        attentive = kind != "M" and bool(config.attention_scales)
        self.reads_inside = recursive and attentive and config.recursion_reads_attention
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mixer(config)
        self.recursion = Recursion(config) if recursive else None
        self.attention = Attention(config) if attentive else None
        self.fusion = Fusion(config) if kind == "H" and config.fusion != "sum" else None

    def forward(self, x_btd, valid_bt, position_bt, cache):
        m_btd, new_cache = self.mixer(self.norm(x_btd), valid_bt, cache)
        h_btd = s_btd = x_btd + m_btd

        def reader(of_btd):
            memories, remembered = self.attention.remember(of_btd, position_bt, cache)
            new_cache.update(remembered)
            return lambda at_btd: self.attention(at_btd, position_bt, memories)

        read = reader(h_btd) if self.reads_inside else None
        if self.recursion is not None:
            s_btd = self.recursion(h_btd, read)
        r_btd = s_btd - h_btd
        if self.attention is not None and not self.reads_inside:
            r_btd = r_btd + reader(s_btd)(s_btd)
        if self.fusion is None:
            return h_btd + r_btd, new_cache
        return self.fusion(h_btd, m_btd, r_btd), new_cache


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def run_layer(self, layer, *arguments):
        if self.gradient_checkpointing and self.training:
            # A reentrant checkpoint would drop the gradients of the tensors in the cache's dict.
            return self._gradient_checkpointing_func(
                layer.__call__, *arguments, use_reentrant=False
            )
        return layer(*arguments)


@dataclasses.dataclass
class HybridMambaOutput(ModelOutput):
    """The cache is available under three names, because releases of transformers differ."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: HybridMambaCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    @property
    def cache_params(self):
        return self.cache

    @property
    def past_key_values(self):
        return self.cache

    def __getitem__(self, key):
        return super().__getitem__("cache" if key in CACHE_NAMES else key)


def only_cache(*caches):
    """Returns the cache that was given under one of its names, None without one."""
    given = [cache for cache in caches if cache is not None]
    for cache in given:
        if not isinstance(cache, HybridMambaCache) or cache is not given[0]:
            kinds = " and ".join(type(cache).__name__ for cache in given)
            raise ValueError(
                f"cache: this model takes one HybridMambaCache, not {kinds}; "
                "pass the cache that an earlier output holds"
            )
    return given[0] if given else None


class HybridMambaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HybridMambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules: typing.ClassVar = ["Layer"]
    _skip_keys_device_placement: typing.ClassVar = CACHE_NAMES
    _is_stateful = True
    _tied_weights_keys: typing.ClassVar = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.backbone.embeddings

    def set_input_embeddings(self, embeddings):
        self.backbone.embeddings = embeddings

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        cache=None,
        cache_params=None,
        past_key_values=None,
        next_sequence_length=None,
        is_first_iteration=None,
        **kwargs,
    ):
        """Removes the tokens that are in the cache; the mask covers the whole text."""
        cache = only_cache(cache, cache_params, past_key_values)
        n_read = 0 if cache is None else cache.seen_tokens
        inputs = kwargs | {"attention_mask": attention_mask, "cache": cache}
        if inputs_embeds is not None and n_read < inputs_embeds.shape[1]:
            return inputs | {"inputs_embeds": inputs_embeds[:, n_read:]}
        n_ids = n_new = input_ids.shape[1]
        if next_sequence_length is not None:
            n_new = next_sequence_length
        elif cache is not None and attention_mask is not None:
            n_new = attention_mask.shape[1] - n_read
        if not 0 < n_new <= n_ids:
            raise ValueError(
                f"input_ids: {n_ids} tokens do not continue the {n_read} in the cache; "
                "pass the whole text, or its new tokens with the attention mask of the whole text"
            )
        return inputs | {"input_ids": input_ids[:, n_ids - n_new :]}

    def generate(self, *arguments, **kwargs):
        cache = only_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        return super().generate(*arguments, **kwargs, **({CACHE_NAME: cache} if cache else {}))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.cache is not None:
            model_kwargs[CACHE_NAME] = outputs.cache
        return model_kwargs

    def _empty_cache(self, x_btd):
        config, zeros = self.config, x_btd.new_zeros
        batch, e, scales = len(x_btd), config.intermediate_size, config.attention_scales
        mixer = {
            "conv": zeros(batch, e, config.conv_kernel - 1, dtype=self.dtype),
            "ssm": zeros(batch, e, config.state_size),
        }
        attention = {}
        if scales:
            # From the oldest block that the next token may attend to; one block may be incomplete.
            n_tokens = (config.attention_window + 1) * max(scales)
            attention["kv"] = zeros(batch, n_tokens, 2 * config.hidden_size)
        layers = [
            mixer | (attention if layer.attention is not None else {})
            for layer in self.backbone.layers
        ]
        return HybridMambaCache(layers, zeros(batch, dtype=torch.long))

    def _run_layers(self, x_btd, valid_bt, cache, every):
        """Runs the layers on embeddings, float32, and updates the cache.

        Returns the residual stream after the last layer; if ``every``, also before each layer.
        """
        # Padding moves to the front, because the cache keeps the end of a row.
        order_bt = valid_bt.long().argsort(dim=1, stable=True)
        take = lambda x, index: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        splits = take(x_btd, order_bt).split(CHUNK_TOKENS, 1)
        valid_splits = valid_bt.gather(1, order_bt).split(CHUNK_TOKENS, 1)
        chunks = []
        for x_btd, chunk_bt in zip(splits, valid_splits, strict=True):
            position_bt = cache.length_b[:, None] + chunk_bt.cumsum(1) - 1
            stream, layers = [x_btd], []
            for layer, layer_cache in zip(self.backbone.layers, cache.layers, strict=True):
                x_btd, layer_cache = self.backbone.run_layer(
                    layer, x_btd, chunk_bt, position_bt, layer_cache
                )
                stream.append(x_btd)
                layers.append(layer_cache)
            cache.layers, cache.length_b = layers, position_bt[:, -1] + 1
            chunks.append(stream if every else stream[-1:])
        cache.seen_tokens += valid_bt.shape[1]
        back_bt = order_bt.argsort(dim=1)
        return [take(torch.cat(parts, dim=1), back_bt) for parts in zip(*chunks, strict=True)]

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        cache=None,
        cache_params=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """attention_mask (b, t): of the new tokens or of all, 0 marks padding; kwargs: of the loss.

        hidden_states: the embeddings, then each layer's output; the last one is normalised.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions or (output_attentions is None and config.output_attentions):
            raise ValueError(
                "output_attentions: this model has no attention weights over tokens; it attends to "
                "means of blocks; leave the argument out"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: pass exactly one of them")
        x_btd = self.backbone.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x_btd = x_btd.float()
        batch, n_tokens, _ = x_btd.shape
        cache = only_cache(cache, cache_params, past_key_values) or self._empty_cache(x_btd)
        if len(cache.length_b) != batch:
            raise ValueError(f"cache: it holds {len(cache.length_b)} rows, the inputs have {batch}")
        valid_bt = torch.ones(batch, n_tokens, dtype=torch.bool, device=x_btd.device)
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[1] < n_tokens:
                raise ValueError(
                    f"attention_mask: its shape is {tuple(attention_mask.shape)}; pass one of "
                    f"({batch}, {n_tokens}), or of the whole text, that is 0 at padding"
                )
            valid_bt = attention_mask[:, -n_tokens:].to(x_btd.device).bool()
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None:
            position_bt = cache.length_b[:, None] + valid_bt.cumsum(1) - 1
            if ((position_ids.to(position_bt.device) != position_bt) & valid_bt).any():
                raise ValueError(
                    "position_ids: this model counts the tokens of a row from its first one; pass "
                    "packed texts as rows of their own"
                )
        stream = self._run_layers(x_btd, valid_bt, cache, output_hidden_states)
        stream[-1] = self.backbone.norm_f(stream[-1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = product(self.lm_head, stream[-1][:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        output = HybridMambaOutput(
            loss=loss,
            logits=logits,
            cache=cache if use_cache else None,
            hidden_states=tuple(stream) if output_hidden_states else None,
        )
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
