"""How a worker of the benchmark answers: it warms up, says so, and times one repetition for each line that it reads.

Standard library only, since both virtual environments read it. A repetition that shares the machine is worth nothing,
so each tells how many cores other processes used meanwhile.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

_SHORTEST_SECONDS = 0.5  # /proc/stat counts in hundredths: shorter calls are bundled


def serve(
    call: Callable[[], object],
    *,
    steps_per_call: int = 1,
    warm_up: int = 2,
    peak_bytes: Callable[[], int | None] | None = None,
    **facts,
) -> None:
    """Answers each line of stdin with a JSON line of one repetition, until stdin ends.

    Args:
      call: the work, complete when it returns.
      steps_per_call: what its seconds are divided by.
      warm_up: calls before the first answer; the first of them compiles.
      peak_bytes: the most memory that it took so far; default: the process's.
      **facts: told once.
    """
    start = time.perf_counter()
    call()
    first_call = time.perf_counter() - start
    for _ in range(warm_up - 1):
        start = time.perf_counter()
        call()
    calls = max(1, round(_SHORTEST_SECONDS / (time.perf_counter() - start)))
    print(json.dumps({"first_call_seconds": first_call, **facts}), flush=True)
    for _ in sys.stdin:
        busy, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - start
        foreign = max(0.0, busy_seconds() - busy - (time.process_time() - cpu)) / seconds
        peak = (peak_bytes or _process_peak_bytes)()
        answer = {"seconds": seconds / calls / steps_per_call, "foreign_cores": foreign}
        answer["peak_gib"] = peak and peak / 2**30
        print(json.dumps(answer), flush=True)


def _process_peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, *rest = (int(word) for word in file.readline().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
