"""Continues prompts with a trained model, streaming the text.

python -m mamba_jax.generate --checkpoint checkpoints/quickstart --prompt "def "
python -m mamba_jax.generate --checkpoint DIR --prompt_file prompts.txt --batch_size 8
python -m mamba_jax.generate --ensemble DIR DIR DIR --prompt "Question: " --stop "\\n\\n"
python -m mamba_jax.generate --checkpoint DIR --chat
"""

import argparse
import contextlib
import pathlib
import re
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from mamba_jax.cli.flags import add_inference, add_models, chosen
from mamba_jax.errors import UserError, command

if TYPE_CHECKING:
    from mamba_jax.generation import Conversation
    from mamba_jax.generation.load import Found

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    arguments = parse(argv)
    check_together(arguments)
    prompts = [] if arguments.chat else read_prompts(arguments.prompt, arguments.prompt_file)
    try:
        run(arguments, prompts)
    except KeyboardInterrupt:
        print(flush=True)  # ends the line of the text so far
        raise
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax generate",
        description="Continue prompts with a trained model.",
    )
    add_models(parser, "tokens are chosen by the mean of their probabilities")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help='the text to continue; "" starts a document')
    source.add_argument(
        "--prompt_file",
        metavar="FILE",
        help="one prompt per line; '-' is standard input, which is also read if it is a pipe and "
        "no prompt is given",
    )
    parser.add_argument(
        "--suffix",
        metavar="TEXT",
        help="fill in the text between each prompt and this one; needs a model trained with "
        "data.fim_rate",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        type=unescaped,
        metavar="TEXT",
        help="stop before this text; repeatable; \\n, \\r, \\t and \\\\ stand for a line feed, a "
        "carriage return, a tab and a backslash",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="hold a conversation, one line per turn: /reset starts a new one, /exit or Ctrl-D "
        "quits, Ctrl-C stops an answer; needs a model trained on chats",
    )
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="with --chat: the system message"
    )
    for name, type_, default, about in (
        ("--max_tokens", int, 200, "new tokens per prompt, or per answer of a chat"),
        ("--temperature", float, 0.8, "0: always the most likely token"),
        ("--top_k", int, 50, "sample from this many of the most likely tokens; 0: all"),
        (
            "--top_p",
            float,
            0.95,
            "sample from the fewest tokens that together have this probability; 1: all",
        ),
        ("--seed", int, 0, "random seed"),
        ("--batch_size", int, 8, "prompts per batch"),
    ):
        about += " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    parser.add_argument(
        "--head",
        default="exact",
        metavar="NAME",
        help="exact, or int8: round the output matrix to int8, which generates a single prompt "
        "faster on a CPU and changes the logits slightly (default: %(default)s)",
    )
    add_inference(parser)
    return parser.parse_args(argv)


def unescaped(text: str) -> str:
    """Returns the text that an argument with escapes stands for."""
    return re.sub(r"\\([nrt\\])", lambda match: _ESCAPES[match[1]], text)


def check_together(arguments: argparse.Namespace) -> None:
    """Checks flags that exclude or need each other.

    Raises:
      UserError: for the first flag that has no effect or cannot work.
    """
    if "" in arguments.stop:
        raise UserError(
            '--stop "" would end every text immediately; give a text, or leave --stop out'
        )
    if arguments.system and not arguments.chat:
        raise UserError("--system needs --chat; add --chat, or leave --system out")
    for name in ("prompt", "prompt_file", "suffix"):
        if arguments.chat and getattr(arguments, name) is not None:
            raise UserError(f"--chat takes its turns from the terminal; leave --{name} out")


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    """Returns the prompts that the arguments name.

    Raises:
      UserError: if there are none.
    """
    if prompt is not None:
        return [prompt]
    if prompt_file is None and sys.stdin.isatty():
        raise UserError("no prompt given; give --prompt TEXT or --prompt_file FILE, or pipe one in")
    if prompt_file in (None, "-"):
        name, lines = "standard input", sys.stdin.read().splitlines()
    else:
        name = f"prompt file {prompt_file}"
        try:
            lines = pathlib.Path(prompt_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"cannot read {name}: {reason}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{name} contains no prompt; write one prompt per line")
    return prompts


