import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from example_workspace import DOMAINS, SOURCE_LOSS, write_example

from orchestrator.report import build_report
from orchestrator.report_charts import spread
from orchestrator.report_contents import contents
from orchestrator.report_pictures import cell_grid, strips
from orchestrator.report_reading import PHASES, read_phase, read_run, without_nan
from orchestrator.report_text import ABSENT, PHASE_NAMES
from orchestrator.report_verdict import verdict
from shearing.storage import open_store

VOID = {"meta", "br", "img", "link", "hr", "input", "use", "path", "rect", "circle", "line"}


class Reader(HTMLParser):
    """Text, ids, attributes that load something, and tags left open."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.texts, self.ids, self.tags, self.loads, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        loading = ("src", "href", "xlink:href", "srcset", "action", "data")
        self.loads += [value for name, value in attrs if name in loading and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store = write_example(tmp_path_factory.mktemp("run"))
    build_report(store)
    return store


def read(store):
    html = store.read_bytes("report/index.html").decode()
    return store.read_json("report/report.json"), html, store.read_bytes("report/report.md").decode()


def fact(report, key):
    return next(fact for fact in report["verdict"]["facts"] if fact["key"] == key)


def change(store, name, edit):
    value = store.read_json(name)
    edit(value)
    store.write_json(name, value)


def test_the_page_loads_nothing_and_is_well_formed(whole):
    """A page that needs the network or a script, ids twice that make one figure draw another's clip, tags left open."""
    _, html, _ = read(whole)
    reader = Reader(html)
    assert reader.loads == []
    assert "script" not in reader.tags
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.open == []
    assert {target[1:] for target in re.findall(r'(?:href="|url\()(#[^")]+)', html)} <= set(reader.ids)


def test_html_markdown_and_json_say_the_same(whole):
    """Figures of one format computed apart from another's."""
    report, html, markdown = read(whole)
    texts = Reader(html).texts
    for name in ("source", "pruned", "recovered", "scratch"):
        entry = report["scores"]["models"][name]
        numbers = [f"{entry['mean_loss']:.3f}", f"{entry['parameters']:,}"]
        numbers += [f"{loss:.3f}" for loss in entry["losses"].values()]
        numbers += [f"{value:.2f}" for value in entry["perplexity"].values()]
        for number in numbers:
            assert number in texts
            assert f"| {number} |" in markdown
    for given in report["verdict"]["facts"]:
        assert given["title"] in texts
        assert given["value"] in texts
        assert given["title"] in markdown
        assert given["value"] in markdown
    assert report["verdict"]["headline"] in texts
    assert yaml_line(report["recipe_text"]) in html
    assert report["recipe_text"] in markdown
    for use in report["phases"]["recovery"]["data_use"].values():
        assert f"{use['sequences']:,}" in texts


def test_communication(whole):
    """Shares of steps that nobody split: the example's source is of a release that did not."""
    report, html, _ = read(whole)
    assert fact(report, "communication")["value"] == ", ".join(f"{p}: 20.0\u202f%" for p in PHASES[1:])
    texts = Reader(html).texts
    row = texts[texts.index("Waiting for data") :]
    source, pruning = (row[row.index(PHASE_NAMES[phase]) :] for phase in PHASES[:2])
    assert source[6:9] == [ABSENT] * 3
    assert pruning[6:9] == ["70.0\u202f%", "20.0\u202f%", "9.7\u202f%"]


def yaml_line(text):
    return next(line for line in text.splitlines() if "sequence_tokens" in line).strip()


