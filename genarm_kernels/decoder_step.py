"""`DecoderStep`: the forward pass of a Llama-like model for the next tokens of rows that have KV caches, on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .backends import cpu, reference
from .layers import Decoder


class DecoderStep:
    """Steps of one model over one set of KV caches."""

    def __init__(
        self, decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor], backend: str = "auto"
    ) -> None:
        """
        Args:
            keys, values: by layer, `[rows, length, kv_heads, head_size]`, all of one dtype: written and read in place.
            backend: "auto" ("cpu" where it suits), "cpu" or "reference"; a named backend runs or raises.

        Raises:
            ValueError: `backend` is none of these, or "cpu" does not suit; it says why.
            RuntimeError: the CPU core cannot run here.
        """
        self._decoder, self._keys, self._values = decoder, keys, values
        self._step: cpu.DecoderStep | None = None
        if backend not in ("auto", "cpu", "reference"):
            raise ValueError(f"backend: expected 'auto', 'cpu' or 'reference', got {backend!r}")
        if backend == "cpu":
            backends.load("cpu", keys[0].device.type, len(keys[0]))
        if backend != "reference":
            reason = cpu.unsuited_decoder(decoder, keys, values)
            if reason is None:
                self._step = cpu.DecoderStep(decoder, keys, values)
            elif backend == "cpu":
                raise ValueError(f"decoder: {reason}")

    @property
    def backend(self) -> str:
        """ "cpu" or "reference"."""
        return "reference" if self._step is None else "cpu"

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Feeds tokens to the first rows of the caches; rows of one slot, an operand each, get the same tokens.

        Args:
            tokens: `[n, T]` int64.
            lengths: `[n * operands]` int64: how many tokens each row has. The new ones are written behind them, and see
                those before them and themselves. With them no row may be longer than the caches.

        Returns:
            Logits `[n * operands, T, V]` float32 after each token.

        Raises:
            ValueError: tensors of another kind, more rows than there are, tokens or lengths out of range.
        """
        self._check(tokens, lengths)
        if self._step is not None:
            return self._step(tokens.repeat_interleave(self._decoder.operands, 0), lengths)
        return reference.decoder_step(self._decoder, self._keys, self._values, tokens, lengths)

    def _check(self, tokens: Tensor, lengths: Tensor) -> None:
        (rows, length), operands = self._keys[0].shape[:2], self._decoder.operands
        for name, x, shape, words in (
            ("tokens", tokens, tokens.shape[:2], "[n, T]"),
            ("lengths", lengths, (len(tokens) * operands,), f"[{len(tokens) * operands}]"),
        ):
            if x.dtype is not torch.int64 or x.shape != shape or (name == "tokens" and x.dim() != 2):
                kind = str(x.dtype).removeprefix("torch.")
                raise ValueError(f"{name}: expected int64 {words}, got {kind} {list(x.shape)}")
        if len(tokens) * operands > rows:
            raise ValueError(f"tokens: expected at most {rows // operands} rows, got {len(tokens)}")
        vocab_size, most = len(self._decoder.embedding), length - tokens.shape[1]
        for token in tokens.flatten().tolist():
            if not 0 <= token < vocab_size:
                raise ValueError(f"tokens: expected ids from 0 to {vocab_size - 1}, got {token}")
        for own in lengths.tolist():
            if own < 0:
                raise ValueError(f"lengths: expected at least 0, got {own}")
            if own > most:
                raise ValueError(f"lengths: expected at most {most} for {tokens.shape[1]} tokens more, got {own}")