def run(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Loads the models, then prints prompts and texts or holds a conversation."""
    from mamba_jax.checkpoints.arrays import restore_params
    from mamba_jax.generation import Conversation, check_settings, generate_text

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "head")
    settings = {name: getattr(arguments, name) for name in names}
    sampling = check_settings(**settings)  # before a large checkpoint is read
    first, *rest = find_all(arguments)
    others = [found.load(**chosen(arguments)) for found in rest]
    config, tokenizer = first.runnable(**chosen(arguments)), first.tokenizer
    more = {"stops": arguments.stop, "others": others}
    # No variable holds the parameters: they are freed once they are laid out for decoding.
    if arguments.chat:
        settings = {name: settings[name] for name in ("max_tokens", "seed", "head")}
        settings |= {"sampling": sampling, "system": arguments.system}
        chat(Conversation(restore_params(first.path), config, tokenizer, **settings, **more))
    else:
        generate_text(
            restore_params(first.path),
            config,
            tokenizer,
            prompts,
            suffix=arguments.suffix,
            on_text=InOrder(prompts, arguments.suffix or ""),
            **settings,
            **more,
        )


def find_all(arguments: argparse.Namespace) -> list["Found"]:
    """Finds the checkpoints that the arguments name, and checks all but their weights.

    Raises:
      UserError: if one cannot be read or used, or their tokenizers differ.
    """
    from mamba_jax.generation.ensemble import same_tokenizer
    from mamba_jax.generation.load import find

    log = lambda line: print(line, file=sys.stderr)
    all_found = []
    for folder in arguments.ensemble or [arguments.checkpoint]:
        found = find(folder, log)
        if arguments.suffix is not None and not found.metadata.config.data.fim_rate:
            raise UserError(
                f"--suffix: {found.path} was trained without data.fim_rate and cannot fill in the "
                "middle; leave --suffix out"
            )
        found.runnable(**chosen(arguments))
        all_found.append(found)
    same_tokenizer([found.tokenizer for found in all_found])
    return all_found


def chat(conversation: "Conversation") -> None:
    """Answers line by line, until the input ends or says /exit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and remembers them
    while (line := read_turn()) not in (None, "/exit"):
        if line == "/reset":
            conversation.reset()
        elif line:
            _label("assistant: ")
            with CtrlC() as ctrl_c:
                for piece in conversation.say(line):
                    print(piece, end="", flush=True)
                    if ctrl_c.pressed:
                        break
            print(flush=True)


def read_turn() -> str | None:
    """Returns the next line of the input without white space at its ends; None at its end.

    Raises:
      UserError: if it is not text.
    """
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            return input("user: ").strip()
        _label("user: ")
        line = sys.stdin.readline()
    except EOFError:
        line = ""
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: {error.reason}") from error
    if not line:
        _label("\n")  # of the shell's prompt
    return line.strip() if line else None


def _label(text: str) -> None:
    """Prints a label if the input is a terminal; for piped input only answers are printed."""
    if sys.stdin.isatty():
        print(text, end="", file=sys.stderr, flush=True)


class CtrlC:
    """Records the first Ctrl-C, so that the caller can stop cleanly; the second one interrupts.

    A context manager for the main thread.
    """

    def __enter__(self) -> "CtrlC":
        self.pressed = False
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class InOrder:
    """Prints prompts and their texts in order, and streams the first incomplete one."""

    def __init__(self, prompts: list[str], suffix: str = ""):
        """Args:
        prompts: come before their texts.
        suffix: comes after each.
        """
        self._prompts, self._suffix = prompts, suffix
        self._waiting = [""] * len(prompts)
        self._complete = [False] * len(prompts)
        self._current = -1
        self._begin_next()

    def __call__(self, index: int, text: str | None) -> None:
        self._waiting[index] += text or ""
        self._complete[index] = text is None
        while self._current < len(self._prompts):
            print(self._waiting[self._current], end="", flush=True)
            self._waiting[self._current] = ""
            if not self._complete[self._current]:
                break
            print(self._suffix, flush=True)
            self._begin_next()

    def _begin_next(self) -> None:
        self._current += 1
        n_prompts = len(self._prompts)
        if self._current == n_prompts:
            return
        if n_prompts > 1:
            separator = "\n" if self._current else ""
            print(f"{separator}==> {self._current + 1} of {n_prompts} <==")
        print(self._prompts[self._current], end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