def test_numbers_are_those_of_the_workspace(whole):
    """A series cut short, a mean over the wrong thing, epochs against the wrong split."""
    report, _, _ = read(whole)
    recovery = report["phases"]["recovery"]
    assert recovery["steps"] == list(range(1, 401))
    assert recovery["tokens"][-1] == 400 * 16 * 256
    assert recovery["evaluations"]["references"]["code"] == [SOURCE_LOSS["code"]] * 11
    first = {d: series[0] for d, series in recovery["evaluations"]["losses"].items()}
    assert recovery["evaluations"]["mean_loss"][0] == pytest.approx(np.mean(list(first.values())))
    drawn = {d: use["sequences"] for d, use in recovery["data_use"].items()}
    assert sum(drawn.values()) == 400 * 16
    pruning_code = report["phases"]["pruning"]["data_use"]["code"]
    assert pruning_code["available"] == 3000  # a quarter of 12,000: the split prune, not train
    assert pruning_code["epochs"] == pytest.approx(pruning_code["sequences"] / 3000)
    assert recovery["data_use"]["code"]["available"] == 12_000
    assert report["phases"]["pruning"]["sparsity"]["layer"]["target"][-1] == pytest.approx(1 / 3)
    assert [len(versions) for versions in report["mixture"].values()] == [1, 11, 11, 11]
    assert report["provenance"]["domains"]["tests"]["malformed"] == 2
    assert report["versions"]["ray"] == "2.60.0"


def test_repeated_steps_count_once_and_the_last_counts(whole):
    """A resumed run's abandoned steps drawn in the curve, or its data counted twice."""
    report, _, _ = read(whole)
    recovery = report["phases"]["recovery"]
    assert recovery["summary"]["repeated_steps"] == 30
    assert max(recovery["loss"]) < 50  # the abandoned steps have a loss of 99
    assert recovery["summary"]["interruptions"] == 1
    assert fact(report, "accounting")["level"] == "good"
    assert fact(report, "interruptions")["value"] == "recovery: 1"


