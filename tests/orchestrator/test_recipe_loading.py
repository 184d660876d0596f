import json
from pathlib import Path

import pytest

from orchestrator.recipe_loading import dump_recipe, load_recipe, recipe_from
from orchestrator.yaml_reading import read_yaml, write_yaml
from shearing.errors import UserError

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
MINIMAL = """
name: tiny
corpus:
  path: corpora
  domains:
    no: {text: "no/*.jsonl", proportion: 0.5}
    wiki: {text: [wiki, "s3://bucket/wiki", /data/wiki], proportion: 0.5}
source: {model: models/tiny}
pruning: {steps: 10, global_batch_tokens: 4096, learning_rate: 1e-4, target: {num_layers: 2}}
recovery: {steps: 10, global_batch_tokens: 4096}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return str(path)


def problems_of(path, overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_yaml_1_1_does_not_change_what_people_write():
    """PyYAML alone: 1e-4 is text, `no` is false, 10:30 is 630, 017 is 15, a date is an object."""
    text = "{a: 1e-4, b: no, c: 10:30, d: 2024-01-02, e: 1_000, f: on, g: true, h: null, i: ~, j: -3, k: .inf, l: 1.5}"
    expected = {
        "a": 1e-4,
        "b": "no",
        "c": "10:30",
        "d": "2024-01-02",
        "e": 1000,
        "f": "on",
        "g": True,
        "h": None,
        "i": None,
    }
    assert read_yaml(text, "here") == expected | {"j": -3, "k": float("inf"), "l": 1.5}
    assert read_yaml("{no: 1}", "here") == {"no": 1}


def test_what_is_written_reads_back_as_the_same():
    """A text that looks like a number, or a float that loses its point, changes on its way through a file."""
    value = {
        "a": "1e-4",
        "b": 1e-5,
        "c": "no",
        "d": "true",
        "e": None,
        "f": [0.9, "017", 3],
        "g": "a: b",
        "h": 1e20,
        "i": "",
        "j": "1.5",
    }
    assert read_yaml(write_yaml(value), "here") == value


def test_duplicate_keys_are_refused_with_their_place():
    """YAML keeps the last silently: half of a recipe would vanish."""
    with pytest.raises(UserError, match=r"here, line 3, column 1.*'a' stands here twice"):
        read_yaml("a: 1\nb: 2\na: 3\n", "here")


def test_broken_yaml_names_the_line():
    with pytest.raises(UserError, match="here, line 2"):
        read_yaml("a: [1\nb: 2", "here")


def test_a_valid_recipe_loads_with_overrides(recipe_file):
    recipe = load_recipe(
        recipe_file, ["pruning.learning_rate=3e-5", "scratch={}", "references.values={no: 2, wiki: 1.5}"]
    )
    assert recipe.pruning.learning_rate == 3e-5
    assert recipe.scratch is not None
    assert recipe.references.values == {"no": 2.0, "wiki": 1.5}
    assert list(recipe.corpus.domains) == ["no", "wiki"]


def test_a_domain_can_be_taken_out_and_put_in(recipe_file):
    recipe = load_recipe(
        recipe_file, ["corpus.domains.no=null", "corpus.domains.new.text=x", "corpus.domains.new.proportion=0.5"]
    )
    assert list(recipe.corpus.domains) == ["wiki", "new"]


def test_root_goes_before_relative_text_only(recipe_file):
    """A URI or an absolute path behind the root would name nothing."""
    recipe = load_recipe(recipe_file, ["corpus.root=/data/"])
    assert recipe.corpus.domains["no"].text == "/data/no/*.jsonl"
    assert recipe.corpus.domains["wiki"].text == ["/data/wiki", "s3://bucket/wiki", "/data/wiki"]
    assert recipe.corpus.root is None
    installed = load_recipe(recipe_file, ["corpus.root=/data", "corpus.domains.no.text=installed:cpp"])
    assert installed.corpus.domains["no"].text == "installed:cpp"


def test_the_resolved_recipe_is_the_recipe(recipe_file, tmp_path):
    """A workspace's recipe.yaml has to give the very same run."""
    recipe = load_recipe(recipe_file, ["corpus.root=/data", "pruning.learning_rate=1e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(str(again), []) == recipe


def test_every_problem_is_named_at_once(recipe_file):
    """Reporting one problem a run makes a user start ten times."""
    problems = problems_of(
        recipe_file,
        [
            "references.kind=fancy",
            "pruning.steps=-1",
            "corpus.domains.wiki.text=3",
            "engine.wokers=2",
            "recovery.betas=[1]",
        ],
    )
    assert len(problems) == 5
    assert "override 'engine.wokers=2': unknown key engine.wokers; did you mean engine.workers?" in problems
    assert "references.kind = 'fancy' is not allowed; allowed: source, scaling_law, values, file" in problems
    assert "pruning.steps = -1 is not allowed; allowed: a whole number >= 1" in problems
    assert any(
        p.startswith("corpus.domains.wiki.text = 3 is not allowed; allowed: text or a list of") for p in problems
    )
    assert any(p.startswith("recovery.betas = [1") and "a list of 2 numbers" in p for p in problems)


@pytest.mark.parametrize("gpus", ["2", "0.5"])
def test_workers_have_a_gpu_each(recipe_file, gpus):
    """DeepSpeed computes on the GPU of a worker's number, Ray Train on the first of its own: tensors on two devices."""
    (problem,) = problems_of(recipe_file, ["engine.workers=2", f"engine.gpus_per_worker={gpus}"])
    assert f"gpus_per_worker is {gpus}" in problem
    assert "Set gpus_per_worker to 1" in problem
    assert load_recipe(recipe_file, ["engine.workers=1", "engine.gpus_per_worker=0.5"]).engine.gpus_per_worker == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prunning.steps=3", "did you mean pruning.steps?"),
        ("pruning.num_layers=3", "did you mean source.train.shape.num_layers or pruning.target.num_layers?"),
        ("zero_stage=3", "did you mean engine.zero_stage?"),
        ("engine.colour=red", "allowed in engine: workers"),
        ("engine.max_failures.x=1", "engine.max_failures holds a whole number, no keys"),
        ("nonsense", "write section.key=value"),
        ("corpus.domains.cc=null", "there is no cc; there are: no, wiki"),
        ("a..b=3", "write section.key=value"),
        ("source.train.steps=[", "override 'source.train.steps=['"),
    ],
)
def test_a_wrong_override_says_what_was_meant(recipe_file, override, expected):
    problems = problems_of(recipe_file, [override])
    assert any(expected in problem for problem in problems), problems


