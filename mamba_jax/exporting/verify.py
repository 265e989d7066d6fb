"""Compares an exported model in its engine with the original: ids, logits and greedy text.

The ids are those of prompts and chats, some of which spell the separator's name.
"""

import dataclasses
import functools
import json
import os
import pathlib
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, need
from mamba_jax.exporting import gguf_file, hf, onnx_file, tokenizer_files
from mamba_jax.exporting.tensors import EMBEDDING, from_hf
from mamba_jax.generation.chat import prompt_of
from mamba_jax.models import build

PROMPTS = (
    "The history of science is",
    "def main():\n    return ",
    "If 3 apples cost 12 coins, one apple costs",
)
GREEDY_TOKENS = 64
# Shares of the largest logit. float32: sums in another order. llama.cpp also rounds the factors of
# narrow weights to their dtype, so greedy texts may differ where two tokens are equally likely.
TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
# llama.cpp returns _TOP log-probabilities; a greedy text is compared every _EVERY tokens.
_TOP, _EVERY = 20, 8


class Verdict(NamedTuple):
    """The result of a comparison."""

    largest_difference: float  # the file in the other engine against the file in ours
    largest_value: float  # logit or log-probability; scales the tolerance
    drift: float  # in our engine: the file's weights against the checkpoint's
    same_greedy: int  # tokens, of ``n_greedy``
    n_greedy: int

    def summary(self, dtype: str) -> str:
        """Returns a line for the log."""
        return (
            f"verified: largest difference {self.largest_difference:.2e} (largest logit "
            f"{self.largest_value:.3g}), {self.same_greedy} of {self.n_greedy} greedy tokens the "
            f"same; {dtype} moves logits by up to {self.drift:.2e}"
        )


@functools.partial(jax.jit, static_argnames="config")
def _run(params: Any, config: ModelConfig, ids_bt: jax.Array) -> jax.Array:
    return build.apply(params, config, ids_bt)[0]


