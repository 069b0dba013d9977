"""The autoregressive transformer over codes ("Taming Transformers", section 3.2).

One module is the reference's GPT (learned positions, layer normalisation before each part, exact
GELU) and, by its options, the form that later systems converged on: RMSNorm ("Root Mean Square
Layer Normalization", Zhang and Sennrich 2019), SwiGLU ("GLU Variants Improve Transformer", Shazeer
2020), rotary positions, normalised queries and keys, grouped queries.

A sequence is `num_conditions` condition tokens and then the codes of a grid, in the model's order;
each code is predicted from all that stands before it. Outside of the model codes are row by row:
where its order is another one, only this module and cached decoding know.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.attention import Linear, SelfAttention
from vqgan_jax.models.layers import LayerNorm, at_least_float32
from vqgan_jax.models.orders import ROW_MAJOR, Permutation, permutation
from vqgan_jax.models.positions import GridPositions, rotary_angles
from vqgan_jax.models.recomputation import recomputed
from vqgan_jax.models.target import keep_rows, whole


class FeedForward(nn.Module):
    """The part of a block that works on each token alone."""

    hidden: int
    kind: str = "gelu"
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def linear(features, name):
            return Linear(features, self.use_bias, self.dtype, name=name)

        h = linear(self.hidden, "up")(x)
        h = nn.silu(linear(self.hidden, "gate")(x)) * h if self.kind == "swiglu" else gelu(h)
        return linear(x.shape[-1], "down")(h)


def gelu(x: jax.Array) -> jax.Array:
    """The exact form ("Gaussian Error Linear Units", Hendrycks and Gimpel 2016): x times Phi(x).

    By erf, as PyTorch has it; by erfc, as JAX has it, is much slower.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised sum of what was before."""

    num_heads: int
    num_kv_heads: int
    hidden: int
    norm: str = "layer"
    feed_forward: str = "gelu"
    qk_norm: bool = False
    use_bias: bool = True
    num_unmasked: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, angles=None, cache=None, index=None, train=False):
        """As `SelfAttention.__call__`, which it gives what it is given."""
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(
            self.num_heads,
            self.num_kv_heads,
            self.qk_norm,
            self.use_bias,
            self.attention_dropout,
            self.dtype,
            name="attention",
        )
        normal = make_norm(self.norm, self.dtype, name="attention_norm")(x)
        h, cache = attention(normal, angles, self.num_unmasked, cache, index, train)
        x = x + dropout(h)
        h = make_norm(self.norm, self.dtype, name="feed_forward_norm")(x)
        h = FeedForward(
            self.hidden, self.feed_forward, self.use_bias, self.dtype, name="feed_forward"
        )(h)
        return x + dropout(h), cache


def make_norm(kind: str, dtype: jnp.dtype, name: str) -> nn.Module:
    """LayerNorm ("layer") or RMSNorm ("rms"), with statistics in float32 or wider."""
    if kind == "rms":
        return nn.RMSNorm(epsilon=1e-5, dtype=dtype, name=name)
    return LayerNorm(dtype, name=name)


def look_up(table: nn.Embed, tokens: jax.Array) -> jax.Array:
    """Rows of a table, `(B, n)` int -> `(B, n, width)`; NaN for tokens that it has no row for."""
    return keep_rows(jnp.take(whole(table.embedding), tokens, axis=0))


def cast_kernels(params, dtype: jnp.dtype):
    """Parameters with matrices in the type of the computation: for loops that read them often."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key == "kernel" else leaf, params
    )


