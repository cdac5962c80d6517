"""The decoder: tokens and positions in, logits or the training loss out; and greedy generation.

One architecture covers LLaMA and its relatives (RMSNorm, SwiGLU, grouped-query attention) as well as GPT-J,
GPT-NeoX and Phi (LayerNorm, GELU, attention and MLP side by side). What a block computes is data in `Config`;
families are known in hf/ only.

Notable choices:
- Positions are an input. cos and sin are computed once a forward pass from the actual positions
  and shared by all layers.
- Attention is `scaled_dot_product_attention`, causal by token order, with no mask tensor: memory stays
  linear in T.
- The loss never holds all logits. It runs over chunks of tokens and computes their gradients at
  once, in the forward pass.
- Without gradients, a long text goes through each block's matrix products in slices: a million tokens need
  a few GiB.
- There are no buffers: a model built on the meta device needs nothing but its parameters.

Shapes: B batch, T tokens, C hidden_dim, H n_heads, K n_kv_heads, D head_dim, V vocab_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import float8
import rope

SLICE_TOKENS = 16384  # tokens that go through a block's matrix products together where no gradient is wanted
MAX_LOGITS = 2**28  # logits that the loss holds at once


@dataclass
class Config:
    """Everything that tells one model from another: its sizes, and what its blocks and its head compute."""

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
    rope_scaling: dict | None = None  # in Hugging Face's terms, see rope.py
    tie_embeddings: bool = False  # the head's weight is the embedding
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None  # Llama 3 has several
    dtype: str = "float32"  # of the weights as they are written, config.json's
    model_type: str = "llama"  # Hugging Face's name of the family, which only hf/ looks at
    rotary_dim: int | None = None  # RoPE turns so many dimensions of each head, the first ones; None: all
    # What a block computes:
    norm: str = "rms"  # or "layer"
    post_norm: bool = False  # the norms follow attention and MLP (OLMo 2) instead of preceding them
    qk_norm: str | None = None  # RMSNorm of queries and keys over each "head" (Qwen3), "all_heads" (OLMo 2)
    mlp: str = "swiglu"  # or "gelu", which is its tanh approximation, or "exact_gelu"
    parallel: bool = False  # attention and MLP read the same input and stand side by side
    parallel_norms: bool = False  # a norm for each of these two (GPT-NeoX) instead of one for both
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_layers: list[int] | None = None  # 1 for each layer with RoPE, 0 for one without; None: all have it
    attention_scale: float | None = None  # what products of queries and keys are multiplied by; None: D^-0.5
    residual_multiplier: float = 1.0  # of what attention and MLP add
    embedding_multiplier: float = 1.0
    # What the head computes:
    head_bias: bool = False
    normalised_head: bool = False  # each row of the head's weight is taken at unit length (Baichuan2)
    logits_divisor: float = 1.0

    def __post_init__(self):
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim

    @property
    def original_window(self):
        """The window before any interpolation that rope_scaling records, in tokens.

        (NTK is written as another theta, which does not record it.)
        """
        recorded = (self.rope_scaling or {}).get("original_max_position_embeddings")
        return recorded or self.max_position_embeddings

    def flops_per_token(self, T, frozen=False):
        """Return the operations of a training step per token, with causal attention over T tokens.

        That is 6 for each weight in a matrix product, and attention counted without its masked half.
        frozen: the weights are, and so need 4 each: 2 forward, 2 for the gradient of what they are multiplied
        with. Adapters, of which there are far fewer, are not counted.
        """
        n_mlp_products = 3 if self.mlp == "swiglu" else 2
        mlp = n_mlp_products * self.hidden_dim * self.intermediate_dim
        attention = self.hidden_dim * (2 * self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        weights = self.n_layers * (attention + mlp) + self.vocab_size * self.hidden_dim
        return (4 if frozen else 6) * weights + 6 * self.n_layers * self.n_heads * self.head_dim * T


# ---------------------------------------------------------------- layers


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input.

    Master weights in float32 are rounded where they are used, and their gradients arrive in float32.
    """

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.adapter = None  # an Adapter, where add_adapters has put one
        self.product = F.linear  # float8.linear, where multiply_in_float8 has put it

    def weight_and_bias(self, dtype):
        """Return both in a dtype, the bias None if there is none."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        # The adapter comes first, so that "full" checkpointing can leave a block's last, large product out.
        change = None if self.adapter is None else self.adapter(x)
        y = self.product(x, *self.weight_and_bias(x.dtype))
        return y if change is None else y + change


class Adapter(nn.Module):
    """What LoRA adds to a linear layer's result: alpha / rank * B A x (Hu et al. 2021, section 4.1).

    a: (rank, in_features). b: (out_features, rank), which begins at zero: see add_adapters.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        device = linear.weight.device
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def forward(self, x):
        # The gradients of a and b need x, which q, k and v share, and this small result. Of a frozen weight
        # nothing is kept but itself.
        narrow = self.scale * F.linear(x, self.a.to(x.dtype))  # (..., rank)
        return F.linear(narrow, self.b.to(x.dtype))


