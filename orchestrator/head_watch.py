"""Looks after Ray's head from the driver, so that a run whose head is lost ends with words and in good time.

Ray itself tries to reach its head for a minute and then ends the driver's process from inside, wherever that is, with a
line of its own log at most.
"""

import socket
import threading
import time
from collections.abc import Callable

LOOK_EVERY_S = 5.0
ANSWER_WITHIN_S = 5.0
GIVEN_UP_AFTER_S = 30.0  # a head that comes back has less than Ray's own 60 s; we have to be the first to speak


class HeadLostError(RuntimeError):
    """Ray's head is gone, and with it all that ran there."""


def host_and_port(address: str) -> tuple[str, int]:
    """What a socket connects to for HOST:PORT; IPv6 comes as [::1]:6379.

    Raises:
        ValueError: It is no HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"{address!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


class HeadWatch:
    """Calls `lost`, once, in a thread of its own, when the head has not taken a connection for so long.

    Args:
        address: HOST:PORT of the head's store.
        lost: What then.
    """

    def __init__(self, address: str, lost: Callable[[], None]) -> None:
        self.place, self.lost = host_and_port(address), lost
        self._over = threading.Event()
        threading.Thread(target=self._look, name="head-watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self) -> None:
        answered_s = time.monotonic()
        while not self._over.wait(LOOK_EVERY_S):
            if self.answers():
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s > GIVEN_UP_AFTER_S and not self._over.is_set():
                self.lost()
                return

    def answers(self) -> bool:
        """Whether the head takes a connection now."""
        try:
            socket.create_connection(self.place, timeout=ANSWER_WITHIN_S).close()
        except OSError:
            return False
        return True
