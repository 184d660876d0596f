"""Scaling-law predictions against published figures and exact laws; reference files read with clear errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearing.data.config import ReferencesConfig
from shearing.data.references import SiblingLosses, fit_domains, fit_scaling_law, load_references, load_siblings
from shearing.errors import UserError

SIZES = [6738415616, 13015864320, 68976648192]
LLAMA2 = {
    "cc": [1.7520, 1.6680, 1.4621],
    "github": [0.6216, 0.5791, 0.4890],
    "book": [1.9063, 1.8242, 1.6450],
    "stackexchange": [1.4482, 1.3936, 1.2805],
    "wiki": [1.4844, 1.3945, 1.2118],
    "arxiv": [1.2637, 1.2109, 1.1148],
    "c4": [1.9219, 1.8486, 1.6848],
}
PREDICTED = {
    1345423360: [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251],
    2701560320: [1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328],
}


@pytest.mark.parametrize("parameters", PREDICTED)
def test_llama2_fixture_to_four_decimals(parameters):
    """Catches a search that stops short: cc's fit is nearly flat in b."""
    fits = fit_domains(SiblingLosses(SIZES, LLAMA2), bounded=False)
    assert [round(fit.predict(parameters), 4) for fit in fits.values()] == PREDICTED[parameters]
    assert fits["cc"].c == pytest.approx(-2.80, abs=0.01)
    assert any("negative" in warning for warning in fits["cc"].warnings)
    assert any("very small" in warning for warning in fits["cc"].warnings)
    assert all("no degrees of freedom" in fit.warnings[0] for fit in fits.values())


def test_bound_holds_the_irreducible_loss_at_zero_and_says_so():
    """Catches a bound that clips c after the fit: a and b must be fitted again, and beat every other pure power law."""
    fit = fit_scaling_law(SIZES, LLAMA2["cc"])
    assert fit.c == 0.0
    assert any("held at 0" in warning for warning in fit.warnings)

    def squares(a: float, b: float) -> float:
        return sum((a * size**-b - loss) ** 2 for size, loss in zip(SIZES, LLAMA2["cc"], strict=True))

    best = squares(fit.a, fit.b)
    assert all(
        squares(fit.a * s * SIZES[1] ** (fit.b * (t - 1)), fit.b * t) >= best
        for s in (0.99, 0.999, 1.0, 1.001, 1.01)
        for t in (0.9, 0.99, 0.999, 1.0, 1.001, 1.01, 1.1)
    )
    free = [fit_scaling_law(SIZES, LLAMA2["github"], bounded).predict(1e9) for bounded in (True, False)]
    assert free[0] == pytest.approx(free[1], abs=1e-12)


@settings(max_examples=50)
@given(st.floats(0.08, 0.6), st.floats(0.0, 1.5), st.floats(0.2, 2.0), st.booleans())
def test_exact_laws_are_found_again(b, c, at_first, bounded):
    """Catches a wrong inner least squares: data made from a law must give that law's values far outside."""
    sizes = [1e8, 4e8, 1e9, 7e9, 7e10]
    law = lambda size: at_first * (size / 1e8) ** -b + c  # noqa: E731
    fit = fit_scaling_law(sizes, [law(s) for s in sizes], bounded)
    assert fit.predict(2e7) == pytest.approx(law(2e7), rel=1e-4)
    assert fit.degrees_of_freedom in (2, 3)
    assert not any("no degrees" in warning for warning in fit.warnings)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1e9, 2e9], [2.0, 1.9], "at least three sizes"),
        ([1e9, 1e9, 2e9], [2.0, 2.0, 1.9], "at least three sizes"),
        ([1e9, 2e9, 3e9], [2.0, 1.9], "2 losses for 3 sizes"),
        ([1e9, 2e9, 3e9], [1.5, 1.6, 1.7], "do not fall with size"),
        ([1e9, 2e9, 3e9], [2.0, float("nan"), 1.7], "found nan"),
        ([1e9, 0, 3e9], [2.0, 1.9, 1.7], "found 0"),
    ],
)
def test_data_that_no_law_fits_is_refused(sizes, losses, message):
    with pytest.raises(UserError, match=message):
        fit_scaling_law(sizes, losses)


