"""Replaces ``mamba_jax.train``: prints a run's lines and ends as the file ``behaviour`` says.

``run`` (until SIGTERM: 75), ``quick`` (one step, 0), ``crash``, ``mistake``, ``killed``, ``abort``,
``fill`` (a full disk), or several codes as ``75 76+ 0``, of which each start uses up the first
("+": after a new checkpoint).
"""

import os
import pathlib
import signal
import sys
import time

behaviour = pathlib.Path("behaviour").read_text().strip()
if "--dry_run" in sys.argv:
    print("the plan")
    if behaviour == "refused":
        sys.exit("error: nothing fits")
    sys.exit(0)


def say(text):
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def stop(number, frame):
    say(f"stopped by {signal.Signals(number).name} and saved at step 1")
    sys.exit(75)


signal.signal(signal.SIGTERM, stop)
with open("starts", "a") as starts:
    print(*sys.argv[1:], file=starts)
say("step 1/10  loss 4.2500  lr 0.0003  gradient norm 0.8  1,234 tokens/s  ETA 0:00:09")
say("step 1: eval loss 4.5000, perplexity 90.02, 2.1 bits per byte")
if behaviour == "crash":
    raise RuntimeError("the bolt came loose")
if behaviour == "mistake":
    sys.exit("error: training diverged at step 1")
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "abort":
    os.abort()
if behaviour == "fill":
    with open("out/ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            raise SystemExit(2) from None
if behaviour[0].isdigit():
    code, _, rest = behaviour.partition(" ")
    pathlib.Path("behaviour").write_text(rest or code)
    checkpoints = len(list(pathlib.Path("out").glob("step_*")))
    if code.endswith("+") or not checkpoints:
        pathlib.Path(f"out/step_{checkpoints + 1}").mkdir()
    sys.exit(int(code.rstrip("+")))
while behaviour == "run":
    time.sleep(0.05)
