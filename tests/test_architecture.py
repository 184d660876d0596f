"""The rules of the house, held over every file of the source tree."""

import ast
import importlib.metadata
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STOREYS = {"shearing": 0, "actors": 1, "orchestrator": 2, "pipelines": 3}
# Inside shearing a package may import those of a lower number; training stands over all.
SHEARING = {"data": 0, "models": 1, "pruning": 2, "evaluation": 2, "training": 3}
# A phase's configuration is part of other configurations; classes of values, free of everything heavy.
CONFIGURATION = {"shearing/pruning/config.py": {"shearing.training.config"}}
BELOW_ALL = {"shearing/storage.py": {"shearing.patience"}}
LIGHT = (
    "orchestrator/recipe.py", "orchestrator/recipe_loading.py", "orchestrator/recipe_schema.py",
    "orchestrator/yaml_reading.py", "orchestrator/preflight.py", "orchestrator/plan.py", "orchestrator/plan_text.py",
    "orchestrator/stage.py", "orchestrator/stages.py", "orchestrator/run.py", "orchestrator/command.py",
    "orchestrator/teacher_model.py", "orchestrator/settings_in_words.py", "orchestrator/sliced_model.py",
    "shearing/pruning/slicing/config.py", "shearing/pruning/slicing/plan.py",
    "orchestrator/console.py", "orchestrator/workspace.py", "orchestrator/source_model.py",
    "orchestrator/named_files.py", "orchestrator/model_files.py",
    "shearing/config.py", "shearing/errors.py", "shearing/patience.py", "shearing/storage.py",
    "shearing/models/shape.py", "orchestrator/failures.py",
    "shearing/models/families.py", "shearing/models/family.py", "shearing/models/parameters.py",
    "shearing/pruning/target.py", "shearing/data/manifest.py", "shearing/data/mixture.py",
    "shearing/data/mixture_rules.py", "shearing/data/rule_by_path.py", "shearing/data/config.py",
    "shearing/pruning/config.py", "shearing/pruning/slicing/config.py", "shearing/pruning/slicing/plan.py",
    "shearing/pruning/sparsity/config.py", "shearing/evaluation/config.py", "shearing/evaluation/paired.py",
    "orchestrator/methods.py", "orchestrator/comparison_checks.py", "orchestrator/comparison_run.py",
    "orchestrator/comparison_stages.py", "orchestrator/comparison_command.py", "shearing/training/config.py",
    "orchestrator/hardware.py", "orchestrator/step_time.py", "orchestrator/time_forecast.py",
)  # fmt: skip
HEAVY = {"torch", "ray", "transformers", "deepspeed", "matplotlib", "lm_eval", "peft"}


def files(*folders):
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


SOURCES = files("shearing", "actors", "orchestrator")
ALL = [*SOURCES, *files("pipelines", "benchmarks")]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path, only_on_loading=False):
    """Full names of everything a file imports; `only_on_loading` leaves out what stands inside functions."""
    found = set()

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and only_on_loading:
                continue
            if isinstance(child, ast.If) and only_on_loading and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)} imports relatively"
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(tree(path))
    return frozenset(found)


def tops(path, only_on_loading=False):
    return {name.split(".")[0] for name in imports(path, only_on_loading)}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_imports_run_downwards(path):
    """A lower storey that knows a higher one can neither be tested nor used without it."""
    storey = STOREYS.get(path.relative_to(ROOT).parts[0], 4)
    too_high = {name for name in tops(path) & STOREYS.keys() if STOREYS[name] > storey}
    assert not too_high
    assert "pipelines" not in tops(path)  # scripts, imported by nobody


@pytest.mark.parametrize("path", files("shearing"), ids=name_of)
def test_shearing_imports_run_from_training_to_data(path):
    parts = path.relative_to(ROOT).parts
    rank = SHEARING[parts[1]] if len(parts) > 2 else -1
    allowed = (CONFIGURATION | BELOW_ALL).get(name_of(path), set())
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "shearing" or len(pieces) < 2 or any(name.startswith(exception) for exception in allowed):
            continue
        other = SHEARING.get(pieces[1], -1)
        same = len(parts) > 2 and pieces[1] == parts[1]
        assert same or other < rank, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_heavy_library_has_its_place(path):
    """Ray in the method, or DeepSpeed in a script, ties everything to it."""
    name, used = name_of(path), tops(path)
    if name.startswith("shearing/"):
        assert "ray" not in used
    if name.startswith("orchestrator/"):
        assert not tops(path, only_on_loading=True) & {"ray", "torch", "transformers"}, "import it inside the function"
    if not name.startswith("shearing/training/"):
        assert "deepspeed" not in used
    if not name.startswith("orchestrator/report"):
        assert not used & {"matplotlib", "jinja2"}
    if name != "shearing/evaluation/harness.py":
        assert "lm_eval" not in used
    if name != "shearing/training/adapters.py":
        assert "peft" not in used
    assert "lm_eval" not in tops(path, only_on_loading=True), "it may not be installed"


def module_file(name):
    for candidate in (ROOT / (name.replace(".", "/") + ".py"), ROOT / name.replace(".", "/") / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@pytest.mark.parametrize("name", LIGHT)
def test_what_preflight_rests_on_is_light_all_the_way_down(name):
    """One import of torch anywhere below makes every check of a recipe wait ten seconds."""
    waiting, seen = [ROOT / name], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not tops(path, only_on_loading=True) & HEAVY, f"{name} loads it through {name_of(path)}"
        waiting += [file for module in imports(path, only_on_loading=True) if (file := module_file(module))]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_and_functions_fit_a_reader(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_prints(path):
    """A print in a worker is lost or comes a thousand times."""
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [call.lineno for call in calls if call.func.id == "print"]


@pytest.mark.parametrize("path", [path for path in ALL if path.name == "__init__.py"], ids=name_of)
def test_init_files_hold_no_code(path):
    assert not tree(path).body


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_names_say_what_is_inside(path):
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [n.name for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef) and "Manager" in n.name]


@pytest.mark.parametrize(
    ("name", "function"), [("orchestrator/run.py", "run_recipe"), ("shearing/training/loop.py", "training_reports")]
)
def test_the_two_places_everyone_reads_first_are_short(name, function):
    (found,) = [n for n in tree(ROOT / name).body if isinstance(n, ast.FunctionDef) and n.name == function]
    body = found.body[1:] if isinstance(found.body[0], ast.Expr) else found.body
    assert body[-1].end_lineno - body[0].lineno + 1 < 40


def test_scripts_shadow_no_module():
    """`pipelines/` comes first on the path of a script and of its workers: a `tokenize.py` there breaks Python."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    taken |= {"evaluate", "datasets", "lm_eval", "accelerate"}  # the field's own, installed or not
    ours = set(STOREYS) | {"tests", "benchmarks", "cluster"}
    assert not {path.stem for path in files("pipelines", "benchmarks")} & (taken | ours)


def test_scripts_lie_flat():
    """A sub-package of pipelines/ would exist under two names, with two copies of every global."""
    assert not [path for path in files("pipelines") if len(path.relative_to(ROOT).parts) > 2]
    assert not (ROOT / "pipelines" / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["shearing", "actors", "orchestrator"])
def test_every_package_is_a_package(folder):
    """A folder without __init__.py is left out of the installed package."""
    for path in files(folder):
        assert (path.parent / "__init__.py").is_file()