class Head(Linear):
    """Hidden states (..., C) -> logits (..., V).

    Baichuan2 takes each row of the weight at unit length. The weight as it is stays the parameter:
    Baichuan's own code overwrites it in evaluation, after which it learns no more.
    """

    def __init__(self, config):
        super().__init__(config.hidden_dim, config.vocab_size, bias=config.head_bias)
        self.normalised = config.normalised_head

    def weight_and_bias(self, dtype):
        if not self.normalised:
            return super().weight_and_bias(dtype)
        return F.normalize(self.weight).to(dtype), None if self.bias is None else self.bias.to(dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that computes in the dtype of its weight and rounds afterwards.

    A master weight near 1 that is rounded to bfloat16 first would lose most of its small updates.
    """

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in the dtype of its weight, for the reason given at RMSNorm."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class AllHeadsNorm(RMSNorm):
    """RMSNorm over all heads together: (B, T, H, D) -> the same shape."""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view_as(x)


def make_norm(config):
    """Return the norm that this Config names."""
    kind = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return kind(config.hidden_dim, eps=config.norm_eps)


def make_qk_norm(config, n_heads):
    """Return the norm (B, T, n_heads, D) -> the same shape of queries or of keys, or an identity."""
    if config.qk_norm is None:
        return nn.Identity()
    if config.qk_norm == "head":
        return RMSNorm(config.head_dim, eps=config.norm_eps)
    assert config.qk_norm == "all_heads", config.qk_norm
    return AllHeadsNorm(n_heads * config.head_dim, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, section 2)."""

    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.hidden_dim, config.intermediate_dim, bias=config.mlp_bias)
        self.up = Linear(config.hidden_dim, config.intermediate_dim, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_dim, config.hidden_dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with GELU as it is or in its tanh approximation."""

    def __init__(self, config):
        super().__init__()
        self.approximate = {"gelu": "tanh", "exact_gelu": "none"}[config.mlp]
        self.up = Linear(config.hidden_dim, config.intermediate_dim, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_dim, config.hidden_dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Attention(nn.Module):
    """The projections around causal self-attention."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_dim, config.head_dim
        self.head_dim = D
        self.q = Linear(C, config.n_heads * D, bias=config.qkv_bias)
        self.k = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.v = Linear(C, config.n_kv_heads * D, bias=config.qkv_bias)
        self.o = Linear(config.n_heads * D, C, bias=config.o_bias)
        self.q_norm = make_qk_norm(config, config.n_heads)
        self.k_norm = make_qk_norm(config, config.n_kv_heads)
        self.scale = config.attention_scale

    def queries_keys_values(self, h, cos, sin, query_scale=None):
        """Return queries (B, T, H, D), keys and values (B, T, K, D) of normed hidden states h (B, T, C).

        Queries and keys are turned to their positions, and queries are multiplied by query_scale
        (1, T, 1, 1) if there is one.
        """
        q, k, v = (layer(h).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if query_scale is None:
            q = rope.apply_rope(q, cos, sin)
        else:  # Models with such a scale turn all dimensions of a head.
            q = rope.apply_rope(q, cos * query_scale, sin * query_scale)
        return q, rope.apply_rope(k, cos, sin), v


def causal_attention(q, k, v, scale=None, place=None):
    """Return the attention of the last T of S tokens: q (B, T, H, D), k, v (B, S, K, D) -> (B, T, H * D).

    scale: what products of queries and keys are multiplied by, by default D^-0.5. place: None, or an int64
    tensor (1,): the place of a single query, which sees the keys up to there.
    """
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T or S, D)
    grouped = k.shape[1] != q.shape[1]
    options = {"scale": scale, "enable_gqa": grouped}
    if place is not None:
        options["attn_mask"] = (torch.arange(S, device=place.device) <= place).expand(1, 1, 1, S)
    elif T == S:
        options["is_causal"] = True
    elif T > 1:
        # is_causal would line up the first query with the first key. With a cache, the last query belongs
        # to the last key. Imported here, because it loads the tracer of torch.compile, which takes a second.
        from torch.nn.attention.bias import causal_lower_right

        options["attn_mask"] = causal_lower_right(T, S)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def update_cache(cache, k, v, start):
    """Write the keys and values (B, T, K, D) of tokens into a cache, from place `start` on.

    Return those of all tokens so far, (B, start + T, K, D) each. Where start is a tensor, return the whole
    cache, of which causal_attention masks the places behind. Without a cache, return k and v.
    cache, start: see Block.forward.
    """
    if cache is None:
        return k, v
    if isinstance(start, torch.Tensor):
        return tuple(kept.index_copy_(1, start, new) for kept, new in zip(cache, (k, v)))
    end = start + k.shape[1]
    for kept, new in zip(cache, (k, v)):
        kept[:, start:end] = new
    return tuple(kept[:, :end] for kept in cache)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + MLP(norm(x)).

    In a parallel one, x + attention(h) + MLP(h) with h = norm(x), or each with a norm of its own. With
    post-norms, x + norm(attention(x)), then x + norm(MLP(x)).
    """

    def __init__(self, config):
        super().__init__()
        self.parallel = config.parallel
        self.shares_norm = config.parallel and not config.parallel_norms
        self.residual_multiplier = config.residual_multiplier
        self.attention = Attention(config)
        pre, post = (nn.Identity, make_norm) if config.post_norm else (make_norm, nn.Identity)
        self.attention_norm = pre(config)
        self.attention_post_norm = post(config)
        if not self.shares_norm:
            self.mlp_norm = pre(config)
        self.mlp_post_norm = post(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GeluMLP(config)

    def forward(self, x, cos, sin, query_scale=None, cache=None, start=0):
        """Return the block's output (B, T, C) for its input x (B, T, C).

        cos, sin: see rope.rope_cos_sin. query_scale: see rope.query_scale. cache: None, or (keys, values),
        each (B, S, K, D), whose first `start` places are filled and whose next T places this call fills.
        start may be an int64 tensor (1,) for a single token: then no shape depends on it, and the same CUDA
        graph does for every token. The places behind must hold finite numbers.
        """
        # A compiled block takes no slices: it has one graph for every length.
        may_overwrite_x = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if x.shape[1] > SLICE_TOKENS and may_overwrite_x:
            return self.forward_in_slices(x, cos, sin, query_scale, cache, start)
        q, k, v = self.attention.queries_keys_values(self.attention_norm(x), cos, sin, query_scale)
        k, v = update_cache(cache, k, v, start)
        place = start if isinstance(start, torch.Tensor) else None
        return self.after_attention(x, causal_attention(q, k, v, self.attention.scale, place))

    def after_attention(self, x, attended):
        """Return the block's output from its input x (B, T, C) and the heads' outputs (B, T, H * D)."""
        if self.parallel:
            # A shared norm is computed once more: keeping it from before attention would take memory.
            norm = self.attention_norm if self.shares_norm else self.mlp_norm
            return x + self.attention.o(attended) + self.mlp(norm(x))
        m = self.residual_multiplier
        x = torch.add(x, self.attention_post_norm(self.attention.o(attended)), alpha=m)
        return torch.add(x, self.mlp_post_norm(self.mlp(self.mlp_norm(x))), alpha=m)

    def forward_in_slices(self, x, cos, sin, query_scale, cache, start):
        """Compute `forward` without gradients, all but attention for SLICE_TOKENS tokens at a time.

        It overwrites x. Little more is in memory then than x, queries, keys, values and what attention makes
        of them: only attention mixes tokens.
        """
        B, T, _ = x.shape
        attention, D = self.attention, self.attention.head_dim

        def empty(layer):
            return x.new_empty(B, T, layer.out_features // D, D)

        # Each slice is written to its place: pieces and the whole would be in memory together otherwise.
        queries = empty(attention.q)
        if cache is None:
            cache, start = (empty(attention.k), empty(attention.v)), 0
        slices = [slice(i, i + SLICE_TOKENS) for i in range(0, T, SLICE_TOKENS)]
        for part in slices:
            scale = None if query_scale is None else query_scale[:, part]
            h = self.attention_norm(x[:, part])
            queries[:, part], k, v = attention.queries_keys_values(h, cos[:, part], sin[:, part], scale)
            k, v = update_cache(cache, k, v, start + part.start)
        attended = causal_attention(queries, k, v, attention.scale)
        del queries, k, v, cache
        for part in slices:
            x[:, part] = self.after_attention(x[:, part], attended[:, part])
        return x


# ---------------------------------------------------------------- the model


def multiplied(x, factor):
    """Return x times a factor. The usual one, 1, takes neither time nor memory."""
    return x if factor == 1 else x * factor


class Transformer(nn.Module):
    """The decoder, see the head of this file: tokens int64 (B, T) -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.compute_dtype = None  # dtype of the hidden states, where it is not that of the weights
        # It computes the loss of some tokens and its gradient. fsdp.shard puts a compiled one here.
        self.cross_entropy = cross_entropy_and_gradient

    def to_empty(self, **arguments):
        """Move the model to a device without its values, as nn.Module does, but keep a tied head tied."""
        super().to_empty(**arguments)
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        return self

    @property
    def hidden_dtype(self):
        """The dtype of the hidden states."""
        return self.compute_dtype or self.embed.weight.dtype

    def forward(self, tokens, positions=None, targets=None, token_weights=None):
        """Return the logits (B, T, V) of tokens int64 (B, T).

        positions: int64 (B, T), by default 0 ... T-1. targets: int64 (B, N), those of the last N
        tokens; with them, return their summed cross-entropy in nats instead, a float32 scalar, without
        ever holding all logits. token_weights: float32 (B, N), what each target counts in that sum, by
        default 1.
        """
        h = self.hidden(tokens, positions)
        if targets is None:
            return self.head(h)
        return self.loss(h[:, -targets.shape[1] :], targets, token_weights)

    def loss(self, hidden, targets, token_weights=None):
        """Return the summed cross-entropy in nats of normed hidden states (..., C), targets int64 (...).

        token_weights: float32 (...), what each target counts in that sum, by default 1.
        """
        if token_weights is None:
            token_weights = torch.ones(targets.shape, device=hidden.device)
        weight, bias = self.head.weight_and_bias(hidden.dtype)
        tensors = hidden.flatten(0, -2), weight, bias, targets.flatten(), token_weights.flatten()
        return chunked_cross_entropy(*tensors, self.cross_entropy)

    def hidden(self, tokens, positions=None, cache=None, start=0, seq_lens=None):
        """Return the normed last hidden states (B, T, C); `head` turns those that are needed into logits.

        They are divided by Config.logits_divisor already, and so are the logits.
        tokens: int64 (B, T). positions: int64 (B, T), by default start ... start + T - 1. cache: None,
        or for each block the (keys, values) of Block.forward. start: tokens that are in the cache
        already. seq_lens: tokens in each row's whole sequence, a list, for `dynamic` and `longrope`
        (default: up to the row's largest position).
        """
        end = start + tokens.shape[1]
        if positions is None:
            positions = torch.arange(start, end, device=tokens.device).expand(tokens.shape)
        cos, sin, query_scale = self.rotations(positions, start, end, seq_lens)
        return self.hidden_at(tokens, cos, sin, query_scale, cache, start)

    def rotations(self, positions, start, end, seq_lens=None):
        """Return what turns and scales queries and keys at positions (B, T): cos, sin and query_scale.

        They are rope.rope_cos_sin's and rope.query_scale's for the tokens from `start` to `end`.
        """
        inv_freq, attention_factor = self.frequencies(positions, seq_lens)
        cos, sin = rope.rope_cos_sin(positions, inv_freq, attention_factor)
        return cos, sin, rope.query_scale(self.config.rope_scaling, start, end, positions.device)

    def hidden_at(self, tokens, cos, sin, query_scale, cache=None, start=0):
        """Return what `hidden` does, given the results of `rotations`. start: see Block.forward."""
        unturned = cos.new_ones(1).expand_as(cos), sin.new_zeros(1).expand_as(sin)  # everywhere the angle 0
        rope_layers = self.config.rope_layers or [1] * len(self.blocks)
        x = self.embed(tokens).to(self.hidden_dtype)  # (B, T, C)
        x = multiplied(x, self.config.embedding_multiplier)
        for i, block in enumerate(self.blocks):
            turned = (cos, sin) if rope_layers[i] else unturned
            x = block(x, *turned, query_scale, cache[i] if cache else None, start)
        return multiplied(self.norm(x), 1 / self.config.logits_divisor)

    def frequencies(self, positions, seq_lens=None):
        """Return rope.rope_frequencies at positions (B, T): (inv_freq (D/2,) or (B, D/2), attention_factor).

        Where the angles depend on the length, each row takes its own, in this call only: neither earlier
        batches nor its neighbours change an example's loss.
        """
        config = self.config
        arguments = config.rotary_dim, config.rope_theta, config.rope_scaling
        if not rope.depends_on_length(config.rope_scaling):
            return rope.rope_frequencies(*arguments)
        if seq_lens is None:
            seq_lens = (positions.amax(1) + 1).tolist()
        by_row = [rope.rope_frequencies(*arguments, seq_len) for seq_len in seq_lens]
        attention_factor = by_row[0][1]  # it is the same at every length
        return torch.stack([inv_freq for inv_freq, _ in by_row]), attention_factor

    def new_cache(self, B, T):
        """Return an empty cache for B rows of T tokens: for each block its (keys, values)."""
        shape = (B, T, self.config.n_kv_heads, self.config.head_dim)
        options = {"dtype": self.hidden_dtype, "device": self.embed.weight.device}
        return [(torch.empty(shape, **options), torch.empty(shape, **options)) for _ in self.blocks]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, lengths=None, stop_ids=(), prefill_tokens=2048):
        """Return the greedy continuation (B, max_new_tokens) of tokens int64 (B, T).

        lengths: the tokens of each row's prompt, where shorter ones are padded at their end (default: T).
        stop_ids: ends the generation once every row has said one of them; places not reached are 0. A row
        that stopped earlier goes on until then, so the caller cuts it. The prompts are read `prefill_tokens`
        at a time. Angles that depend on the length (`dynamic`, `longrope`) are, from the first token on,
        those of one forward pass over all but the row's last new token, which is never read.
        """
        B, T = tokens.shape
        lengths = [T] * B if lengths is None else lengths
        seq_lens = [length + max_new_tokens - 1 for length in lengths]
        cache = self.new_cache(B, max(seq_lens))

        # All rows read as many tokens as the shortest prompt has. From there on each reads the rest of its
        # prompt, and then what it says, token by token: so they are always equally long.
        shortest = min(lengths)
        for start in range(0, shortest, prefill_tokens):
            prompt = tokens[:, start : min(start + prefill_tokens, shortest)]
            h = self.hidden(prompt, cache=cache, start=start, seq_lens=seq_lens)
        rows = F.pad(tokens, (0, max(seq_lens) + 1 - T))
        prompt_ends = torch.tensor(lengths, device=tokens.device)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=tokens.device)
        has_stopped = torch.zeros_like(prompt_ends, dtype=torch.bool)
        for end in range(shortest, rows.shape[1]):
            says = prompt_ends <= end
            rows[:, end] = torch.where(says, self.head(h[:, -1]).argmax(-1), rows[:, end])
            has_stopped |= says & torch.isin(rows[:, end], stops)
            if end + 1 == rows.shape[1] or (stop_ids and has_stopped.all()):
                break
            h = self.hidden(rows[:, end : end + 1], cache=cache, start=end, seq_lens=seq_lens)
        return torch.stack([row[n : n + max_new_tokens] for row, n in zip(rows, lengths)])


