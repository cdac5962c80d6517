"""The decoder of LLaMA, Mistral, Qwen2 and Baichuan (RMSNorm, SwiGLU, grouped-query attention, RoPE), that of GPT-J and Phi (attention and
MLP side by side), training loss and greedy generation.

Notable choices:
- Positions are an input. cos and sin are computed once a forward pass from the actual positions and shared by all layers.
- Attention is `scaled_dot_product_attention`, causal by token order, with no mask tensor: memory stays linear in T.
- The loss never holds all logits: it runs over chunks of tokens and takes their gradients at once, in the forward pass.
- Without gradients a long text goes through each block's matrix products in chunks too: a million tokens need a few GiB.
- No buffers: a model built on the meta device needs nothing but its parameters.

Shapes: B batch, T tokens, C hidden_dim, H n_heads, K n_kv_heads, D head_dim, V vocab_size.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from rope import apply_rope, by_length, query_scale, rope_cos_sin, rope_frequencies

ROWS = 65536  # tokens of a long text that go through a block's matrix products together when no gradient is wanted


@dataclass
class Config:
    vocab_size: int
    hidden_dim: int
    intermediate_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # the window, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's terms, see rope.py
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    dtype: str = "float32"  # of the weights on disk
    model_type: str = "llama"  # Hugging Face's name of the family
    rotary_dim: int | None = None  # RoPE turns so many dimensions of each head, the first ones; None: all
    normalised_head: bool = False  # Baichuan2

    def __post_init__(self):
        self.rotary_dim = self.rotary_dim or self.head_dim

    @property
    def parallel(self):
        """Attention and MLP side by side (ParallelBlock), LayerNorm, a bias on the head."""
        return self.model_type in ("gptj", "phi")

    @property
    def qkv_bias(self):
        return self.model_type in ("qwen2", "phi")

    @property
    def o_bias(self):
        return self.model_type == "phi"

    @property
    def original_window(self):
        """Tokens that the model saw before any interpolation that its scaling tells of (ntk is written as another theta, which does not)."""
        return (self.rope_scaling or {}).get("original_max_position_embeddings") or self.max_position_embeddings

    def flops_per_token(self, T):
        """Of one training step: 6 per weight in a matrix product, and causal attention counted once (not its masked half)."""
        mlp = (2 if self.parallel else 3) * self.hidden_dim * self.intermediate_dim
        block = self.hidden_dim * (2 * self.n_heads + 2 * self.n_kv_heads) * self.head_dim + mlp
        return 6 * (self.n_layers * block + self.vocab_size * self.hidden_dim) + 6 * self.n_layers * self.n_heads * self.head_dim * T


class Linear(nn.Linear):
    """Computes in the dtype of x: master weights in float32 are rounded where they are used, and their gradients arrive in float32."""

    def rows(self):
        return self.weight

    def rows_and_bias(self, dtype):
        return self.rows().to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        return F.linear(x, *self.rows_and_bias(x.dtype))


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight, and rounded then: a master weight near 1 would lose most of its small updates to bfloat16."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """As RMSNorm."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention: what both kinds of block have. A block is qkv, then attention, then rest; only attention mixes tokens."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_dim, config.head_dim
        self.head_dim = D
        self.q = Linear(C, config.n_heads * D, bias=config.qkv_bias)
        self.k = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.v = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.o = Linear(config.n_heads * D, C, bias=config.o_bias)

    def qkv(self, x, cos, sin, scale=None):
        """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, K, D), queries and keys turned to their positions."""
        h = self.attn_norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)) for w in (self.q, self.k, self.v))
        q = apply_rope(q, cos, sin) if scale is None else apply_rope(q, cos * scale, sin * scale)
        return q, apply_rope(k, cos, sin), v

    def forward(self, x, cos, sin, scale=None, cache=None, start=0):
        """x (B, T, C) -> (B, T, C). cos, sin: see rope_cos_sin; scale: of the queries, None or (1, T, 1, 1).
        cache: None or (keys, values), each (B, S, K, D), whose first `start` places are filled."""
        if cache is None and x.shape[1] > ROWS and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.forward_in_rows(x, cos, sin, scale)
        q, k, v = self.qkv(x, cos, sin, scale)
        if cache is not None:
            end = start + x.shape[1]
            for new, whole in zip((k, v), cache):
                whole[:, start:end] = new
            k, v = (whole[:, :end] for whole in cache)
        return self.rest(x, attention(q, k, v))

    def forward_in_rows(self, x, cos, sin, scale):
        """forward without gradients, in x itself: all but attention for ROWS tokens at a time, so that little more is in memory than
        x, queries, keys and values."""
        parts = [slice(i, i + ROWS) for i in range(0, x.shape[1], ROWS)]
        pieces = [self.qkv(x[:, part], *(None if a is None else a[:, part] for a in (cos, sin, scale))) for part in parts]
        q, k, v = (torch.cat(piece, dim=1) for piece in zip(*pieces))
        del pieces
        attended = attention(q, k, v)
        del q, k, v
        for part in parts:
            x[:, part] = self.rest(x[:, part], attended[:, part])
        return x


