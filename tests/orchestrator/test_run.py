import io
import itertools
import time

import pytest
from failing_storage import AWAY, failing_store
from journeys import wait_until
from recipes_for_tests import tiny_recipe

from orchestrator import run, stage
from orchestrator.comparison_stages import COMPARISON_STAGES
from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.run import run_recipe, stages_of
from orchestrator.stage import Context, Stage, flat_keys, is_free, run_stage
from orchestrator.workspace import Workspace, open_workspace
from shearing.errors import UserError


class Journal:
    """Three small stages that write down when they ran; the middle one keeps work in progress."""

    def __init__(self, monkeypatch):
        self.ran = []
        self.fail_in = None
        names = [
            ("first", ("corpus",), (), False),
            ("middle", ("pruning",), ("first",), True),
            ("last", ("scores",), ("middle",), False),
        ]
        stages = tuple(
            Stage(name, name, keys, after, self.body(name), is_whole=self.is_whole, resumes=resumes, needs_ray=False)
            for name, keys, after, resumes in names
        )
        self.lost = set()
        monkeypatch.setattr(run, "STAGES", stages)

    def body(self, name):
        def work(context):
            self.ran.append(name)
            if name == self.fail_in:
                raise RuntimeError("power cut")
            return {"name": name, "seen": sorted(context.outputs)}

        return work

    def is_whole(self, _context, outputs):
        return outputs["name"] not in self.lost

    def go(self, recipe):
        self.ran.clear()
        stream = io.StringIO()
        run_recipe(recipe, Console(stream), RaySession(recipe))
        return stream.getvalue()


@pytest.fixture
def journal(monkeypatch):
    return Journal(monkeypatch)


def test_stages_run_in_order_and_see_what_came_before(journal, tmp_path):
    recipe = tiny_recipe(tmp_path)
    journal.go(recipe)
    assert journal.ran == ["first", "middle", "last"]
    assert open_workspace(recipe).mark("last").outputs["seen"] == ["first", "middle"]
    assert open_workspace(recipe).store.read_json("stages.json") == ["first", "middle", "last"]


def test_finished_stages_are_skipped_and_say_so(journal, tmp_path):
    recipe = tiny_recipe(tmp_path)
    journal.go(recipe)
    text = journal.go(recipe)
    assert journal.ran == []
    assert text.count("finished already") == 3


def test_a_run_goes_on_at_the_stage_that_failed(journal, tmp_path):
    recipe = tiny_recipe(tmp_path)
    journal.fail_in = "middle"
    with pytest.raises(RuntimeError, match="power cut"):
        journal.go(recipe)
    assert open_workspace(recipe).mark("middle").finished is None
    journal.fail_in = None
    journal.go(recipe)
    assert journal.ran == ["middle", "last"]


def test_a_product_that_was_deleted_is_made_again(journal, tmp_path):
    recipe = tiny_recipe(tmp_path)
    journal.go(recipe)
    journal.lost = {"first"}
    journal.go(recipe)
    assert journal.ran == ["first"]


def test_a_changed_key_runs_what_rests_on_it_again(journal, tmp_path):
    journal.go(tiny_recipe(tmp_path))
    journal.go(tiny_recipe(tmp_path, "scores.decode_tokens=4"))
    assert journal.ran == ["last"]


def test_work_in_progress_on_other_inputs_is_never_continued(journal, tmp_path):
    """A checkpoint of another recipe would be resumed without a word; the run's record would name the wrong recipe."""
    recipe = tiny_recipe(tmp_path)
    journal.go(recipe)
    with pytest.raises(UserError, match=r"(?s)different recipe.*pruning.steps: 20 -> 30"):
        journal.go(tiny_recipe(tmp_path, "pruning.steps=30"))
    assert journal.ran == []
    assert b"steps: 30" not in open_workspace(recipe).store.read_bytes("recipe.yaml")


def test_work_in_progress_on_other_outputs_is_never_continued(journal, tmp_path):
    """A corpus made anew from other text is another corpus, though no key changed."""
    journal.go(tiny_recipe(tmp_path))
    with pytest.raises(UserError, match="outputs of stage first"):
        journal.go(tiny_recipe(tmp_path, "corpus.text_field=body"))


