"""One decision for all ranks, whoever is killed."""

import asyncio
import itertools
import json
import math
import os
import signal
import time

import pytest
import ray
from failing_storage import AWAY, failing_store

from actors.domain_weights import (
    CollectionError,
    DomainWeights,
    DomainWeightsClient,
    domain_losses,
    start_domain_weights,
)
from shearing.data.config import MixtureConfig
from shearing.data.mixture import MixtureState, initial_state, next_state
from shearing.errors import UserError
from shearing.patience import StorageError

PRIOR = {"a": 0.6, "b": 0.4}
REFERENCES = {"a": 2.0, "b": 1.0}
CONFIG = MixtureConfig(rule="sheared")
START = initial_state(CONFIG, PRIOR)
SHARES = [{"a": (30.0, 10), "b": (4.0, 4)}, {"a": (30.0, 14), "b": (6.0, 4)}]
LOSSES = {"a": 60 / 24, "b": 10 / 8}
EXPECTED = next_state(START, LOSSES, REFERENCES, CONFIG, PRIOR, step=50)


def weights(tmp_path) -> DomainWeights:
    return DomainWeights(str(tmp_path / "mixture"), CONFIG, PRIOR, REFERENCES)


def hand_in(actor: DomainWeights, *calls: tuple) -> list:
    """Submit (step, rank, world, attempt, base, sums) at the same time; answers or errors, None for still waiting."""

    async def together() -> list:
        tasks = [
            asyncio.ensure_future(actor.submit(*call[:3], attempt=call[3], base=call[4], sums=call[5]))
            for call in calls
        ]
        await asyncio.wait(tasks, timeout=0.05)
        answers = [(t.exception() or t.result()) if t.done() else None for t in tasks]
        for task in tasks:
            task.cancel()
        return answers

    return asyncio.run(together())


def test_losses_are_token_means_over_all_ranks():
    """Catches a mean of the ranks' means, and a domain without tokens that becomes 0."""
    losses = domain_losses(["a", "b", "c"], SHARES)
    assert losses["a"] == pytest.approx(2.5)
    assert losses["b"] == pytest.approx(1.25)
    assert losses["c"] is None


def test_all_ranks_get_the_same_decision_once_all_handed_in(tmp_path):
    actor = weights(tmp_path)
    one, two = ((50, rank, 2, "x", START, SHARES[rank]) for rank in range(2))
    assert hand_in(actor, one) == [None]
    assert actor.state() == START
    actor = weights(tmp_path)
    assert hand_in(actor, one, two) == [EXPECTED, EXPECTED]
    assert [s.version for s in actor.history()] == [0, 1]
    written = json.loads((tmp_path / "mixture" / "000001.json").read_text())
    assert MixtureState.model_validate(written["state"]) == EXPECTED
    assert written["attempt"] == "x"


def test_made_anew_it_answers_a_rank_that_missed_the_answer(tmp_path):
    """Catches a hang: rank 0 went on with the decision, rank 1 asks a new actor alone."""
    hand_in(weights(tmp_path), *((50, r, 2, "x", START, SHARES[r]) for r in range(2)))
    anew = weights(tmp_path)
    assert hand_in(anew, (50, 1, 2, "x", START, SHARES[1])) == [EXPECTED]
    assert [s.version for s in anew.history()] == [0, 1]


def test_a_decision_that_cannot_be_written_is_told_to_all_and_can_be_made_later(tmp_path):
    """Catches ranks that wait for ever for a decision which the storage refused, and an actor that is spoilt by it."""
    store, handler = failing_store(tmp_path / "remote")
    actor, calls = weights(tmp_path), [(50, rank, 2, "x", START, SHARES[rank]) for rank in range(2)]
    actor._folder, handler.faults = store.hasty(), itertools.repeat(AWAY)
    assert [type(answer) for answer in hand_in(actor, *calls)] == [StorageError, StorageError]
    assert actor.state() == START
    handler.faults = iter(())
    assert hand_in(actor, *calls) == [EXPECTED, EXPECTED]
    assert store.list() == ["000001.json"]


def test_handing_in_twice_counts_once(tmp_path):
    """Catches a retried call counted as another rank, or summed twice."""
    call = (50, 0, 2, "x", START, SHARES[0])
    assert hand_in(weights(tmp_path), call, call) == [None, None]
    actor = weights(tmp_path)
    assert hand_in(actor, call, call, (50, 1, 2, "x", START, SHARES[1])) == [EXPECTED] * 3


def test_attempts_never_mix(tmp_path):
    """Catches losses of a dead group of workers counted for the living: rank 1 of the old one never comes."""
    actor = weights(tmp_path)
    poison = {"a": (1e9, 1), "b": (1e9, 1)}
    answers = hand_in(
        actor,
        (50, 0, 2, "old", START, poison),
        (50, 1, 2, "new", START, SHARES[1]),
        (50, 0, 2, "new", START, SHARES[0]),
    )
    assert answers[1:] == [EXPECTED, EXPECTED]
    assert isinstance(answers[0], CollectionError)
    assert "attempt old was followed by attempt new" in str(answers[0])


