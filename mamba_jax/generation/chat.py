"""Conversations as the text that models are trained on (``data.sources.chats``).

user: How much is 1 + 1?

assistant: It is 2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mamba_jax.data.sources.chats import chat_text
from mamba_jax.errors import UserError

ANSWER = "assistant:"  # the model continues it with a space and its answer
STOP = "\n\nuser:"  # an answer ends where the model starts the user's next turn


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns a conversation up to where the next answer begins.

    Args:
      messages: each with ``role`` and ``content``; content is a text or a list of text parts.

    Raises:
      UserError: if there is no text in them.
    """
    text = chat_text(list(messages))
    if not text:
        raise UserError("messages hold no text: give at least one with a role and content")
    return f"{text}\n\n{ANSWER}"