def test_problems_of_all_domains_come_at_once():
    with pytest.raises(UserError) as caught:
        fit_domains(SiblingLosses([1e9, 2e9, 3e9], {"a": [1.0, 2.0, 3.0], "b": [3, 2.5, 2.2], "c": [1.0, -1.0, 0.5]}))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["domain a", "domain c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: [1, 2, 3]\nloss: {a: [3, 2, 1]}", "unknown keys loss"),
        ("parameters: [1, 2, 3]", "lacks parameters or losses"),
        ("parameters: [1, 2, 3]\nlosses: {a: [3, 2]}", "losses of domain a are .*a list of 3 numbers"),
        ("parameters: [1e9, 2, 3]\nlosses: {a: [3, 2, 1]}", "'1e9' is not a number"),
        ("parameters: [1, 2", "is not YAML"),
        ("- 1", "holds list"),
    ],
)
def test_sibling_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "losses.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_siblings(str(tmp_path / "losses.yaml"))


def test_reference_kinds_and_their_errors(tmp_path):
    """Catches a missing domain that falls back to some default: the rule would chase a made-up loss."""
    values = ReferencesConfig(kind="values", values={"wiki": 1.5, "c4": 2, "spare": 9.0})
    assert load_references(values, ["wiki", "c4"], 1).losses == {"wiki": 1.5, "c4": 2.0}
    with pytest.raises(UserError) as caught:
        load_references(values, ["wikki", "book", "c4"], 1)
    assert "domain wikki; it holds: c4, spare, wiki. Did you mean wiki?" in caught.value.problems[0]
    assert "domain book" in caught.value.problems[1]
    (tmp_path / "given.yaml").write_text("wiki: 1.25\nc4: .nan\n")
    given_file = ReferencesConfig(kind="file", file=str(tmp_path / "given.yaml"))
    assert load_references(given_file, ["wiki"], 1).losses == {"wiki": 1.25}
    with pytest.raises(UserError, match="loss of c4 is nan"):
        load_references(given_file, ["c4"], 1)
    with pytest.raises(UserError, match=r"cannot read .*absent.yaml"):
        load_references(ReferencesConfig(kind="file", file=str(tmp_path / "absent.yaml")), ["c4"], 1)
    for kind in ("values", "file", "scaling_law"):
        with pytest.raises(UserError, match=f"references.kind = {kind} needs"):
            load_references(ReferencesConfig(kind=kind), ["c4"], 1)


def test_scaling_law_references_from_a_file(tmp_path):
    rows = "\n".join(f"  {domain}: {losses}" for domain, losses in LLAMA2.items())
    (tmp_path / "losses.yaml").write_text(f"parameters: {SIZES}\nlosses:\n{rows}\n")
    config = ReferencesConfig(kind="scaling_law", file=str(tmp_path / "losses.yaml"), bounded=False)
    found = load_references(config, ["c4", "cc"], 1345423360)
    assert {d: round(loss, 4) for d, loss in found.losses.items()} == {"c4": 2.1251, "cc": 1.9643}
    assert any(warning.startswith("domain cc: ") for warning in found.warnings)


@pytest.mark.parametrize(("c", "bounded"), [(0.6, True), (0.6, False), (0.0, True)])
def test_standard_errors_are_the_spread_of_repeated_fits(c, bounded):
    """Against fits of many noisy copies. Catches a variance by the wrong degrees of freedom, slopes at the wrong
    centre, and the third parameter's error counted where the bound holds it."""
    sizes, noise, at = [1e8, 3e8, 1e9, 3e9, 1e10, 3e10], 1e-3, 5e7
    exact = [2.0 * (size / 1e9) ** -0.15 + c for size in sizes]
    dice = np.random.default_rng(3)
    fits = [fit_scaling_law(sizes, [loss + dice.normal(0, noise) for loss in exact], bounded) for _ in range(120)]
    alike = [fit for fit in fits if (fit.c == 0.0) == (c == 0.0)]
    assert len(alike) > 40
    spread = np.std([fit.predict(at) for fit in alike])
    told = math.sqrt(np.mean([fit.standard_error(at) ** 2 for fit in alike]))
    assert told == pytest.approx(spread, rel=0.25)
    assert fits[0].standard_error(at) > fits[0].standard_error(1e9)


def test_three_models_have_no_standard_error(tmp_path):
    """Three points and three parameters: any number given would be made up. With four there is one for each domain."""
    assert fit_scaling_law(SIZES, LLAMA2["wiki"]).standard_error(1e9) is None
    assert fit_scaling_law(SIZES, LLAMA2["cc"]).standard_error(1e9) is None  # one is left where c is held, and no more
    (tmp_path / "losses.yaml").write_text(
        "parameters: [1, 2, 4, 9]\nlosses: {a: [3, 2.5, 2.1, 1.8], b: [4, 3, 2.4, 2]}"
    )
    config = ReferencesConfig(kind="scaling_law", file=str(tmp_path / "losses.yaml"))
    assert set(load_references(config, ["a", "b"], 1).standard_errors) == {"a", "b"}
