import socket
import time

import pytest
from ray._common.network_utils import build_address

from orchestrator import head_watch, ray_session
from orchestrator.head_watch import HeadWatch


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(head_watch, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(head_watch, "GIVEN_UP_AFTER_S", 0.4)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.01)
    yield listening
    listening.close()


def accept_for(head, seconds):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            head.accept()[0].close()
        except TimeoutError:
            continue


def test_a_head_that_is_gone_is_told_of_once(head):
    """Catches a driver that waits for a head that is no more, and one that is ended though its head answers."""
    lost = []
    watch = HeadWatch(f"127.0.0.1:{head.getsockname()[1]}", lambda: lost.append(time.monotonic()))
    accept_for(head, 1.0)
    assert lost == []
    gone = time.monotonic()
    head.close()
    while not lost and time.monotonic() < gone + 30:
        time.sleep(0.05)
    time.sleep(0.2)
    assert len(lost) == 1
    assert lost[0] - gone >= 0.3, "a head that is started again has no time for it"
    watch.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine knows no IPv6")
def test_a_head_may_have_an_address_of_ipv6():
    """Catches a cluster of IPv6 taken for lost half a minute after each start."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        address = build_address("::1", listening.getsockname()[1])
        watch = HeadWatch(address, lambda: None)
        watch.stop()
        assert watch.answers()
        ray_session._check_address(address)


def test_nobody_is_told_after_the_end(head):
    """Catches a run that ended well and is then said to have failed, since its own Ray ended with it."""
    lost = []
    watch = HeadWatch(f"127.0.0.1:{head.getsockname()[1]}", lambda: lost.append("lost"))
    watch.stop()
    head.close()
    time.sleep(1.0)
    assert lost == []
