"""A cluster whose head dies: the driver says so and ends, and the same command goes on on a new head."""

import pytest
from clusters import started_head
from journeys import end_with_children, newest_step, wait_until
from test_faults import check_resumed, check_whole, ready_journey

SAYS_SO_WITHIN_S = 240  # after 30 s by its own clock; Ray's own end comes after 60


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_on_on_a_new_head_by_the_same_command(finished_journey, tmp_path):
    """Catches a driver that waits for ever for a head that is gone, one that ends without a word, and anything that a
    run needs besides its workspace: Ray's own state is lost with its head."""
    finished, _ = finished_journey
    journey = ready_journey(finished, tmp_path / "again")
    with started_head(tmp_path / "first.log", 6, "--include-dashboard=false") as first:
        driver = journey.start(**first.words, RAY_ADDRESS=first.address)
        try:
            wait_until(
                lambda: newest_step(journey, "pruning") >= 11 or driver.poll() is not None, "step 11", timeout_s=900
            )
            assert driver.poll() is None, driver.communicate()[1]
            first.kill()
            _, words = driver.communicate(timeout=SAYS_SO_WITHIN_S)
        finally:
            end_with_children(driver)
    assert driver.returncode == 1
    assert "head does not answer: it is lost" in words, words
    assert "run the same again" in words
    assert "Traceback" not in words
    with started_head(tmp_path / "second.log", 6, "--include-dashboard=false") as second:
        done = journey.run(900, **second.words, RAY_ADDRESS=second.address)
    assert done.returncode == 0, done.stderr
    check_resumed(journey, "pruning", 1)
    for phase in ("pruning", "recovery"):
        check_whole(journey, phase, finished)
