"""On the path of a run's Python processes this moves their wall clock by the seconds that a file says."""

import os
import time

CLOCK_FILE = os.environ["SHEAR_TEST_CLOCK"]
true_time, true_time_ns = time.time, time.time_ns


def offset_s() -> int:
    with open(CLOCK_FILE) as file:
        return int(file.read() or 0)


time.time = lambda: true_time() + offset_s()
time.time_ns = lambda: true_time_ns() + offset_s() * 10**9