def test_an_unknown_key_in_the_file_is_refused(tmp_path):
    """A misspelt key that is ignored trains with the default."""
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("learning_rate: 1e-4", "learning_rat: 1e-4"))
    problems = problems_of(str(path), [])
    assert problems == ["pruning.learning_rat is not a key of a recipe; did you mean pruning.learning_rate?"]


def test_missing_keys_say_what_they_allow():
    with pytest.raises(UserError) as caught:
        recipe_from({"name": "x", "source": {}, "pruning": {}, "recovery": {"steps": 1, "global_batch_tokens": 1}})
    assert "pruning.steps is missing; allowed: a whole number >= 1. Set pruning.steps=..." in caught.value.problems
    assert any(
        problem.startswith("corpus is missing; allowed: a section with the keys path")
        for problem in caught.value.problems
    )


def test_a_recipe_that_is_not_there_names_the_near_one():
    with pytest.raises(UserError, match=r"Did you mean .*quickstart.yaml"):
        load_recipe(str(RECIPES / "quikstart.yaml"), [])


def test_a_list_is_no_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("[1, 2]")
    assert "a recipe is a mapping" in problems_of(str(path), [])[0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(str(path), [])
    assert recipe.name == path.stem
    assert sum(domain.proportion for domain in recipe.corpus.domains.values()) == pytest.approx(1, abs=1e-9)


def test_a_misspelt_rule_names_the_nearest(recipe_file):
    """A rule may be a path of the user's, so a wrong word is no enumeration's error."""
    (problem,) = problems_of(recipe_file, ["mixture.rule=shered"])
    assert problem.startswith("mixture.rule = 'shered': no rule of that name; allowed: static, uniform")
    assert problem.endswith("Did you mean sheared?")


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "", ".hidden", "a b"])
def test_a_domain_names_a_folder_and_nothing_else(recipe_file, name):
    """Catches text of one domain written over what lies elsewhere."""
    text = Path(recipe_file).read_text().replace("wiki: {", f"{json.dumps(name)}: {{")
    Path(recipe_file).write_text(text)
    (problem,) = problems_of(recipe_file, [])
    assert f"{name!r} will not do. Allowed: letters" in problem


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("workspace=s3://AKIA:hidden@bucket/x", "a user name with a password"),
        ("corpus.path=s3://bucket/x?region=eu&X-Amz-Signature=hidden", "a parameter 'X-Amz-Signature'"),
        ("corpus.domains.wiki.text=[wiki, 'https://host/w?sig=hidden']", "a parameter 'sig'"),
        ("source.model=https://host/m?access_token=hidden", "a parameter 'access_token'"),
    ],
)
def test_secrets_in_a_recipe_are_refused_untold(recipe_file, override, what):
    """Catches a key that ends in a workspace, a report or a log, where everybody on the cluster reads it."""
    (problem,) = problems_of(recipe_file, [override])
    assert problem.startswith(f"{override.partition('=')[0]} holds {what} in its URI")
    assert "hidden" not in problem


def test_places_without_secrets_are_not_refused(recipe_file):
    for uri in ("s3://bucket/x?region=eu&endpoint_override=host:9000", "gs://anonymous@bucket/x", "/data/token=1/sig"):
        assert load_recipe(recipe_file, [f"workspace={uri}"]).workspace == uri
