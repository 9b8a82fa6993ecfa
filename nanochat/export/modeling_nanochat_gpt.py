"""The model for transformers: this file travels in every exported folder and needs only torch and transformers there.

Loaded with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. Parameter names are those of
nanochat's own checkpoints. The maths is that of nanochat/gpt.py, which explains it; a test compares the two. The
calculator that nanochat's engine runs inside replies is not part of it: a reply that asks for it must be answered by
the caller.

Shape letters: B rows, T new positions, Tk all positions, C width, H heads, Hkv key/value heads, D head dim, V
vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers renamed the cache's argument and field from past_key_values to cache
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanochatGPTConfig(PretrainedConfig):
    """The shape of a model, in transformers' names; the constants of nanochat/gpt.py are stored with it."""

    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size=32768,
        padded_vocab_size=32768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        attention_windows=None,  # earlier tokens that a token sees, one entry a layer; None: all
        window_pattern="L",  # where attention_windows come from
        rms_norm_eps=2.0**-23,
        rotary_base=100_000,
        query_key_scale=1.2,
        value_gate_scale=3.0,
        value_gate_channels=12,
        smear_channels=24,
        logit_softcap=15.0,
        **kwargs,
    ):
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.intermediate_size = hidden_size // num_attention_heads, 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.attention_windows = attention_windows or [max_position_embeddings] * num_hidden_layers
        self.window_pattern = window_pattern
        self.rms_norm_eps, self.rotary_base, self.query_key_scale = rms_norm_eps, rotary_base, query_key_scale
        self.value_gate_scale, self.value_gate_channels = value_gate_scale, value_gate_channels
        self.smear_channels, self.logit_softcap = smear_channels, logit_softcap
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(tie_word_embeddings=False, **kwargs)

    def has_value_embedding(self, layer):
        """Every other layer, such that the last has one."""
        return layer % 2 == (self.num_hidden_layers - 1) % 2


