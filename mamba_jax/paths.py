"""Paths as people write them: a leading ``~`` is the home folder, wherever a path is given.

The shell expands ``~/x`` only as a word of its own, not in ``--flag=~/x`` or a config file.
"""

import os

# Flags, and fields of the config by their last part, whose value is or may be a path. Neither an id
# of the Hub nor the name of a tokenizer begins with "~".
_NAMES = frozenset(
    (
        *("cache_dir", "data_dir", "log_dir", "output_dir", "task_dir", "tensorboard_dir"),
        *("checkpoint", "config", "data", "dataset", "ensemble", "json", "model", "out", "output"),
        *("prompt_file", "resume", "run", "sweep", "tokenizer"),
    )
)


def expand(name: str, value: str) -> str:
    """Returns the value of a flag or field, expanded where it is a path."""
    return os.path.expanduser(value) if name.rpartition(".")[2] in _NAMES else value


def expand_arguments(argv: list[str]) -> list[str]:
    """Returns the words of a command line with their paths expanded.

    A word that follows a flag of text, such as a prompt, is left as it is. A word that follows no
    flag is a folder: no command takes text there.
    """
    expanded, flag = [], ""
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = "" if equals else name
            word = f"{name}={expand(name.lstrip('-'), value)}" if equals else word
        elif not flag:
            word = os.path.expanduser(word)
        else:
            word, flag = expand(flag.lstrip("-"), word), ""
        expanded.append(word)
    return expanded