def test_time_is_kept_while_it_is_spent(journal, tmp_path, monkeypatch):
    """An attempt whose process was killed did not count: the last one's time was told as the whole."""
    monkeypatch.setattr(stage, "KEEP_SECONDS_EVERY_S", 0.01)
    recipe = tiny_recipe(tmp_path)
    workspace, seen = open_workspace(recipe), []

    def work(_context):
        before = workspace.mark("long").seconds or 0
        while (workspace.mark("long").seconds or 0) <= before:
            time.sleep(0.01)
        seen.append(workspace.mark("long").seconds)  # what is known should the process die now
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    stages = [Stage("long", "long", ("corpus",), (), work, needs_ray=False)]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, Console(io.StringIO()), RaySession(recipe), stages)
    kept = workspace.mark("long").seconds
    run_recipe(recipe, Console(io.StringIO()), RaySession(recipe), stages)
    done = workspace.mark("long")
    assert 0 < seen[0] <= kept < seen[1] <= done.seconds
    assert done.finished is not None


def test_scratch_is_a_stage_only_where_asked(tmp_path):
    names = [stage.name for stage in stages_of(tiny_recipe(tmp_path))]
    assert names == ["corpus", "source", "references", "pruning", "extraction", "recovery", "scores", "report"]
    assert "scratch" in [stage.name for stage in stages_of(tiny_recipe(tmp_path, "scratch={}"))]


def test_every_key_is_free_or_under_some_stage(tmp_path):
    """A key that no stage rests on could change under a finished run without anything noticing."""
    recipe = tiny_recipe(tmp_path, "scratch={learning_rate: 1e-3}", "comparison={methods: [learned]}")
    covered = {key for stage in [*stages_of(recipe), *COMPARISON_STAGES] for key in stage.recipe_inputs(recipe)}
    neither = {key for key, _ in flat_keys(recipe) if key not in covered and not is_free(key)}
    assert neither == {"workspace"}


def test_ray_is_not_started_for_stages_that_are_done(journal, tmp_path, monkeypatch):
    """Showing that nothing is left to do must not cost a cluster."""
    monkeypatch.setattr(RaySession, "start", lambda *_: pytest.fail("Ray was started"))
    journal.go(tiny_recipe(tmp_path))


def test_why_a_stage_ended_is_said_though_the_storage_is_away(tmp_path):
    """Catches a stop by a signal that ends with status 1, for the time spent so far could not be written."""
    store, handler = failing_store(tmp_path)

    def interrupted(_context):
        handler.faults = itertools.repeat(AWAY)
        raise KeyboardInterrupt

    first = Stage("first", "first", (), (), interrupted, needs_ray=False)
    recipe = tiny_recipe(tmp_path)
    context = Context(recipe, Workspace(store), Console(io.StringIO()), RaySession(recipe))
    with pytest.raises(KeyboardInterrupt):
        run_stage(first, context)


def test_a_stage_that_waits_for_its_storage_says_so(tmp_path, monkeypatch):
    """A console that stands still for minutes, at a step that looks like any other."""
    monkeypatch.setattr(stage, "KEEP_SECONDS_EVERY_S", 0.01)
    store, handler = failing_store(tmp_path)
    shown = io.StringIO()

    def work(_context):
        for faults, said in ((itertools.repeat(AWAY), "cannot be written"), (iter(()), "can be written again")):
            handler.faults = faults
            wait_until(lambda said=said: said in shown.getvalue(), said, timeout_s=30)
        return {}

    recipe = tiny_recipe(tmp_path)
    context = Context(recipe, Workspace(store), Console(shown), RaySession(recipe))
    run_stage(Stage("first", "first", (), (), work, needs_ray=False), context)
    told = [line for line in shown.getvalue().splitlines() if "workspace" in line]
    assert len(told) == 2, "said once each"
    assert "Could not connect to server" in told[0]
