"""The kinds of attention: sizes, weights, and what a layer keeps of a token. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The norm on queries and keys: of each head, of all heads of a token together, or of each head after the rotation.
QKNorm = Literal["head", "token", "rotated_head"]
MatrixSize = tuple[int, int]  # outputs, inputs
# Bytes of a number in the KV cache. Rows of "int8" and "fp8" (E4M3) have scales beside them.
KV_ITEMSIZE = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES = 4  # float32


@dataclass(frozen=True)
class KVSpec:
    """The state that a layer keeps for each token of a sequence.

    Attributes:
        kind: with "full", all later tokens read it; with "window", only the next `window - 1` tokens do.
        bytes_per_token: size of what is kept of one token.
        window: number of tokens that a token attends to, including itself; None with "full".
    """

    kind: Literal["full", "window"]
    bytes_per_token: int
    window: int | None

    @classmethod
    def of(cls, dtype: str, kept_size: int, num_scales: int, window: int | None) -> KVSpec:
        """The state of `kept_size` numbers of a dtype in `KV_ITEMSIZE`; 8-bit rows of the cache add `num_scales`."""
        scales = num_scales * SCALE_BYTES if dtype in ("int8", "fp8") else 0
        return cls("window" if window else "full", kept_size * KV_ITEMSIZE[dtype] + scales, window)

    def tokens_read(self, context_len: int) -> int:
        """How many of `context_len` tokens the next token attends to."""
        return min(context_len, self.window or context_len)


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of a layer.

    Attributes:
        qk_norm: see `QKNorm`; None for no norm.
        scale: factor on the scores; None means `head_dim ** -0.5`.
        sinks: each head has a learned score that takes part in the softmax and has no value (gpt-oss).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm | None = None
    scale: float | None = None
    sinks: bool = False

    @property
    def query_size(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def norm_sizes(self) -> tuple[int, int]:
        """Number of weights of the norm on queries, and of that on keys."""
        if self.qk_norm is None:
            return 0, 0
        return (self.query_size, self.kv_size) if self.qk_norm == "token" else (self.head_dim, self.head_dim)

    @property
    def key_size(self) -> int:
        """Size of a key of one head."""
        return self.head_dim

    @property
    def value_size(self) -> int:
        """Size of a value of one head, as attention sums it."""
        return self.head_dim

    @property
    def kept_size(self) -> int:
        """Elements that are kept of a token."""
        return 2 * self.kv_size

    @property
    def row_size(self) -> int:
        """Elements of a token's row between the projections."""
        return 2 * self.query_size + 2 * self.kv_size

    def matrices(self, hidden_size: int) -> list[MatrixSize]:
        """The projections, as they are held."""
        return [(self.query_size + 2 * self.kv_size, hidden_size), (hidden_size, self.query_size)]

    @property
    def head_matrices(self) -> list[MatrixSize]:
        """Matrices of each head apart."""
        return []

    def num_vector_weights(self, hidden_size: int) -> int:
        """Parameters of the biases and sinks, and of the norms of queries and keys."""
        count = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        count += self.num_heads if self.sinks else 0
        return count + (hidden_size if self.output_bias else 0) + sum(self.norm_sizes)

    def kv_spec(self, dtype: str) -> KVSpec:
        """The layer's state in a dtype of `KV_ITEMSIZE`; 8-bit rows have a scale for each head's key and value."""
        return KVSpec.of(dtype, self.kept_size, 2 * self.num_kv_heads, self.sliding_window)

    def __str__(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads} heads, {self.num_kv_heads} key/value heads of {self.head_dim}{window}"


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) of a layer.

    Of a token, a layer keeps one latent row and one rotated key, which all heads share. A head's key and value are
    products with the latent. They are never computed: the head's key matrix is applied to its query, and its value
    matrix to the sum of latents.

    Attributes:
        query_rank: size of the compressed queries; None: queries are projected at once.
        latent_size: size of the latent row.
        nope_size, rope_size: parts of a head's query and key without and with rotation.
        head_value_size: size of a head's value.
        scale: factor on the scores.
        norm_eps: of the norms on compressed queries and on the latent.
        bias: of the projections to the compressed queries and the latent, and of the output projection.
    """

    num_heads: int
    query_rank: int | None
    latent_size: int
    nope_size: int
    rope_size: int
    head_value_size: int
    scale: float
    norm_eps: float
    bias: bool = False
    sliding_window: None = None

    @property
    def num_kv_heads(self) -> int:
        return 1

    @property
    def query_size(self) -> int:
        """All heads' queries."""
        return self.num_heads * (self.nope_size + self.rope_size)

    @property
    def down_size(self) -> int:
        """Outputs of the first projection: compressed queries, or queries, then the latent and the shared key."""
        return (self.query_rank or self.query_size) + self.key_size

    @property
    def output_size(self) -> int:
        """All heads' values."""
        return self.num_heads * self.head_value_size

    @property
    def key_size(self) -> int:
        """The latent and the shared key."""
        return self.latent_size + self.rope_size

    @property
    def value_size(self) -> int:
        """The latent."""
        return self.latent_size

    @property
    def kept_size(self) -> int:
        """Elements that are kept of a token."""
        return self.key_size

    @property
    def row_size(self) -> int:
        """Elements of a token's row between the projections."""
        return self.down_size + self.query_size + self.num_heads * (self.key_size + self.value_size) + self.output_size

    def matrices(self, hidden_size: int) -> list[MatrixSize]:
        """The projections, as they are held."""
        up = [(self.query_size, self.query_rank)] if self.query_rank else []
        return [(self.down_size, hidden_size), *up, (hidden_size, self.output_size)]

    @property
    def head_matrices(self) -> list[MatrixSize]:
        """The key and the value matrix of each head, which are never quantised: the key matrix is held turned."""
        return [(self.latent_size, self.nope_size), (self.head_value_size, self.latent_size)] * self.num_heads

    def num_vector_weights(self, hidden_size: int) -> int:
        """Parameters of the biases, and of the norms of the compressed queries and of the latent."""
        bias = (self.query_rank or 0) + self.key_size + hidden_size if self.bias else 0
        return bias + (self.query_rank or 0) + self.latent_size

    def kv_spec(self, dtype: str) -> KVSpec:
        """The layer's state in a dtype of `KV_ITEMSIZE`; 8-bit rows have a scale for the latent and one for the key."""
        return KVSpec.of(dtype, self.kept_size, 2, None)

    def __str__(self) -> str:
        return f"{self.num_heads} heads over a latent of {self.latent_size} and a shared key of {self.rope_size}"


AnyAttention = AttentionConfig | LatentAttentionConfig
