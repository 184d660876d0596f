"""Differences of losses against statistics' own functions, and against drawing sequences anew."""

import math

import numpy as np
import pytest

from shearing.evaluation.paired import Difference, paired_difference

DRAW = np.random.default_rng(7)
HARD_N = DRAW.normal(3, 1, size=40)  # what makes a text hard, for both models alike
ONE = {"wiki": HARD_N + DRAW.normal(0.05, 0.02, size=40), "code": DRAW.normal(2.0, 0.3, size=12)}
OTHER = {"wiki": HARD_N, "code": ONE["code"] - DRAW.normal(0.2, 0.1, size=12)}


def test_one_domain_is_the_paired_t_test():
    """A variance over n, the spread of losses taken for that of their differences."""
    found = paired_difference({"wiki": ONE["wiki"]}, {"wiki": OTHER["wiki"]})
    difference_N = ONE["wiki"] - OTHER["wiki"]
    assert found.nats == pytest.approx(difference_N.mean())
    assert found.standard_error == pytest.approx(difference_N.std(ddof=1) / math.sqrt(40))
    assert found.standard_error < 0.01 < ONE["wiki"].std() / math.sqrt(40)


def test_domains_count_the_same_as_in_the_mean_loss():
    """Domains weighted by their sequences, and errors added in place of their squares: resampling tells."""
    found = paired_difference(ONE, OTHER)
    means = [np.mean(ONE[domain]) - np.mean(OTHER[domain]) for domain in ONE]
    assert found.nats == pytest.approx(np.mean(means))
    drawn = []
    for _ in range(4000):
        rows = {domain: DRAW.integers(len(values), size=len(values)) for domain, values in ONE.items()}
        drawn.append(np.mean([np.mean(ONE[d][rows[d]] - OTHER[d][rows[d]]) for d in ONE]))
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.1)  # resampling knows n, not n - 1
    turned = paired_difference(OTHER, ONE)
    assert (turned.nats, turned.standard_error) == pytest.approx((-found.nats, found.standard_error))


def test_what_is_noise():
    """A method called best by less than chance; and one sequence, which says nothing about chance."""
    assert Difference(0.1, 0.06).is_noise
    assert Difference(-0.1, 0.06).is_noise
    assert not Difference(-0.1, 0.04).is_noise
    assert paired_difference({"wiki": [3.0]}, {"wiki": [2.0]}).is_noise
    same = paired_difference(ONE, ONE)
    assert (same.nats, same.is_noise) == (0.0, True)