class Block(Attention):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config):
        super().__init__(config)
        C = config.hidden_dim
        self.attn_norm = RMSNorm(C, eps=config.norm_eps)
        self.mlp_norm = RMSNorm(C, eps=config.norm_eps)
        self.gate = Linear(C, config.intermediate_dim, bias=False)
        self.up = Linear(C, config.intermediate_dim, bias=False)
        self.down = Linear(config.intermediate_dim, C, bias=False)

    def rest(self, x, attended):
        """x (B, T, C), attended (B, T, H * D) -> (B, T, C)."""
        x = x + self.o(attended)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class ParallelBlock(Attention):
    """x + attention(h) + MLP(h) with h = norm(x), as in GPT-J and Phi."""

    def __init__(self, config):
        super().__init__(config)
        self.attn_norm = LayerNorm(config.hidden_dim, eps=config.norm_eps)  # the MLP's too
        self.up = Linear(config.hidden_dim, config.intermediate_dim)
        self.down = Linear(config.intermediate_dim, config.hidden_dim)

    def rest(self, x, attended):
        """x (B, T, C), attended (B, T, H * D) -> (B, T, C)."""
        return x + self.o(attended) + self.down(F.gelu(self.up(self.attn_norm(x)), approximate="tanh"))


class Head(Linear):
    """Hidden states (…, C) -> logits (…, V). Baichuan2's takes each row of its weight at unit length. The weight stays the parameter:
    Baichuan's own code overwrites it in evaluation, after which it learns no more."""

    def __init__(self, config):
        super().__init__(config.hidden_dim, config.vocab_size, bias=config.parallel)
        self.normalised = config.normalised_head

    def rows(self):
        return F.normalize(self.weight) if self.normalised else self.weight


