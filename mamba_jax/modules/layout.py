"""The place of each token: in its document, and among the pooled blocks of each scale.

The arrays made here, once per forward pass, keep conv, scan state and attention from crossing a
document's start.

Legend: b batch, t time, c blocks completed inside the row.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """The place of every token in its document.

    A row may contain several documents, and its first one may have started before the row.
    """

    position_bt: jax.Array  # int32, tokens of the same document before this one
    reset_bt: jax.Array  # bool, this token starts a document
    segment_b: jax.Array  # int32, the last token's segment id

    @property
    def next_position_b(self) -> jax.Array:
        """The position of the token after the row, if it continues the document."""
        return self.position_bt[:, -1] + 1


def documents(
    shape: tuple[int, int],
    segment_ids_bt: jax.Array | None,
    previous_segment_b: jax.Array | None,
    previous_length_b: jax.Array | None,
) -> Documents:
    """Finds document starts: where the segment id changes.

    Args:
      shape: (b, t) of the tokens.
      segment_ids_bt: int32 ids, equal within a document; None: the row is one document.
      previous_segment_b: int32 id of the last token before the row; None: nothing precedes it.
      previous_length_b: int32 number of tokens of that document so far.

    Returns:
      The places. The row's first document continues the previous one if its id is the same (or
      ``segment_ids_bt`` is None).
    """
    b, t = shape
    time_t = jnp.arange(t, dtype=jnp.int32)
    if previous_segment_b is None or previous_length_b is None:
        previous_segment_b = jnp.zeros(b, jnp.int32)
        previous_length_b = jnp.zeros(b, jnp.int32)
        starts_anew = jnp.ones(b, bool)
    else:
        starts_anew = previous_length_b == 0
    if segment_ids_bt is None:
        reset_bt = jnp.zeros((b, t), bool).at[:, 0].set(starts_anew)
        segment_b = previous_segment_b
    else:
        segment_ids_bt = segment_ids_bt.astype(jnp.int32)
        before_bt = jnp.concatenate([previous_segment_b[:, None], segment_ids_bt[:, :-1]], axis=1)
        reset_bt = (
            (segment_ids_bt != before_bt)
            .at[:, 0]
            .set(starts_anew | (segment_ids_bt[:, 0] != previous_segment_b))
        )
        segment_b = segment_ids_bt[:, -1]
    start_bt = jax.lax.cummax(jnp.where(reset_bt, time_t, -previous_length_b[:, None]), axis=1)
    return Documents(time_t - start_bt, reset_bt, segment_b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of ``scale`` tokens that complete inside the row, packed to the left.

    Blocks are counted from each document's first token, and a block exists once a token completes
    it; an incomplete block at a document's end never does. So no block spans two documents, and
    none shows a token its own future.
    """

    end_bc: jax.Array  # int32, row index of the token that completes block c
    number_bc: jax.Array  # int32, the block's number in its document
    count_b: jax.Array  # int32, how many of the c slots are real
    newest_bt: jax.Array  # int32, slot of the newest block at token t, -1 if none in the row
    first_bt: jax.Array  # int32, slot of its document's first block; negative: that many earlier
    query_number_bt: jax.Array  # int32, the newest block's number in the document, -1 if none


def blocks(where: Documents, scale: int) -> Blocks:
    """Lays out the blocks of one scale."""
    position_bt = where.position_bt
    t = position_bt.shape[1]
    done_bt = (position_bt + 1) % scale == 0
    done_so_far_bt = jnp.cumsum(done_bt, axis=1, dtype=jnp.int32)
    # Completions are at least `scale` tokens apart; the first may be at once (an older document).
    slots = -(-t // scale)
    end_bc = jax.vmap(lambda done_t: jnp.nonzero(done_t, size=slots, fill_value=t - 1)[0])(done_bt)
    start_bt = jnp.arange(t) - position_bt
    before_document_bt = jnp.where(
        start_bt > 0,
        jnp.take_along_axis(done_so_far_bt, jnp.maximum(start_bt - 1, 0), axis=1),
        # A document that started before the row: its earlier blocks are before slot 0.
        -(jnp.maximum(-start_bt, 0) // scale),
    )
    return Blocks(
        end_bc=end_bc,
        number_bc=jnp.take_along_axis(position_bt, end_bc, axis=1) // scale,
        count_b=done_so_far_bt[:, -1],
        newest_bt=done_so_far_bt - 1,
        first_bt=before_document_bt,
        query_number_bt=(position_bt + 1) // scale - 1,
    )
