"""A rule named by its path is found without running it, and imported with clear errors."""

import sys

import pytest

from shearing.data.rule_by_path import import_rule, rule_problem
from shearing.errors import UserError

LOUD = "raise SystemExit('this ran')\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to start the command from, with a package whose import would end everything."""
    package = tmp_path / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text(LOUD)
    (package / "rules.py").write_text(LOUD + "if True:\n    def best(s): ...\nother = worst = 3\n")
    (tmp_path / "quiet_rules_module.py").write_text("def best(situation):\n    return situation.prior_D\nlimit = 3\n")
    (tmp_path / "broken_rules_module.py").write_text("def best(:\n")
    (tmp_path / "failing_rules_module.py").write_text("import nothing_of_this_name\ndef best(s): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("path", ["loud_package.rules:best", "loud_package.rules:worst", "quiet_rules_module:best"])
def test_what_is_there_has_no_problem_and_does_not_run(home, path):
    """Catches find_spec of a dotted name, which imports the parents."""
    assert rule_problem(path) is None
    assert "loud_package" not in sys.modules


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("loud_package.nowhere:best", "there is no module loud_package.nowhere"),
        ("no_such_module_here:best", "there is no module no_such_module_here"),
        ("quiet_rules_module:bset", "has no bset; it defines: best, limit"),
        ("quiet_rules_module.deeper:best", "there is no module quiet_rules_module.deeper"),
        ("broken_rules_module:best", "is not Python"),
    ],
)
def test_what_is_not_there_is_refused_before_the_run(home, path, message):
    assert message in rule_problem(path)


def test_import_and_its_errors(home):
    assert import_rule("quiet_rules_module:best").__name__ == "best"
    with pytest.raises(UserError, match=r"ray job submit --working-dir"):
        import_rule("no_such_module_here:best")
    with pytest.raises(UserError, match=r"ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        import_rule("failing_rules_module:best")
    with pytest.raises(UserError, match="limit is no function"):
        import_rule("quiet_rules_module:limit")