def attention(q, k, v):
    """Causal attention of the last T of S tokens. q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H * D)."""
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T or S, D)
    grouped = k.shape[1] != q.shape[1]
    if T == S:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:  # is_causal lines up the first query with the first key; with a cache the last query belongs to the last key
        mask = None if T == 1 else causal_lower_right(T, S)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_dim)
        block, norm = (ParallelBlock, LayerNorm) if config.parallel else (Block, RMSNorm)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = norm(config.hidden_dim, eps=config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.compute_dtype = None  # of the hidden states, where it is not that of the weights
        self.cross_entropy = cross_entropy_and_gradient  # fsdp.py puts a compiled one here

    def to_empty(self, **device):
        """As of any module, but a tied head stays tied."""
        super().to_empty(**device)
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        return self

    def forward(self, tokens, positions=None, targets=None):
        """tokens int64 (B, T), positions int64 (B, T), default 0 … T-1 -> logits (B, T, V).
        With targets int64 (B, N), of the last N tokens: the summed cross-entropy in nats, a float32 scalar, without ever holding all logits."""
        h = self.hidden(tokens, positions)
        if targets is None:
            return self.head(h)
        return self.loss(h[:, -targets.shape[1] :].flatten(0, 1), targets.flatten())

    def loss(self, hidden, targets):
        """Summed cross-entropy in nats of normed hidden states (N, C) against targets int64 (N,)."""
        return chunked_cross_entropy(hidden, *self.head.rows_and_bias(hidden.dtype), targets, self.cross_entropy)

    def hidden(self, tokens, positions=None, cache=None, start=0, seq_len=None):
        """The normed last hidden states (B, T, C); `head` turns the ones you need into logits.
        seq_len: tokens in the whole sequence, for `dynamic` and `longrope` (default: of each row, up to its largest position)."""
        config = self.config
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if seq_len is None and by_length(config.rope_scaling):
            # Each row by its own length, in this call only: neither earlier batches nor its neighbours change an example's loss.
            rows = [rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, n) for n in (positions.amax(1) + 1).tolist()]
            inv_freq, attention_factor = torch.stack([inv_freq for inv_freq, _ in rows]), rows[0][1]
        else:
            inv_freq, attention_factor = rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, seq_len)
        cos, sin = rope_cos_sin(positions, inv_freq, attention_factor)
        scale = query_scale(config.rope_scaling, start, start + tokens.shape[1], tokens.device)
        x = self.embed(tokens).to(self.compute_dtype or self.embed.weight.dtype)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, scale, cache and cache[i], start)
        return self.norm(x)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, prefill_chunk=2048):
        """Greedy continuation of tokens int64 (B, T) -> (B, max_new_tokens). The prompt is read `prefill_chunk` tokens at a time.
        Angles that depend on the length (`dynamic`, `longrope`) are from the first token on those of one forward pass over all but the last
        new token, which is never read."""
        config, (B, T) = self.config, tokens.shape
        seq_len = T + max_new_tokens - 1
        shape = (B, seq_len, config.n_kv_heads, config.head_dim)
        dtype = self.compute_dtype or self.embed.weight.dtype
        cache = [tuple(torch.empty(shape, dtype=dtype, device=tokens.device) for _ in range(2)) for _ in self.blocks]
        for start in range(0, T, prefill_chunk):
            h = self.hidden(tokens[:, start : start + prefill_chunk], cache=cache, start=start, seq_len=seq_len)
        new = [self.head(h[:, -1:]).argmax(-1)]  # each (B, 1)
        for start in range(T, seq_len):
            new.append(self.head(self.hidden(new[-1], cache=cache, start=start, seq_len=seq_len)).argmax(-1))
        return torch.cat(new, dim=1)


def cross_entropy_and_gradient(logits, targets):
    """Summed cross-entropy of logits (N, V), a float32 scalar, and its gradient with respect to them, softmax minus one-hot, in their dtype."""
    z = logits.float()
    log_sum = z.logsumexp(-1, keepdim=True)
    right = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    loss = (log_sum[:, 0] - torch.where(right, z, 0.0).sum(-1)).sum()
    return loss, ((z - log_sum).exp() - right.float()).to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden (N, C) @ weight (V, C).T + bias (V,) or None against targets (N,), `rows` tokens at a time. The gradients
    are computed in the forward pass, where a chunk's logits are at hand: the backward pass neither keeps nor recomputes them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, cross_entropy):
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for h, d_h, t in zip(hidden.split(rows), d_hidden.split(rows), targets.split(rows)):
            loss, d_logits = cross_entropy(F.linear(h, weight, bias), t)
            total += loss
            torch.mm(d_logits, weight, out=d_h)
            d_weight += d_logits.T @ h
            if bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype), None if bias is None else d_bias.to(bias.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if d is None else d * grad for d in ctx.saved_tensors), None, None, None


def chunked_cross_entropy(hidden, weight, bias, targets, cross_entropy=cross_entropy_and_gradient, max_logits=2**28):
    """Summed cross-entropy in nats, a float32 scalar, with at most max_logits logits in memory. Shapes as in ChunkedCrossEntropy."""
    rows = 2 ** max(0, (max_logits // len(weight)).bit_length() - 1)  # a power of two, so that chunks are equal for usual N
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, rows, cross_entropy)
    pieces = zip(hidden.split(rows), targets.split(rows))
    return sum(F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="sum") for h, t in pieces)
