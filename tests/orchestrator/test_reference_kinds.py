"""Every kind of reference loss that needs no measuring, from a recipe to what the mixture is given."""

import io

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator.console import Console
from orchestrator.preflight import preflight
from orchestrator.stage import Context
from orchestrator.stages import REFERENCES
from orchestrator.workspace import open_workspace
from shearing.data.references import fit_scaling_law

SIZES = [6738415616, 13015864320, 68976648192]
WIKI, CODE = [1.4844, 1.3945, 1.2118], [0.6216, 0.5791, 0.4890]


def references_of(folder, *overrides):
    recipe, text = tiny_recipe(folder, *overrides), io.StringIO()
    assert preflight(recipe) == []
    context = Context(recipe, open_workspace(recipe), Console(text), None)
    context.outputs["source"] = {"model": str(folder / "model")}
    return REFERENCES.run(context), text.getvalue()


@pytest.mark.parametrize("kind", ["values", "file"])
def test_given_losses(tmp_path, kind):
    (tmp_path / "given.yaml").write_text("wiki: 2.25\ncode: 1.5\n")
    given = {"values": "references.values={wiki: 2.25, code: 1.5}", "file": f"references.file={tmp_path}/given.yaml"}
    found, text = references_of(tmp_path, f"references.kind={kind}", given[kind])
    assert found == {"kind": kind, "losses": {"wiki": 2.25, "code": 1.5}, "warnings": [], "standard_errors": {}}
    assert "wiki 2.2500, code 1.5000" in text


def test_a_scaling_law_at_the_targets_size(tmp_path):
    """Catches the source's size in place of the target's, and warnings that nobody sees. With four models the console
    says how far the predictions may be off."""
    (tmp_path / "siblings.yaml").write_text(f"parameters: {SIZES}\nlosses: {{wiki: {WIKI}, code: {CODE}}}\n")
    keys = ("references.kind=scaling_law", f"references.file={tmp_path}/siblings.yaml")
    found, text = references_of(tmp_path, *keys)
    target = 2 * 320 * 48 + 3 * (4 * 48 * 48 + 3 * 48 * 128 + 2 * 48) + 48
    larger = 2 * 320 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 172 + 2 * 64) + 64
    fit = fit_scaling_law(SIZES, WIKI)
    assert found["losses"]["wiki"] == pytest.approx(fit.predict(target))
    assert found["losses"]["wiki"] != pytest.approx(fit.predict(larger))
    assert found["standard_errors"] == {}
    assert "no degrees of freedom" in text
    more = f"parameters: {[*SIZES, 4e11]}\nlosses: {{wiki: {[*WIKI, 1.1]}, code: {[*CODE, 0.45]}}}\n"
    (tmp_path / "siblings.yaml").write_text(more)
    found, text = references_of(tmp_path, *keys)
    assert set(found["standard_errors"]) == {"wiki", "code"}
    assert f"± {found['standard_errors']['wiki']:.4f}" in text
