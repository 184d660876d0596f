from pathlib import Path

import pytest
from journeys import Journey
from test_slice_journey import *  # noqa
from test_slice_journey import sliced  # noqa


@pytest.fixture(scope="session")
def finished_journey():
    return Journey(Path("/tmp/w/sj_run/stub"), ["/tmp/w/sj_run/a/small.yaml"]), None
