"""Folders that cannot be opened or read, in words that say which key and what to look at."""

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator import preflight as checks
from orchestrator.stores import open_named
from shearing.errors import UserError


def test_a_scheme_that_nobody_knows_names_its_key():
    with pytest.raises(UserError, match=r"workspace = 'gopher://x/y' cannot be opened: .*Allowed: a folder"):
        open_named("workspace", "gopher://x/y")


def test_a_storage_that_refuses_is_a_problem_beside_the_others(tmp_path, monkeypatch):
    """Catches a bucket without credentials that ends the check in a traceback, and hides what else is wrong."""

    def refuse(*_arguments):
        raise PermissionError("When reading information for key 'stages/corpus.json': Access Denied")

    monkeypatch.setattr(checks, "recipe_conflicts", refuse)
    problems = checks.preflight(tiny_recipe(tmp_path, "engine.workers=3"))
    assert any("do not divide" in problem for problem in problems)
    (refused,) = [problem for problem in problems if "Access Denied" in problem]
    assert f"workspace = '{tmp_path}/run' cannot be read" in refused
    assert "credentials" in refused