def test_rewound_group_decides_again_and_drops_the_abandoned_versions(tmp_path):
    """Catches a decision of an abandoned timeline handed to a group that resumed before it, with other losses."""
    actor = weights(tmp_path)
    first = hand_in(actor, (50, 0, 1, "x", START, SHARES[0]))[0]
    second = hand_in(actor, (100, 0, 1, "x", first, SHARES[1]))[0]
    assert [s.step for s in actor.history()] == [0, 50, 100]
    again = hand_in(actor, (50, 0, 1, "y", START, SHARES[1]))[0]
    assert again.version == first.version
    assert again.proportions != first.proportions
    assert actor.history() == [START, again]
    assert weights(tmp_path).history() == [START, again]
    assert second.version == 2


def test_ranks_that_hold_different_versions_are_told(tmp_path):
    """Catches ranks that resumed from different checkpoints: they would draw different batches ever after."""
    other = START.model_copy(update={"version": 3, "proportions": {"a": 0.5, "b": 0.5}})
    actor = weights(tmp_path)
    calls = [(50, 0, 3, "x", START, SHARES[0]), (50, 1, 3, "x", other, SHARES[1]), (50, 2, 3, "x", START, SHARES[1])]
    answers = hand_in(actor, *calls)
    assert all(isinstance(a, CollectionError) for a in answers)
    assert "rank 1 holds version 3" in str(answers[0])
    assert "same checkpoint" in str(answers[2])
    sizes = hand_in(weights(tmp_path), (50, 0, 2, "x", START, SHARES[0]), (50, 1, 4, "x", START, SHARES[1]))
    assert all("rank 1 says there are 4 ranks" in str(a) for a in sizes)


def test_nan_loss_keeps_that_proportion_and_is_logged(tmp_path, caplog):
    share = {"a": (math.nan, 10), "b": (4.0, 4)}
    state = hand_in(weights(tmp_path), (50, 0, 1, "x", START, share))[0]
    assert state.proportions == pytest.approx(PRIOR)
    assert "domain a: its loss is nan" in caplog.text


@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_killed_in_the_middle_of_a_collection(ray_session, tmp_path, how):
    """Really killed between two ranks' shares. Catches a share lost with the actor, and a rank that waits for ever."""
    actor = start_domain_weights(f"weights-{how}", str(tmp_path / "mixture"), CONFIG, PRIOR, REFERENCES)
    waiting = actor.submit.remote(50, 0, 2, attempt="x", base=START, sums=SHARES[0])
    assert ray.wait([waiting], timeout=1.0)[0] == []
    if how == "SIGKILL":
        os.kill(ray.get(actor.process_id.remote()), signal.SIGKILL)
    else:
        ray.kill(actor, no_restart=False)
    time.sleep(0.5)
    assert DomainWeightsClient(actor, 1, 2, "x").submit(50, START, SHARES[1]) == EXPECTED
    assert ray.get(waiting, timeout=60) == EXPECTED
    same = start_domain_weights(f"weights-{how}", str(tmp_path / "mixture"), CONFIG, PRIOR, REFERENCES)
    assert ray.get(same.history.remote(), timeout=60) == [START, EXPECTED]
    ray.kill(actor, no_restart=False)
    assert ray.get(actor.state.remote(), timeout=60) == EXPECTED


BREAKING_RULE = "def breaks(situation):\n    raise KeyError('no such domain')\n"


def test_more_ranks_than_rays_own_limit_of_waiting_calls(ray_session, tmp_path):
    """With Ray's default of 1,000 the ranks beyond are never heard, and all wait for ever."""
    actor = start_domain_weights("weights-many", str(tmp_path / "mixture"), CONFIG, PRIOR, REFERENCES)
    base, world = ray.get(actor.state.remote()), 1001
    sums = dict.fromkeys(PRIOR, (3.0, 1))
    calls = [actor.submit.remote(10, rank, world, attempt="a", base=base, sums=sums) for rank in range(world)]
    assert {state.version for state in ray.get(calls, timeout=60)} == {1}
    ray.kill(actor)


def test_a_failing_rule_of_the_users_reaches_every_rank(tmp_path, monkeypatch):
    """Catches a rank that waits for ever because the rule raised while another rank handed in."""
    (tmp_path / "breaking_rule_of_a_user.py").write_text(BREAKING_RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = MixtureConfig(rule="breaking_rule_of_a_user:breaks")
    actor = DomainWeights(str(tmp_path / "mixture"), config, PRIOR, REFERENCES)
    assert actor.problems() == []
    answers = hand_in(actor, *((50, r, 2, "x", START, SHARES[r]) for r in range(2)))
    assert all(isinstance(answer, UserError) for answer in answers)
    assert "breaks failed at step 50: KeyError" in str(answers[0])
    lost = DomainWeights(str(tmp_path / "other"), MixtureConfig(rule="no_such_rules:best"), PRIOR, REFERENCES)
    assert "no_such_rules cannot be imported" in lost.problems()[0]


def test_a_rule_is_imported_on_the_cluster_and_its_error_comes_back(ray_session, tmp_path):
    """Catches Ray's own report of the error in place of the user's, which would be retried instead of shown."""
    config = MixtureConfig(rule="no_such_rules:best")
    actor = start_domain_weights("weights-no-rule", str(tmp_path / "mixture"), config, PRIOR, REFERENCES)
    assert "no_such_rules cannot be imported" in ray.get(actor.problems.remote())[0]
    with pytest.raises(UserError, match="no_such_rules cannot be imported"):
        DomainWeightsClient(actor, 0, 1, "x").submit(50, START, SHARES[0])
