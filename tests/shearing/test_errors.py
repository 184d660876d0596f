import pickle

from shearing.errors import UserError


def test_each_problem_is_kept_apart_also_across_processes():
    """Bug: an error that came back from a worker shows all its problems as one."""
    error = pickle.loads(pickle.dumps(UserError(["first", "second"])))
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"
    assert UserError("only").problems == ["only"]
