import pytest
from process_group import ProcessGroup


@pytest.fixture(scope="session")
def one_process():
    """A process group of one, with DeepSpeed."""
    group = ProcessGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="session")
def two_processes():
    """A process group of two, with DeepSpeed."""
    group = ProcessGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A corpus and a source model whose sizes divide by nothing."""
    from phase_runs import TinyRun

    return TinyRun.write(tmp_path_factory.mktemp("tiny-run"))
