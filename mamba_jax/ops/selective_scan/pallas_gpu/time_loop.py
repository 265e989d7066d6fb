"""How a kernel loops over time: segments of chunks of groups of tokens.

A program processes one segment. A state is saved at each chunk's start, and a group is the tokens
whose loads are issued together and whose states fit in registers. Lengths are static, so that the
last chunk and the last group, whatever their lengths, are code of their own: no masks, no padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class TimeLoop:
    """A division of ``tokens``; ``segments`` may end up smaller than requested (see ``divide``)."""

    tokens: int
    chunk_tokens: int
    group_tokens: int
    segments: int
    chunks_per_segment: int

    @classmethod
    def divide(cls, tokens: int, chunk_tokens: int, group_tokens: int, segments: int) -> "TimeLoop":
        """Makes segments of the same number of chunks; only the last is shorter, none is empty."""
        chunks = -(-tokens // chunk_tokens)
        per_segment = -(-chunks // segments)
        return cls(tokens, chunk_tokens, group_tokens, -(-chunks // per_segment), per_segment)

    @property
    def chunks(self) -> int:
        """Chunks in all, the shorter last one included."""
        return -(-self.tokens // self.chunk_tokens)

    @property
    def segment_tokens(self) -> int:
        """Tokens of every segment but the last."""
        return self.chunks_per_segment * self.chunk_tokens

    def over_chunks(
        self, segment: Any, body: Callable[[Any, int, Any], Any], carry: Any, reverse: bool = False
    ) -> Any:
        """Threads ``carry = body(chunk, tokens, carry)`` through the chunks of a segment.

        Args:
          segment: its number, a traced integer (or 0).
          body: ``chunk`` is traced, ``tokens`` static.
          carry: the first carry.
          reverse: whether the last chunk comes first.
        """
        whole, rest = divmod(self.tokens, self.chunk_tokens)
        first = segment * self.chunks_per_segment
        end = first + self.chunks_per_segment
        last = whole if self.segments == 1 else jnp.minimum(end, whole)

        def the_rest(carry: Any) -> Any:
            if not rest:
                return carry
            if self.segments == 1:
                return body(whole, rest, carry)
            is_last = segment == self.segments - 1
            return lax.cond(is_last, lambda carry: body(whole, rest, carry), lambda c: c, carry)

        def step(i: Any, carry: Any) -> Any:
            return body(last - 1 - (i - first) if reverse else i, self.chunk_tokens, carry)

        if reverse:
            carry = the_rest(carry)
        if whole:
            carry = lax.fori_loop(first, last, step, carry)
        return carry if reverse else the_rest(carry)

    def over_groups(
        self, tokens: int, body: Callable[[Any, int, Any], Any], carry: Any, reverse: bool = False
    ) -> Any:
        """Threads ``carry = body(group, tokens, carry)`` through the groups of a chunk."""
        whole, rest = divmod(tokens, self.group_tokens)
        if reverse and rest:
            carry = body(whole, rest, carry)
        if whole:
            step = lambda i, c: body(whole - 1 - i if reverse else i, self.group_tokens, c)
            carry = lax.fori_loop(0, whole, step, carry)
        if rest and not reverse:
            carry = body(whole, rest, carry)
        return carry
