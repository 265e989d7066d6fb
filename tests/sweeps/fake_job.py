"""Replaces ``mamba_jax.train`` in a sweep: its loss is a function of the settings.

eval_loss = (log10(learning_rate) + 3)² + dropout, reached over ten evaluations. A file ``fail`` in
its folder's parent names a learning rate that fails once; with ``slow`` there it takes its time.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(flags["output_dir"])
rate = float(flags.get("config.training.learning_rate", 1e-3))
loss = (math.log10(rate) + 3) ** 2 + float(flags.get("config.model.dropout", 0))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with (out.parent / "starts").open("a") as starts:
    print(out.name, os.environ.get("CUDA_VISIBLE_DEVICES", "-"), time.monotonic(), file=starts)
fail = out.parent / "fail"
if fail.is_file() and float(fail.read_text()) == rate:
    fail.unlink()
    sys.exit("error: no luck")
done = out / "steps"
begun = int(done.read_text()) if done.is_file() else 0  # --resume=auto
slow = (out.parent / "slow").is_file()
with (out / "metrics.jsonl").open("a") as metrics:
    for step in range(begun + 1, 11):
        value = loss + (10 - step) / 10
        print(
            json.dumps({"step": step, "loss": value, "eval_loss": value}), file=metrics, flush=True
        )
        done.write_text(str(step))
        time.sleep(0.15 if slow else 0)
        if stop and step < 10:
            print(f"stopped by SIGTERM and saved at step {step}")
            sys.exit(75)
with (out.parent / "ends").open("a") as ends:
    print(out.name, time.monotonic(), file=ends)
