"""Generates text with the model in this folder; needs onnxruntime, numpy and tokenizers.

python generate_onnx.py "Once upon a time" --max_tokens 100 --temperature 0.8
python generate_onnx.py "How much is 1 + 1?" --chat
"""

import argparse
import json
import pathlib

import numpy as np
import onnxruntime
import tokenizers

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn")
parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path(__file__).parent)
parser.add_argument("--max_tokens", type=int, default=100)
parser.add_argument(
    "--temperature", type=float, default=0.0, help="0: always the most likely token"
)
parser.add_argument(
    "--top_k", type=int, default=0, help="sample from this many of the most likely tokens; 0: all"
)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()


def load(name):
    return onnxruntime.InferenceSession(options.model / name, providers=["CPUExecutionProvider"])


def run(session, feed):
    """Returns the logits after the last token, and the cache as the step graph takes it."""
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed), strict=True))
    logits_v = found.pop("logits")[0, -1]
    return logits_v, {name.replace("present", "past", 1): x for name, x in found.items()}


def choose(logits_v):
    if options.temperature == 0:
        return int(logits_v.argmax())
    if options.top_k:
        least = np.sort(logits_v)[-options.top_k :][0]
        logits_v = np.where(logits_v >= least, logits_v, -np.inf)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    return int((logits_v / options.temperature + rng.gumbel(size=len(logits_v))).argmax())


rng = np.random.default_rng(options.seed)
end_id = json.loads((options.model / "config.json").read_text("utf-8"))["eos_token_id"]
tokenizer = tokenizers.Tokenizer.from_file(str(options.model / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # names of special tokens in the prompt stay text
# As in training; an answer ends where the model starts the user's next turn.
prompt, stop = options.prompt, None
if options.chat:
    prompt, stop = f"user: {options.prompt}\n\nassistant:", "\n\nuser:"
prompt_ids = np.array([tokenizer.encode(prompt).ids])  # begins with the separator
logits_v, cache = run(load("model.onnx"), {"input_ids": prompt_ids})
step, written, text = load("step.onnx"), [], ""
while len(written) < options.max_tokens and (token := choose(logits_v)) != end_id:
    written.append(token)
    text = tokenizer.decode(written)
    if stop and stop in text:
        text = text.partition(stop)[0]
        break
    logits_v, cache = run(step, {"input_ids": np.array([[token]]), **cache})
print(text.removeprefix(" ") if options.chat else prompt + text)