class _Ours:
    """Our model in float32, with the file's weights and with the checkpoint's."""

    def __init__(
        self,
        exact: Mapping[str, np.ndarray],
        rounded: Mapping[str, np.ndarray],
        config: ModelConfig,
    ):
        n_ids = len(exact[EMBEDDING])
        self._config = dataclasses.replace(
            config, vocab_size=n_ids, dtype="float32", gate_skip_threshold=0.0
        )
        self._exact, self._rounded = from_hf(exact, self._config), from_hf(rounded, self._config)
        self._difference = self._largest = self._drift = 0.0
        self._same = self._total = 0

    def logits(self, ids_t: np.ndarray) -> np.ndarray:
        """Returns the logits (t, v) that the file's weights give."""
        ids_bt = jnp.asarray(ids_t[None], jnp.int32)
        ours_tv = np.asarray(_run(self._rounded, self._config, ids_bt))[0]
        exact_tv = np.asarray(_run(self._exact, self._config, ids_bt))[0]
        self._drift = max(self._drift, float(np.abs(ours_tv - exact_tv).max()))
        return ours_tv

    def compare(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Adds values of both engines, of equal shapes."""
        # fmax would drop a NaN.
        self._difference = np.maximum(self._difference, np.abs(ours - theirs).max())
        self._largest = max(self._largest, float(np.abs(ours).max()))

    def compare_greedy(self, logits_tv: np.ndarray, chosen_t: np.ndarray, eot_id: int) -> None:
        """Adds their greedy text, in which ``eot_id`` was suppressed so that it does not end.

        One full pass over their text gives our choice after each token: equal choices everywhere
        mean equal greedy texts.
        """
        allowed_tv = np.where(np.arange(logits_tv.shape[-1]) == eot_id, -np.inf, logits_tv)
        self._same += int((allowed_tv.argmax(-1) == chosen_t).sum())
        self._total += len(chosen_t)

    def verdict(self, dtype: str, *, same_text: bool) -> Verdict:
        """Returns the result.

        Raises:
          UserError: if the two differ by more than rounding explains.
        """
        found = Verdict(
            float(self._difference), self._largest, self._drift, self._same, self._total
        )
        # "not <=": a NaN must not pass.
        if not found.largest_value or not found.largest_difference <= TOLERANCE[dtype] * max(
            found.largest_value, 1.0
        ):
            raise UserError(
                f"verification failed: logits differ by {found.largest_difference:.2e} "
                f"(largest logit {found.largest_value:.3g}); the export was removed"
            )
        if same_text and found.same_greedy != found.n_greedy:
            raise UserError(
                f"verification failed: {found.same_greedy} of {found.n_greedy} greedy tokens are "
                "the same; the export was removed"
            )
        return found


def _prompts(tokenizer: Tokenizer, keeps_text: bool) -> dict[str, np.ndarray]:
    """Returns prompts with their int32 ids, which begin with the separator as in training.

    Args:
      tokenizer: the model's tokenizer.
      keeps_text: the engine keeps the separator's name as text; then a prompt spells it.
    """
    texts = (*PROMPTS, tokenizer_files.spelled(tokenizer)) if keeps_text else PROMPTS
    with_end = tokenizer_files.with_end
    return {text: np.array(with_end(tokenizer, text), np.int32) for text in texts}


def _chats(tokenizer: Tokenizer, keeps_text: bool) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Yields chats and their text up to the next answer; arguments as in ``_prompts``."""
    typed = tokenizer_files.spelled(tokenizer) if keeps_text else "no more"
    turns = (
        ("system", "Be brief."),
        ("user", "  Is 東京 a city? 🙂\n\nI think so. "),
        ("assistant", ""),
        ("assistant", " Yes — naïvely. "),
        ("user", typed),
    )
    messages = [{"role": role, "content": content} for role, content in turns]
    for chat in (messages, messages[1:], messages[1:2], messages[3:]):
        yield chat, prompt_of(chat)


class _TokenizerFacts(NamedTuple):
    """What an exported folder states about its tokenizer."""

    keeps_text: bool  # special tokens' names are text
    renders_chats: bool  # in our format
    begins_chats: bool  # the template begins a chat with the separator


def _files(folder: pathlib.Path, tokenizer: Tokenizer) -> _TokenizerFacts:
    names = (tokenizer_files.FILE_NAME, tokenizer_files.CONFIG_NAME)
    contents = {name: json.loads((folder / name).read_text("utf-8")) for name in names}
    config = contents[tokenizer_files.CONFIG_NAME]
    return _TokenizerFacts(
        config["split_special_tokens"] and tokenizer_files.keeps_text(tokenizer, contents),
        tokenizer_files.is_ours(config["chat_template"]),
        tokenizer_files.begins_chats(contents),
    )


def check_hf(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
) -> Verdict:
    """Loads a folder with transformers and compares, both sides computing in float32.

    Args:
      folder: as written.
      tensors: what ``tensors.to_hf`` gave, unrounded.
      config: the model's config.
      tokenizer: the model's tokenizer; its ids must equal those of the folder's tokenizer.
      dtype: that the folder was written in.

    Raises:
      UserError: if the two differ, or torch or transformers is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # the folder must be enough
    torch, transformers = need("torch", "bench"), need("transformers", "bench")
    trust = {"trust_remote_code": not config.is_plain}  # the program that we wrote there
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    rounded = {k: hf.round_to(v, dtype).astype(np.float32) for k, v in tensors.items()}
    ours = _Ours(tensors, rounded, config)
    files = _files(folder, tokenizer)
    if files.renders_chats:
        for chat, text in _chats(tokenizer, files.keeps_text):
            ids = their_tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False
            )
            wanted = tokenizer_files.with_end(tokenizer, text)
            _check_ids(text, ids, np.array(wanted[not files.begins_chats :]))
    prompts = _prompts(tokenizer, files.keeps_text)
    # As one batch, whose shorter rows are padded.
    batch = their_tokenizer(list(prompts), padding=True, return_tensors="pt")
    with torch.no_grad():
        found_bt = theirs.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=GREEDY_TOKENS,
            suppress_tokens=[tokenizer.eot_id],
            do_sample=False,
        )
    for (text, ids), found in zip(prompts.items(), found_bt, strict=True):
        _check_ids(text, their_tokenizer(text)["input_ids"], ids)
        found = found[-len(ids) - GREEDY_TOKENS :]
        _check_ids(text, found[: len(ids)].tolist(), ids)  # padded on the left
        with torch.no_grad():
            their_logits = theirs(found[None, :-1]).logits[0].numpy()
        logits_tv = ours.logits(found[:-1].numpy())
        ours.compare(logits_tv, their_logits)
        ours.compare_greedy(logits_tv[len(ids) - 1 :], found[len(ids) :].numpy(), tokenizer.eot_id)
    return ours.verdict("f32", same_text=True)


def check_gguf(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
) -> Verdict:
    """Loads a file with llama.cpp and compares its most likely tokens' log-probabilities.

    Arguments are as in ``check_hf``.

    Raises:
      UserError: if the two differ, or llama.cpp (the package xllamacpp) is not installed.
    """
    llama = need("xllamacpp", "llamacpp")
    settings = llama.CommonParams()
    settings.model.path = str(folder / gguf_file.FILE_NAME)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 256, 1, -1
    settings.warmup = settings.fit_params = False
    server = llama.Server(settings)
    ours = _Ours(tensors, gguf_file.rounded(tensors, dtype), config)

    def call(path: str, **request: Any) -> Any:
        url = f"{server.listening_address}{path}"
        data = json.dumps(request).encode() if request else None
        header = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data, header)) as answer:
            return json.load(answer)

    n = GREEDY_TOKENS
    greedy = {"temperature": 0, "top_k": 1, "return_tokens": True, "ignore_eos": True}
    greedy |= {"cache_prompt": False, "post_sampling_probs": False}
    # Without parse_special, names of special tokens stay text; /completion has no such option.
    encode = lambda text: call("/tokenize", content=text, add_special=True, parse_special=False)
    if tokenizer_files.is_ours(call("/props")["chat_template"]):
        for chat, text in _chats(tokenizer, keeps_text=True):
            rendered = call("/apply-template", messages=chat)["prompt"]
            wanted = tokenizer_files.with_end(tokenizer, text)
            _check_ids(text, encode(rendered)["tokens"], np.array(wanted))
    for text, ids in _prompts(tokenizer, keeps_text=True).items():
        _check_ids(text, encode(text)["tokens"], ids)
        chosen = np.array(call("/completion", prompt=ids.tolist(), n_predict=n, **greedy)["tokens"])
        logits_tv = ours.logits(np.r_[ids, chosen[:-1]])[len(ids) - 1 :]
        ours.compare_greedy(logits_tv, chosen, tokenizer.eot_id)
        for place in range(0, n, _EVERY):
            prompt = np.r_[ids, chosen[:place]].tolist()
            answer = call("/completion", prompt=prompt, n_predict=1, n_probs=_TOP, **greedy)
            # The server reports no probabilities for a token that leaves a character incomplete.
            for step in answer.get("completion_probabilities", ()):
                top = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
                log_v = logits_tv[place] - np.logaddexp.reduce(logits_tv[place])
                ours.compare(log_v[list(top)], np.array(list(top.values())))
    return ours.verdict(dtype, same_text=dtype == "f32")


def check_onnx(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
) -> Verdict:
    """Runs both graphs with onnxruntime: prompts as rows, texts step by step and as rows.

    Arguments are as in ``check_hf``.

    Raises:
      UserError: if the two differ, or onnxruntime is not installed.
    """
    runtime = need("onnxruntime", "onnx")
    row, step = (
        runtime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in (onnx_file.ROW, onnx_file.STEP)
    )
    record = folder / tokenizer_files.FILE_NAME
    their_tokenizer = need("tokenizers", "export").Tokenizer.from_file(str(record))
    ours = _Ours(tensors, tensors, config)
    files = _files(folder, tokenizer)
    their_tokenizer.encode_special_tokens = files.keeps_text

    def run(session: Any, ids_t: np.ndarray, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        values = session.run(None, {"input_ids": ids_t[None].astype(np.int64), **past})
        found = dict(zip((one.name for one in session.get_outputs()), values, strict=True))
        logits_tv = found.pop("logits")[0]
        return logits_tv, {name.replace("present", "past", 1): x for name, x in found.items()}

    texts = [text for _, text in _chats(tokenizer, files.keeps_text)]
    for text in texts if files.renders_chats else ():
        wanted = tokenizer_files.with_end(tokenizer, text)
        _check_ids(text, their_tokenizer.encode(text).ids, np.array(wanted))
        if files.begins_chats:
            opened = tokenizer_files.end_name(tokenizer) + text
            ids = their_tokenizer.encode(opened, add_special_tokens=False).ids
            _check_ids(opened, ids, np.array(wanted))
    for text, ids in _prompts(tokenizer, files.keeps_text).items():
        _check_ids(text, their_tokenizer.encode(text).ids, ids)
        logits_tv, cache = run(row, ids, {})
        theirs, chosen = [logits_tv], np.array([], np.int32)
        while True:
            allowed_v = logits_tv[-1].copy()
            allowed_v[tokenizer.eot_id] = -np.inf
            chosen = np.append(chosen, allowed_v.argmax())
            if len(chosen) == GREEDY_TOKENS:
                break
            logits_tv, cache = run(step, chosen[-1:], cache)
            theirs.append(logits_tv)
        read = np.r_[ids, chosen[:-1]]
        logits_tv = ours.logits(read)
        ours.compare(logits_tv, np.concatenate(theirs))
        ours.compare(logits_tv, run(row, read, {})[0])
        ours.compare_greedy(logits_tv[len(ids) - 1 :], chosen, tokenizer.eot_id)
    return ours.verdict(dtype, same_text=True)


def _check_ids(text: str, theirs: list[int], ours: np.ndarray) -> None:
    if theirs != ours.tolist():
        raise UserError(
            f"verification failed: the tokenizers give different ids for {text!r}; the export was "
            "removed"
        )