def matrix(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.attention_windows[layer]
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.c_q, self.c_k, self.c_v = matrix(width, width), matrix(width, kv_width), matrix(width, kv_width)
        self.c_proj = matrix(width, width)
        if config.has_value_embedding(layer):
            self.ve_gate = matrix(min(config.value_gate_channels, width), config.num_key_value_heads)

    def forward(self, x, embedded, rope, mask, cache):
        """x (B, T, C), embedded (B, T, Hkv D) or None, mask (B, 1, T, Tk) without this layer's window -> (B, T, C)."""
        c, (b, t, _) = self.config, x.shape
        q, k, v = (m(x).view(b, t, -1, c.head_dim) for m in (self.c_q, self.c_k, self.c_v))
        if embedded is not None:
            gate = c.value_gate_scale * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))
            v = v + gate.unsqueeze(-1) * embedded.view_as(v)
        norm = lambda y: F.rms_norm(y, (c.head_dim,), eps=c.rms_norm_eps) * c.query_key_scale
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.within(mask), enable_gqa=q.size(1) != k.size(1))
        return self.c_proj(y.transpose(1, 2).reshape(b, t, -1))

    def within(self, mask):
        """The mask without the keys that lie before this layer's window."""
        t, tk = mask.shape[-2:]
        if self.window >= tk - 1:
            return mask
        query = torch.arange(tk - t, tk, device=mask.device)[:, None]
        return mask & (torch.arange(tk, device=mask.device)[None, :] >= query - self.window)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = matrix(config.hidden_size, config.intermediate_size)
        self.c_proj = matrix(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp, self.eps = Attention(config, layer), MLP(config), config.rms_norm_eps

    def forward(self, x, x0, scales, embedded, rope, mask, cache):
        x = scales[0] * x + scales[1] * x0
        x = x + self.attn(F.rms_norm(x, (x.size(-1),), eps=self.eps), embedded, rope, mask, cache)
        return x + self.mlp(F.rms_norm(x, (x.size(-1),), eps=self.eps))


def rotate(x, cos, sin):
    """x (B, T, H, D), cos and sin (B, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def visible(t, tk, attention_mask, device):
    """(B or 1, 1, T, Tk) bool: what a query may see, windows aside. A padded query sees itself, so nothing is NaN."""
    query, key = torch.arange(tk - t, tk, device=device)[:, None], torch.arange(tk, device=device)[None, :]
    mask = (key <= query)[None, None]
    if attention_mask is not None:
        mask = (mask & attention_mask[:, None, None, :tk].bool()) | (key == query)
    return mask


class NanochatGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head."""

    config_class = NanochatGPTConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        layers, padded = range(config.num_hidden_layers), config.padded_vocab_size
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(padded, width), "h": nn.ModuleList(Block(config, i) for i in layers)}
        )
        self.lm_head = matrix(width, padded)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(padded, kv_width) for i in layers if config.has_value_embedding(i)}
        )
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.smear_gate = matrix(min(config.smear_channels, width), 1)
        self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module):
        """Nothing: every weight comes from the file."""

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """As transformers does, and the id before the new ones, which smear mixes in."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        new = inputs["input_ids"].size(1)
        if new < input_ids.size(1):
            inputs["previous_ids"] = input_ids[:, -new - 1 : -new]
        return inputs

    def forward(
        self,
        input_ids,  # (B, T)
        attention_mask=None,  # (B, Tk), 1 = a token, 0 = padding
        position_ids=None,  # (B, T)
        cache=None,
        past_key_values=None,
        previous_ids=None,  # (B, 1) the token before the new ones; by default the cache remembers it
        labels=None,  # (B, T), -100 = ignored; shifted here, as everywhere in transformers
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        seen = cache.get_seq_length() if cache is not None else 0
        tk = seen + input_ids.size(1)
        if tk > self.config.max_position_embeddings:
            raise ValueError(f"{tk} tokens do not fit the model's context of {self.config.max_position_embeddings}.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (rows, positions): use no other cache than DynamicCache.")
        rope = self._rope(input_ids, attention_mask, position_ids, tk)
        x = self._hidden(input_ids, previous_ids, attention_mask, rope, cache, seen)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(self.lm_head(x[:, keep])[..., : self.config.vocab_size].float() / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if cache is not None:
            cache.last_ids = input_ids[:, -1:]
        if return_dict is False:
            return (loss, logits, cache)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _hidden(self, ids, previous_ids, attention_mask, rope, cache, seen):
        """The final hidden states (B, T, C)."""
        t, norm = ids.size(1), lambda y: F.rms_norm(y, (y.size(-1),), eps=self.config.rms_norm_eps)
        wte = self.transformer["wte"]
        x = norm(wte(ids))
        if seen:
            previous_ids = cache.last_ids if previous_ids is None else previous_ids
            before = norm(wte(previous_ids))
        else:
            before = torch.zeros_like(x[:, :1])
        previous = torch.cat([before, x[:, :-1]], dim=1)
        if attention_mask is not None:  # padding before the first token is nothing, not a token
            tokens = F.pad(attention_mask, (1, 0))[:, seen : seen + t]
            previous = previous * tokens.unsqueeze(-1).to(x.dtype)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
        x = x0 = x + self.smear_lambda * gate * previous
        mask, middle = visible(t, seen + t, attention_mask, x.device), None
        for i, block in enumerate(self.transformer["h"]):
            embedded = self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None
            x = block(x, x0, (self.resid_lambdas[i], self.x0_lambdas[i]), embedded, rope, mask, cache)
            if i == self.config.num_hidden_layers // 2:
                middle = x
        return norm(x - self.backout_lambda * middle)

    def _rope(self, ids, attention_mask, position_ids, tk):
        """(cos, sin), each (B or 1, T, 1, D/2); angles in fp64, so that they agree with nanochat's table."""
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask[:, :tk].long().cumsum(-1) - 1).clamp(min=0)[:, -ids.size(1) :]
        if position_ids is None:
            position_ids = torch.arange(tk - ids.size(1), tk, device=ids.device)[None]
        half = self.config.head_dim // 2
        place = "cpu" if ids.device.type == "mps" else ids.device  # MPS has no fp64
        speed = self.config.rotary_base ** -(torch.arange(half, dtype=torch.float64, device=place) / half)
        angle = position_ids.to(place, torch.float64)[..., None] * speed
        return tuple(f.unsqueeze(-2).to(ids.device, self.lm_head.weight.dtype) for f in (angle.cos(), angle.sin()))
