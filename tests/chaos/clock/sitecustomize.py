"""On the path of a run's Python processes this moves their wall clock by the seconds that a file says."""

import os
import time

CLOCK_FILE = os.environ["SHEAR_TEST_CLOCK"]
true_time, true_time_ns = time.time, time.time_ns


def offset_s() -> int:
    with open(CLOCK_FILE) as file:
        return int(file.read() or 0)


def moved_time() -> float:
    return true_time() + offset_s()


def moved_time_ns() -> int:
    return true_time_ns() + offset_s() * 10**9


for moved, name in ((moved_time, "time"), (moved_time_ns, "time_ns")):
    moved.__module__, moved.__name__, moved.__qualname__ = "time", name, name  # so it is pickled as time.time is
    setattr(time, name, moved)
