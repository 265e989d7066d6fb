"""Windows as text: every boundary is shown, nothing is lost, no text moves the cursor."""

import re

import numpy as np

from mamba_jax.data.show import count_separators, show_window
from mamba_jax.data.tokenizers.load import load_tokenizer

BYTES = load_tokenizer("bytes")
EOT = BYTES.eot_id


def window_of(*parts):
    return np.concatenate([np.atleast_1d(part) for part in parts]).astype(np.int32)


def ids(text, is_target=True):
    tokens = BYTES.encode(text)
    return tokens if is_target else ~tokens


WINDOW = window_of(
    ids("end of one"), EOT, ids("Q: naïve 🌍?", is_target=False), ids(" A\n"), EOT, ids("x"), 257,
    EOT, [~EOT] * 5,
)  # fmt: skip


def test_plain_marks():
    shown = show_window(WINDOW, BYTES, {257: "suffix"}, colour=False)
    assert shown == (
        "end of one⟦document⟧⟦not trained on:⟧Q: naïve 🌍?⟦trained on:⟧ A\n⟦document⟧x⟦suffix⟧"
        "⟦document⟧⟦padding: 5 tokens⟧"
    )


def test_colours_separate_documents_and_dim_masked_text():
    shown = show_window(WINDOW, BYTES, {257: "suffix"}, colour=True)
    plain = re.sub(r"\033\[[\d;]*m", "", shown)
    assert plain == (
        "end of one⟦document⟧Q: naïve 🌍? A\n⟦document⟧x⟦suffix⟧⟦document⟧⟦padding: 5 tokens⟧"
    )
    style = {
        text: codes for codes, text in re.findall(r"((?:\033\[[\d;]*m)+)([^\033]+)\033\[0m", shown)
    }
    assert style["end of one"] == style["x"] != style[" A\n"]
    assert style["Q: naïve 🌍?"] == style[" A\n"] + "\033[2m"
    assert style["⟦padding: 5 tokens⟧"] == "\033[2m"
    assert shown.endswith("\033[0m")


def test_text_cannot_control_the_terminal():
    shown = show_window(window_of(EOT, ids("a\x1b[2Jb\r\x07\u202e")), BYTES, {}, colour=False)
    assert shown == "⟦document⟧a\\x1b[2Jb\\r\\x07\\u202e"


def test_characters_cut_by_the_window_are_replaced():
    shown = show_window(window_of(ids("é")[1:], ids("a🌍")[:3]), BYTES, {}, colour=False)
    assert shown == "\ufffda\ufffd"


def test_one_token_of_padding_is_padding():
    shown = show_window(window_of(EOT, ids("ab"), EOT, ~EOT), BYTES, {}, colour=False)
    assert shown == "⟦document⟧ab⟦document⟧⟦padding: 1 tokens⟧"


def test_a_masked_separator_is_not_padding():
    window = window_of(
        EOT,
        ids("ask", is_target=False),
        ~EOT,
        ids("q?", is_target=False),
        ids(" a"),
        ~EOT,
        ids("z"),
        ~EOT,
    )
    assert show_window(window, BYTES, {}, colour=False) == (
        "⟦document⟧⟦not trained on:⟧ask⟦document⟧q?⟦trained on:⟧ a⟦not trained on:⟧⟦document⟧"
        "⟦trained on:⟧z⟦not trained on:⟧⟦document⟧⟦trained on:⟧"
    )
    assert count_separators(window, EOT) == 4
    padded = window_of(window, ~EOT, ~EOT)
    assert show_window(padded, BYTES, {}, colour=False).endswith(
        "⟦trained on:⟧z⟦not trained on:⟧⟦document⟧⟦trained on:⟧⟦padding: 2 tokens⟧"
    )
    assert count_separators(padded, EOT) == 4
    assert count_separators(WINDOW, EOT) == 3
