"""One candidate in a process of its own: ``python -m benchmarks.probe REQUEST`` (JSON).

Prints JSON lines: a sample as it comes, at the end the peak memory; or a note on what went wrong.
"""

import json
import sys
import time

from benchmarks.harness import peak_rss_bytes, reason
from benchmarks.run import load, make_context


def main() -> None:
    """Runs what ``harness.isolate`` requests."""
    request = json.loads(sys.argv[1])
    benchmark = load(request["benchmark"])
    context = make_context(quick=request["quick"])
    candidates = benchmark.candidates(request["case"], context)
    (candidate,) = (c for c in candidates if c.name == request["name"])
    try:
        prepared = candidate.prepare()
        for _ in range(request["repetitions"]):
            send({"begins": True})
            begin = time.perf_counter()
            counted = prepared.run()
            send({"sample_secs": time.perf_counter() - begin if counted is None else counted})
    except Exception as error:
        send({"note": reason(error)})
    else:
        send({"peak_rss_bytes": peak_rss_bytes()})


def send(message: dict) -> None:
    """Prints one line for the parent, at once: it may end this process at any time."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