class Transformer(nn.Module):
    """Logits of every next code.

    Attributes:
        codebook_size: codes there are to predict.
        grid: rows and columns of codes, for positions in two dimensions and for orders.
        order: of the codes, one of `orders.ORDERS`. Learned positions are those in the sequence;
            rotary positions, and those learned in two dimensions, are those in the grid.
        num_conditions: condition tokens in front of the codes, at least 1.
        condition_shapes: for rotary positions, of which kinds these are, `(n,)` or
            `(rows, columns)` over the image; empty where each is one by itself.
        condition_size: different condition tokens, 0 where they share the codes' table, as in the
            reference.
        max_length: of `num_conditions + rows * columns - 1` tokens, for learned positions.
        num_layers: blocks.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        width: channels of a token.
        hidden: channels within a feed-forward.
        norm: "layer" or "rms".
        feed_forward: "gelu" or "swiglu".
        positions: "learned", "learned_2d" (a vector of each row plus one of each column) or
            "rotary".
        qk_norm: normalised queries and keys.
        use_bias: in linear layers; never in the head.
        num_unmasked: so many first tokens see each other in both directions.
        embedding_dropout: after the sum of token and position.
        dropout: after attention and feed-forward.
        attention_dropout: of attention weights.
        unroll: blocks of the loop over layers that are compiled one after the other; more compile
            longer.
        remat: recompute blocks in the backward pass: less memory, more time.
        remat_keeps: one of `recomputation.POLICIES`.
        dtype: of the computation; parameters are float32.
    """

    codebook_size: int
    grid: tuple[int, int]
    num_conditions: int
    condition_size: int
    max_length: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    hidden: int
    norm: str = "layer"
    feed_forward: str = "gelu"
    positions: str = "learned"
    qk_norm: bool = False
    use_bias: bool = True
    num_unmasked: int = 0
    embedding_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    unroll: int = 1
    remat: bool = False
    remat_keeps: str = "nothing"
    dtype: jnp.dtype = jnp.float32
    condition_shapes: tuple[tuple[int, ...], ...] = ()
    order: str = ROW_MAJOR

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.code_embedding = nn.Embed(self.codebook_size, self.width, embedding_init=init)
        if self.condition_size:
            self.condition_embedding = nn.Embed(
                self.condition_size, self.width, embedding_init=init
            )
        if self.positions == "learned":
            shape = (self.max_length, self.width)
            self.position_embedding = self.param("position_embedding", nn.initializers.zeros, shape)
        elif self.positions == "learned_2d":
            self.grid_positions = GridPositions(self.grid, self.num_conditions, self.width)
        block = Block
        if self.remat:
            block = recomputed(Block, self.remat_keeps, static_argnums=(5,), prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 4,
            length=self.num_layers,
            unroll=min(self.unroll, self.num_layers),
        )(**self.block_fields())
        self.embedding_drop = nn.Dropout(self.embedding_dropout)
        self.norm_out = make_norm(self.norm, self.dtype, name=None)
        self.head = Linear(self.codebook_size, use_bias=False, dtype=self.dtype)

    def block_fields(self) -> dict:
        """The fields of `Block`."""
        return dict(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            hidden=self.hidden,
            norm=self.norm,
            feed_forward=self.feed_forward,
            qk_norm=self.qk_norm,
            use_bias=self.use_bias,
            num_unmasked=self.num_unmasked,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )

    def __call__(self, conditions, codes, train: bool = False):
        """Logits of each code, given the conditions and the codes before it in the model's order.

        Args:
            conditions: `(B, num_conditions)` int.
            codes: `(B, N)` int, row by row; the last of the order is not looked at.
            train: whether dropout is on.

        Returns:
            `(B, N, codebook_size)` float32 or wider, row by row.
        """
        x = self.states(conditions, codes, train)[:, conditions.shape[1] - 1 :]
        order = self.permutation()
        return self.logits(x if order is None else x[:, order.inverse])

    def states(self, conditions, codes, train: bool = False):
        """What the last block gives for conditions and codes, as of `__call__`.

        Returns:
            `(B, num_conditions + N - 1, width)`, conditions first, codes in the model's order.
        """
        return self._through_blocks(self.embed_sequence(conditions, codes), train)

    def code_logits(self, conditions, codes, n):
        """Logits of one code of each sequence, given the conditions and the codes before it.

        Args:
            conditions: `(B, num_conditions)` int.
            codes: `(B, N)` int, the first ones of the sequence; those from number `n` on are not
                looked at.
            n: `(B,)` int, the codes' numbers, at most N.

        Returns:
            `(B, codebook_size)` float32 or wider.
        """
        tokens = [self.embed_conditions(conditions), self.embed_codes(codes)]
        x = self._through_blocks(jnp.concatenate(tokens, axis=1), train=False)
        return self.logits(x[jnp.arange(len(x)), conditions.shape[1] - 1 + n])

    def prefill(self, conditions):
        """What decoding starts from: logits of the first code, and keys and values.

        Returns:
            `(B, codebook_size)`; keys and values `(layers, B, num_kv_heads, num_conditions,
            head_dim)` each.
        """
        x = self.embed_conditions(conditions)
        x, cache = self.blocks(x, self._angles(x.shape[1]), None, None, False)
        return self.logits(x[:, -1]), cache

    def embed_conditions(self, conditions):
        """`(B, num_conditions)` int -> `(B, num_conditions, width)` with positions."""
        table = self.condition_embedding if self.condition_size else self.code_embedding
        tokens = look_up(table, conditions)
        if self.positions == "learned":
            tokens += self._learned_positions(0, tokens.shape[1])
        elif self.positions == "learned_2d":
            tokens += self.grid_positions.of_conditions()
        return tokens.astype(self.dtype)

    def embed_codes(self, codes, first: int | jax.Array = 0):
        """Codes of the sequence, as `embed_conditions`: `(B, n)` int, from number `first` on."""
        tokens = look_up(self.code_embedding, codes)
        if self.positions == "learned":
            tokens += self._learned_positions(self.num_conditions + first, codes.shape[1])
        elif self.positions == "learned_2d":
            order, places = self.permutation(), first + jnp.arange(codes.shape[1])
            places = places if order is None else jnp.asarray(order.forward)[places]
            tokens += self.grid_positions.of_codes(places)
        return tokens.astype(self.dtype)

    def embed_sequence(self, conditions, codes):
        """What the first block sees, as `states`."""
        order = self.permutation()
        codes = codes if order is None else codes[:, order.forward]
        tokens = [self.embed_conditions(conditions), self.embed_codes(codes[:, :-1])]
        return jnp.concatenate(tokens, axis=1)

    def logits(self, x):
        """Hidden values `(..., width)` -> logits, float32 or wider."""
        return at_least_float32(self.head(self.norm_out(x)))

    def permutation(self) -> Permutation | None:
        """Between codes row by row and the sequence; None where they are the same."""
        return None if self.order == ROW_MAJOR else permutation(self.order, *self.grid)

    def angles(self):
        """Rotary angles of the sequence `(num_conditions + N, head_dim / 2)`; None without them.

        Those of a code are of its place in the grid.
        """
        if self.positions != "rotary":
            return None
        head_dim = self.width // self.num_heads
        shapes = self.condition_shapes or ((1,),) * self.num_conditions
        angles, order = rotary_angles(self.grid, shapes, head_dim), self.permutation()
        if order is not None:
            codes = angles[self.num_conditions :][order.forward]
            angles = np.concatenate([angles[: self.num_conditions], codes])
        return angles

    def _through_blocks(self, tokens, train):
        x = self.embedding_drop(tokens, deterministic=not train)
        x, _ = self.blocks(x, self._angles(x.shape[1]), None, None, train)
        return x

    def _angles(self, length):
        angles = self.angles()
        return None if angles is None else jnp.asarray(angles[:length])

    def _learned_positions(self, first, count):
        return jax.lax.dynamic_slice_in_dim(self.position_embedding, first, count, axis=0)