def test_reading_metrics():
    """Half a line of a killed writer that ends the report; an event of a repeated step shown twice."""
    rows = [
        {"kind": "step", "step": 2, "loss": 1.0},
        {"kind": "event", "step": 2, "event": "next_epoch", "text": "wiki"},
        {"kind": "evaluation", "step": 2, "losses": {"a": 1.0}},
        {"kind": "event", "step": 1, "event": "resumed", "text": ""},
        {"kind": "step", "step": 2, "loss": 2.0},
        {"kind": "event", "step": 2, "event": "next_epoch", "text": "wiki"},
        {"kind": "event", "step": 1, "event": "resumed", "text": ""},
        {"kind": "step", "step": 1, "loss": 3.0},
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "step", "st'
    found = read_phase(data.encode())
    assert [(row["step"], row["loss"]) for row in found.steps] == [(1, 3.0), (2, 2.0)]
    assert [row["step"] for row in found.evaluations] == [2]
    assert sorted(row["event"] for row in found.events) == ["next_epoch", "resumed", "resumed"]
    assert (found.repeated_steps, found.unreadable_lines) == (1, 1)


STAGES = ["corpus", "source", "references", "pruning", "extraction", "recovery", "scratch", "scores"]


@pytest.mark.parametrize("ran", [1, 4, 6])
def test_a_run_that_stopped_midway_still_has_a_report(tmp_path, ran):
    """A report that needs all stages, or that calls half a run good."""
    store = write_example(tmp_path, leave_out=STAGES[ran:])
    report = build_report(store)
    assert report["verdict"]["level"] == "open"
    assert "not finished" in report["verdict"]["headline"]
    assert [stage["state"] for stage in report["stages"]] == ["finished"] * ran + ["not run"] * (8 - ran)
    _, html, markdown = read(store)
    assert "Not run" in html
    assert "Not run" in markdown
    assert Reader(html).open == []


@pytest.mark.parametrize(
    "left_out", [("scratch",), ("scores",), ("scores", "recovery"), ("scores", "pruning", "extraction", "scratch")]
)
def test_stages_that_a_run_does_without_are_not_missed(tmp_path, left_out):
    """ "The run is not complete" on every page that a comparison links to: its methods' runs score nothing."""
    store = write_example(tmp_path, leave_out=left_out)
    assert build_report(store)["verdict"]["level"] == "open"
    store.write_json("stages.json", [name for name in [*STAGES, "report"] if name not in left_out])
    report = build_report(store)
    assert report["verdict"]["level"] != "open"
    assert "scores has not run" not in store.read_bytes("report/report.md").decode()
    assert [stage["stage"] for stage in report["stages"]] == [name for name in STAGES if name not in left_out]


def test_versions_are_those_of_each_stage(tmp_path):
    """A report that claims for the whole run what was installed at its last start."""
    store = write_example(tmp_path)
    change(store, "stages/recovery.json", lambda mark: mark["versions"].update(torch="2.14.0"))
    versions = build_report(store)["versions"]
    before = "corpus, source, references, pruning, extraction, scratch, scores"
    assert versions["torch"] == f"2.13.0+cpu ({before}), 2.14.0 (recovery)"
    assert versions["ray"] == "2.60.0"


def test_sparsifying_is_a_stage(tmp_path):
    """A list of the report's own, which lacks a stage that ran."""
    store = write_example(tmp_path, leave_out=("pruning", "extraction", "scratch"))
    store.write_json("stages.json", ["corpus", "source", "references", "sparsifying", "recovery", "scores", "report"])
    assert "sparsifying not finished" in build_report(store)["verdict"]["headline"]
    store.write_json("stages/sparsifying.json", {"stage": "sparsifying", "finished": 1.0, "seconds": 9.0})
    assert "sparsifying" in [stage["stage"] for stage in build_report(store)["stages"]]


def test_an_empty_workspace_has_a_report(tmp_path):
    """An error where a run failed before its first stage."""
    store = write_example(tmp_path, leave_out=STAGES)
    store.delete("recipe.yaml")
    assert build_report(store)["verdict"]["level"] == "open"


def not_converged(store):
    missed = [
        "gates of 'head' are further than 0.01 from their target sparsity 0.250 in 1 of 6 layers (layer 2: 0.110)"
    ]
    change(store, "stages/extraction.json", lambda m: m["outputs"].update(converged=False, missed=missed))


def no_agreement(store):
    change(store, "stages/extraction.json", lambda m: m["outputs"].update(agrees=False, largest_difference=0.1))


def rounding(store):
    change(store, "stages/extraction.json", lambda m: m["outputs"]["proof"]["learned"].update(mean=2.2))


def worse_than_scratch(store):
    change(store, "stages/scores.json", lambda m: m["outputs"]["models"]["scratch"].update(mean_loss=2.0))


def not_healed(store):
    change(store, "stages/scores.json", lambda m: m["outputs"]["models"]["recovered"].update(mean_loss=2.9))
    change(store, "stages/scores.json", lambda m: m["outputs"]["models"]["scratch"].update(mean_loss=3.0))


def slower(store):
    change(store, "stages/scores.json", lambda m: m["outputs"]["models"]["recovered"].update(decode_tokens_per_s=200.0))


def edit_metrics(store, phase, edit):
    rows = [json.loads(line) for line in store.read_bytes(f"metrics/{phase}.jsonl").splitlines()]
    for row in rows:
        edit(row)
    store.write_bytes(f"metrics/{phase}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def lost_data(store):
    edit_metrics(
        store, "pruning", lambda r: r["drawn"].update(code=r["drawn"]["code"] + 1) if r["step"] == 77 else None
    )


def nan_loss(store):
    edit_metrics(
        store, "recovery", lambda r: r.update(loss=math.nan) if r["kind"] == "step" and r["step"] == 9 else None
    )


def waiting(store):
    edit_metrics(store, "recovery", lambda r: r.update(data_wait_s=0.1))


def second_epoch(store):
    corpus = open_store(store.read_json("stages/corpus.json")["outputs"]["path"])
    change(corpus, "manifest.json", lambda m: m["domains"]["prose"]["train"].update(sequences=384))


@pytest.mark.parametrize(
    ("spoil", "key", "level", "shown"),
    [
        (not_converged, "target", "warn", "layer 2: 0.110"),
        (no_agreement, "proof", "bad", "1.0e-01"),
        (rounding, "rounding", "warn", "+0.497"),
        (worse_than_scratch, "scratch", "warn", "+0.220"),
        (not_healed, "recovery", "bad", "2.900"),
        (slower, "speed", "warn", "decoding 0.75×"),
        (lost_data, "accounting", "bad", "pruning: 1 of 200 steps"),
        (nan_loss, "finite", "bad", "recovery: 1 of 400 steps"),
        (waiting, "waiting", "warn", "25.64"),
        (second_epoch, "epochs", "warn", "prose in source: 3.00×"),
    ],
)
def test_each_fault_turns_its_own_fact(tmp_path, spoil, key, level, shown):
    """A verdict that stays green, or blames something else."""
    store = write_example(tmp_path)
    spoil(store)
    report = without_nan(contents(read_run(store)))
    report["verdict"] = verdict(report)
    judged = {given["key"]: given["level"] for given in report["verdict"]["facts"]}
    assert judged.pop(key) == level
    assert set(judged.values()) <= {"good", "info"}
    assert shown in fact(report, key)["value"]
    assert report["verdict"]["level"] == level


def test_a_target_that_was_forced_dearly_is_no_model_to_rely_on(tmp_path):
    """A run whose gates never decided, shown as one with something to look at."""
    store = write_example(tmp_path)
    not_converged(store)
    rounding(store)
    report = build_report(store)
    assert fact(report, "target")["level"] == "bad"
    assert report["verdict"]["level"] == "bad"


def test_the_json_is_strict(tmp_path):
    """NaN, which most readers of JSON refuse."""
    store = write_example(tmp_path, leave_out=("source", "scratch"))
    nan_loss(store)
    build_report(store)
    report = json.loads(store.read_bytes("report/report.json"), parse_constant=pytest.fail)
    assert report["phases"]["recovery"]["loss"][8] is None


def test_the_same_run_makes_the_same_page(whole):
    """Random ids that make two reports of one run differ."""
    before = whole.read_bytes("report/index.html")
    build_report(whole)
    assert whole.read_bytes("report/index.html") == before


def test_each_domain_has_one_colour(whole):
    """A domain whose colour changes from figure to figure."""
    _, html, _ = read(whole)
    for index, domain in enumerate(DOMAINS):
        panels = re.findall(rf'aria-label="Held-out loss of {domain} over steps".*?</svg>', html, re.DOTALL)
        assert len(panels) == 4
        for panel in panels:
            assert set(re.findall(r"var\(--d(\d)\)", panel)) == {str(index)}


def test_text_from_outside_cannot_become_markup(tmp_path):
    """A domain or file name that injects markup into the page."""
    store = write_example(tmp_path)
    corpus = open_store(store.read_json("stages/corpus.json")["outputs"]["path"])
    change(corpus, "manifest.json", lambda m: m["malformed"][0].update(path="<script>alert(1)</script>"))
    text = store.read_bytes("recipe.yaml").decode().replace("code:", "'<b>code':")
    store.write_bytes("recipe.yaml", text.encode())
    for phase in ("source", "pruning", "recovery", "scratch"):
        renamed = store.read_bytes(f"metrics/{phase}.jsonl").replace(b'"code"', b'"<b>code"')
        store.write_bytes(f"metrics/{phase}.jsonl", renamed)
    build_report(store)
    _, html, _ = read(store)
    reader = Reader(html)
    assert "script" not in reader.tags
    assert "<b>code" in reader.texts
    assert reader.open == []


def test_pictures_show_what_was_kept():
    """Rows of removed layers drawn as kept, bars at the wrong place, counts of the wrong row."""
    grid = cell_grid([[0, 2], [1, 2]], 3, [1], "heads")
    assert grid.count('class="kept"') == 2
    assert grid.count('class="cut"') == 4
    assert grid.count('class="struck"') == 1
    assert "2 of 3" in grid
    bars = strips([[0, 1, 3]], 4, None, "hidden")
    assert re.findall(r"M([\d.]+) 2h([\d.]+)v", bars) == [("0.00", "320.00"), ("480.00", "160.00")]
    many = strips([list(range(0, 8192, 2))], 8192, None, "hidden")
    assert 'opacity="0.4"' in many  # every bin half kept, shaded in fifths
    assert len(many) < 1000


def test_labels_keep_their_order_and_distance():
    """Labels of close curves printed over each other."""
    placed = spread([0.5, 0.51, 0.1, 0.52], 0.05)
    assert sorted(range(4), key=placed.__getitem__) == [2, 0, 1, 3]
    gaps = np.diff(sorted(placed))
    assert gaps.min() >= 0.05 - 1e-6
    assert placed[2] == 0.1
    assert min(spread([0.0, 0.0], 0.1, floor=0.05)) >= 0.05 - 1e-6
    assert spread([], 0.1) == []


def test_every_layer_of_every_group_in_units(tmp_path):
    """Catches a mean over layers that hides the one whose gates never decided, and a cost that nobody reads."""
    report = build_report(write_example(tmp_path))
    head = report["phases"]["pruning"]["sparsity"]["head"]
    assert (head["size"], head["target_units"], len(head["expected_units"])) == (8, 6.0, 6)
    assert len(head["layers"]["steps"]) == len(head["layers"]["kept_shares"]) == 120  # of 200
    assert (head["layers"]["steps"][0], head["layers"]["steps"][-1]) == (1, 200)
    store = open_store(str(tmp_path / "workspace"))
    page, text = (store.read_bytes(f"report/{name}").decode() for name in ("index.html", "report.md"))
    assert "Share of head kept, by layer and step" in page
    assert "closed 1 (layer 1: 1) and opened 1 (layer 4: 1)" in page
    assert f"| head | layer 5 | 8 | 6 | {head['expected_units'][5]:g} | 0 |" in text
    assert "Forced at extraction: head, closed 1 (layer 1: 1) and opened 1 (layer 4: 1); alone +0.012 nats" in text


def test_units_that_were_chosen_need_no_gates(tmp_path):
    """Catches a report that calls a run without mask learning unfinished, or its target reached by training."""
    store = write_example(tmp_path)
    recipe = yaml.safe_load(store.read_bytes("recipe.yaml"))
    recipe["pruning"]["method"] = "magnitude"
    store.write_bytes("recipe.yaml", yaml.safe_dump(recipe).encode())
    store.delete("metrics/pruning.jsonl")
    report = build_report(store)
    fact = next(fact for fact in report["verdict"]["facts"] if fact["key"] == "target")
    assert (fact["level"], fact["value"]) == ("good", "by magnitude")
    assert "No masks were learned" in store.read_bytes("report/index.html").decode()


def test_layers_of_their_own_sizes(tmp_path):
    """Catches an uneven result that is shown as a plain model of its largest sizes."""
    store = write_example(tmp_path)
    mark = store.read_json("stages/extraction.json")
    layer = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 1077}
    mark["outputs"]["uneven"] = [layer, {"skip": ["attention"], "intermediate_size": 12}]
    store.write_json("stages/extraction.json", mark)
    rows = [json.loads(line) for line in store.read_bytes("metrics/pruning.jsonl").splitlines()]
    for row in rows:
        for group in row.get("sparsity", {}).values():
            group |= {"target": None, "target_units": None, "largest_layer_gap": None}
    store.write_bytes("metrics/pruning.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    build_report(store)
    assert "| 1 | none | none | 12 |" in store.read_bytes("report/report.md").decode()
    assert "Layer of the result" in store.read_bytes("report/index.html").decode()


def test_the_report_says_how_far_off_the_plan_was(tmp_path):
    """Steps 0.4 s apart, 0.2 planned; a phase that was interrupted says nothing, for its clock stood still."""
    store = write_example(tmp_path)
    for phase in ("pruning", "recovery"):
        store.write_json(f"forecast/{phase}.json", {"CPU core": 0.2})
    store.write_json("forecast/source.json", {"A100": 0.1, "H100": 0.1})  # which it was is not known
    report = build_report(store)
    assert report["phases"]["pruning"]["summary"]["step_measured_s"] == pytest.approx(0.4)
    (found,) = [entry for entry in report["verdict"]["facts"] if entry["title"] == "Time against the plan"]
    assert found["value"] == "pruning: 2.00\u00d7"
