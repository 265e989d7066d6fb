"""Runs' folders as training leaves them, without training."""

import html.parser
import json
import pathlib

from mamba_jax.config import freeze, preset_config, to_dict


def config(**changes):
    """A config as ``metrics.jsonl`` holds it; changes by dotted name with ``__`` for the dot."""
    made = preset_config("hybrid-small")
    made.model.update(vocab_size=257, max_seq_len=100, n_layers=2)
    made.training.update(max_steps=40, warmup_steps=4)
    made.vram.update(effective_batch_size=8, batch_size=8)
    for name, value in changes.items():
        group, _, leaf = name.rpartition("__")
        (made[group] if group else made)[leaf] = value
    return to_dict(freeze(made))


def started(step=0, at="2026-01-02 03:04:05", parameters=1234, log="", **changes):
    about = {"started": at, "config": config(**changes), "parameters": parameters}
    if log:
        about["log"] = log
    return {"step": step, "run": about}


def trained(first, last, loss=lambda step: 5 - step / 20):
    """A record for each step, as ``Monitor.step`` makes them."""
    return [
        {"step": s, "loss": loss(s), "learning_rate": s * 1e-5, "gradient_norm": 1 + s % 7 / 10}
        for s in range(first, last + 1)
    ]


def rate(step, tokens_per_sec, kind="H200", count=2, memory_bytes=3 << 30, data_wait=0.25):
    return {
        "step": step,
        "tokens_per_sec": tokens_per_sec,
        "device_kind": kind,
        "device_count": count,
        "memory_bytes": memory_bytes,
        "data_wait": data_wait,
    }


def evaluated(step, loss, bits=1.5, **layers):
    return {
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": 2.718281828**loss,
        "eval_bits_per_byte": bits,
        **layers,
    }


def write(folder, records):
    """Writes ``metrics.jsonl``, and returns the folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


class Page(html.parser.HTMLParser):
    """A page taken apart: its data, the text of its elements, its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts, self.rows = [], [], [], {}
        self._open, self._row = "", None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        kinds = [tag for tag in self.tags if tag[0] == "script"]
        data = [s for (_, a), s in zip(kinds, self.scripts, strict=True) if a.get("id") == "data"]
        self.data = json.loads(data[0]) if data else None

    def handle_starttag(self, tag, attributes):
        self._open = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            marks = dict(attributes)
            self._row = self.rows.setdefault(marks.get("data-row") or marks.get("data-field"), [])
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._row = None
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.words.append(data)
            if self._row:
                self._row[-1] += data

    def chart(self, key):
        """The curves of a chart by name."""
        (found,) = [chart for chart in self.data["charts"] if chart["key"] == key]
        return {curve["name"]: curve for curve in found["curves"]}
