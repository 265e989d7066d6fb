"""Text before the first stop, whatever pieces it comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_jax.errors import UserError
from mamba_jax.generation.chat import prompt_of
from mamba_jax.generation.stops import StopFinder


def before_first_stop(text, stops):
    """The definition: the shortest beginning of the text that ends with a stop, without it."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if matching:
            return text[: end - len(max(matching, key=len))], True
    return text, False


few = st.text("ab\n", max_size=12)


@given(pieces=st.lists(few, max_size=8), stops=st.lists(st.text("ab\n", max_size=4), max_size=3))
def test_pieces_give_the_text_of_the_whole(pieces, stops):
    finder = StopFinder(stops)
    output = "".join(finder.push(piece) for piece in pieces) + finder.flush()
    expected, found = before_first_stop("".join(pieces), stops)
    assert (output, finder.found is not None) == (expected, found)


def test_nothing_is_held_back_that_cannot_be_a_stop():
    finder = StopFinder(["\n\nuser:"])
    assert [finder.push(piece) for piece in ("one\n", "\nus", "ed", "\n\nuser", ": no")] == [
        "one",
        "",
        "\n\nused",
        "",
        "",
    ]
    assert finder.found == "\n\nuser:" and finder.beyond == " no"


def test_a_prompt_is_a_prefix_of_the_training_text():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How much is 1 + 1?"}]},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    assert prompt_of(messages) == (
        "system: Be brief.\n\nuser: How much is 1 + 1?\n\nassistant: It is 2.\n\n"
        "user: And 2 + 2?\n\nassistant:"
    )


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": " "}], [{"role": "user"}]])
def test_a_conversation_without_text_is_refused(messages):
    with pytest.raises(UserError, match="messages hold no text"):
        prompt_of(messages)