def empty_transformer(config):
    """Return a Transformer without values, on the meta device."""
    with torch.device("meta"):
        return Transformer(config)


def multiply_in_float8(model):
    """Let the linear layers of a Transformer's blocks multiply in float8, but not their adapters."""
    # Otherwise a block compiled by PyTorch 2.11 keeps these products in spite of activation checkpointing.
    # Said here and not at the class, because it imports the compiler, which takes a second.
    torch.compiler.allow_in_graph(float8.Products)
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.product = float8.linear


# ---------------------------------------------------------------- adapters (LoRA)

TRAINED_BESIDE = {"embed": (nn.Embedding,), "norm": (nn.RMSNorm, nn.LayerNorm)}


def linear_layers(config):
    """Return the names of the linear layers of a block."""
    return ("q", "k", "v", "o", *(("gate",) if config.mlp == "swiglu" else ()), "up", "down")


def add_adapters(model, rank, alpha, targets, train=()):
    """Freeze a Transformer and give the linear layers of its blocks that `targets` names an Adapter each.

    targets: names of linear_layers. train: what learns nevertheless, of "embed" (the embedding, and with it a
    head that is tied to it) and "norm" (all norms).
    The adapters are uninitialised. With `a` drawn by initial_a and `b` zero, the model is what it was.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, Linear) and name.rpartition(".")[2] in targets:
                module.adapter = Adapter(module, rank, alpha)
    for module in model.modules():
        if any(isinstance(module, TRAINED_BESIDE[kind]) for kind in train):
            module.requires_grad_(True)


def initial_a(shape, generator):
    """Return the first value of an Adapter's `a` of this shape, float32.

    It is uniform between -1 and 1 over the root of in_features, as in the LoRA authors' code and in PEFT.
    (Their paper has a Gaussian.)
    """
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


# ---------------------------------------------------------------- the loss


def cross_entropy_and_gradient(logits, targets, token_weights):
    """Return the weighted sum of the cross-entropy of logits (N, V) and its gradient with respect to them.

    The sum is a float32 scalar. The gradient, the weight (N,) of each token times softmax minus one-hot, has
    the logits' dtype.
    """
    log_p = logits.float().log_softmax(-1)
    nats = -log_p.gather(-1, targets[:, None])[:, 0]
    is_target = torch.arange(log_p.shape[1], device=logits.device) == targets[:, None]
    # In place, because a CPU takes longer to get memory for so large a tensor than to compute it.
    gradient = log_p.exp_().sub_(is_target.float()).mul_(token_weights[:, None])
    return (nats * token_weights).sum(), gradient.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The weighted sum of the cross-entropy of hidden (N, C) against targets (N,), some tokens at a time.

    The logits are hidden @ weight.T + bias, with weight (V, C) and bias (V,) or None. token_weights: (N,).
    The gradients are computed in the forward pass, where a chunk's logits are at hand. So the backward pass
    neither keeps them nor computes them again. A frozen weight or bias gets none.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, token_weights, chunk_size, cross_entropy):
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        _, weight_learns, bias_learns, *_ = ctx.needs_input_grad
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias_learns else None
        for h, d_h, t, w in zip(*(x.split(chunk_size) for x in (hidden, d_hidden, targets, token_weights))):
            loss, d_logits = cross_entropy(F.linear(h, weight, bias), t, w)
            total += loss
            torch.mm(d_logits, weight, out=d_h)
            if weight_learns:
                d_weight += d_logits.T @ h
            if bias_learns:
                d_bias += d_logits.sum(0)
            del d_logits  # It would stay while the next chunk's logits and their gradient come.
        d_weight = d_weight.to(weight.dtype) if weight_learns else None
        d_bias = d_bias.to(bias.dtype) if bias_learns else None
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx, grad):
        gradients = [None if d is None else d * grad for d in ctx.saved_tensors]
        return *gradients, None, None, None, None


def loss_chunk_tokens(vocab_size):
    """Return how many tokens the loss takes at once: those of at most MAX_LOGITS logits.

    It is a power of two, so that all chunks are equal for the usual number of tokens.
    """
    fitting_tokens = max(1, MAX_LOGITS // vocab_size)
    return 2 ** (fitting_tokens.bit_length() - 1)


def chunked_cross_entropy(hidden, weight, bias, targets, token_weights, cross_entropy):
    """Return the weighted sum of the cross-entropy in nats, a float32 scalar.

    Shapes as in ChunkedCrossEntropy. cross_entropy: computes what cross_entropy_and_gradient does.
    """
    chunk_size = loss_chunk_tokens(len(weight))
    if torch.is_grad_enabled():
        tensors = (hidden, weight, bias, targets, token_weights)
        return ChunkedCrossEntropy.apply(*tensors, chunk_size, cross_entropy)
    total = 0.0
    for h, t, w in zip(*(x.split(chunk_size) for x in (hidden, targets, token_weights))):
        nats = F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="none")
        total += (nats * w).sum()
    return total
