"""Where a run stands, live or dead, from its workspace alone. Reads, and takes no lock."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from orchestrator.console import format_duration
from orchestrator.report_contents import planned_steps
from orchestrator.report_reading import INTERRUPTION, PHASES, PhaseRecord, RunRecord, read_run, step_shares
from orchestrator.workspace_lock import describe_driver
from shearing.errors import UserError
from shearing.storage import Store

RATE_STEPS = 50
SHOWN_EVENTS = 6


def read_state(workspace: Store, now_s: float) -> dict[str, Any]:
    """The state of a run as JSON values; what it has not come to is None or empty.

    Args:
        workspace: The run's folder.
        now_s: Unix time that ages are counted from.

    Raises:
        UserError: There is no run in that folder.
    """
    if not workspace.exists("recipe.yaml"):
        raise UserError(
            f"{workspace.uri} holds no recipe.yaml, so no run began there. Give the folder or URI of a run: its "
            "workspace=..., or runs/<name> below where it was started."
        )
    run = read_run(workspace)
    phases = {name: _standing(record) for name, record in run.phases.items()}
    stages = [_stage(run, name) for name in run.asked]
    phase = _current_phase(run, phases)
    return {
        "name": run.recipe.get("name"),
        "workspace": workspace.uri,
        "driver": describe_driver(workspace),
        "stages": stages,
        "finished": all(stage["state"] == "finished" for stage in stages),
        "phase": _phase(run, phase, phases[phase], now_s) if phase else None,
    }


def _stage(run: RunRecord, name: str) -> dict[str, Any]:
    mark = run.stages.get(name)
    state = "to come" if mark is None else "finished" if mark.get("finished") else "begun"
    return {"stage": name, "state": state, "seconds": mark.get("seconds") if mark else None}


def _current_phase(run: RunRecord, phases: dict[str, PhaseRecord]) -> str | None:
    """The phase that a run is in, or was in last."""
    begun = [phase for phase in PHASES if phase in phases and phases[phase].steps]
    unfinished = [phase for phase in begun if not run.stages.get(phase, {}).get("finished")]
    latest = sorted(begun, key=lambda phase: _time(phases[phase].steps[-1]))
    return next(iter([*unfinished, *reversed(latest)]), None)


def _standing(record: PhaseRecord) -> PhaseRecord:
    """What the last worker group goes on from or has made: what a dead one did after its checkpoint is undone."""
    if not record.starts:
        return record
    start = max(record.starts, key=_time)

    def stand(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if row["step"] <= start["step"] or row["time"] >= start["time"]]

    return replace(
        record,
        starts=[start],
        steps=stand(record.steps),
        evaluations=stand(record.evaluations),
        checkpoints=stand(record.checkpoints),
    )


def _time(row: dict[str, Any]) -> float:
    return float(row["time"])


def _phase(run: RunRecord, name: str, record: PhaseRecord, now_s: float) -> dict[str, Any]:
    row, planned = record.steps[-1], planned_steps(run, name)
    finished = bool(run.stages.get(name, {}).get("finished"))
    step_s = _seconds_a_step(record)
    left = None if finished or planned is None or step_s is None else max(planned - row["step"], 0) * step_s
    checkpoint = record.checkpoints[-1] if record.checkpoints else None
    return {
        "phase": name,
        "finished": finished,
        "step": row["step"],
        "planned_steps": planned,
        "workers": record.starts[-1]["workers"] if record.starts else None,
        "loss": row["loss"],
        "tokens": row["tokens"],
        "tokens_per_s": row["tokens_per_s"],
        "step_shares": step_shares(record.steps, RATE_STEPS),
        "left_s": left,
        "last_row_age_s": now_s - max(map(_time, _rows(record))),
        "domains": _domains(record),
        "sparsity": {
            group: {key: state[key] for key in ("expected", "target", "undecided", "largest_layer_gap")}
            for group, state in row.get("sparsity", {}).items()
        },
        "checkpoint": checkpoint
        and {"name": checkpoint["name"], "step": checkpoint["step"], "age_s": now_s - checkpoint["time"]},
        "events": [{key: event[key] for key in ("step", "event", "text")} for event in record.events[-SHOWN_EVENTS:]],
        "repeated_steps": record.repeated_steps,
    }


def _rows(record: PhaseRecord) -> list[dict[str, Any]]:
    return [*record.starts, *record.steps, *record.evaluations, *record.checkpoints, *record.events]


def _seconds_a_step(record: PhaseRecord) -> float | None:
    """Of the last steps that were made without an interruption, evaluations and checkpoints included."""
    began = max((row["time"] for row in (*record.starts, *record.events) if _interrupts(row)), default=0.0)
    rows = [row for row in record.steps[-RATE_STEPS:] if row["time"] >= began]
    if len(rows) < 2:
        return None
    return float((rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"]))


def _interrupts(row: dict[str, Any]) -> bool:
    return row["kind"] == "start" or row.get("event") == INTERRUPTION


def _domains(record: PhaseRecord) -> dict[str, dict[str, Any]]:
    """By domain: the last held-out loss, its reference, its excess over that, and the proportion that holds now."""
    row = record.steps[-1]
    evaluation: dict[str, Any] = record.evaluations[-1] if record.evaluations else {"losses": {}, "references": {}}
    found = {}
    for domain, proportion in row["proportions"].items():
        loss, reference = evaluation["losses"].get(domain), evaluation["references"].get(domain)
        excess = None if loss is None or reference is None else max(loss - reference, 0.0)
        found[domain] = {"loss": loss, "reference": reference, "excess": excess, "proportion": proportion}
        found[domain]["drawn_sequences"] = row["drawn"][domain]
    return found


def render_state(state: dict[str, Any]) -> str:
    """A state as lines for a person."""
    lines = [f"{state['name']}  {state['workspace']}", f"  driver: {state['driver']}", "", "  stages"]
    for stage in state["stages"]:
        took = "" if stage["seconds"] is None else f"  {format_duration(stage['seconds'])}"
        lines.append(f"    {stage['stage']:12}{stage['state']}{took}")
    if state["phase"] is not None:
        lines += ["", *_phase_lines(state["phase"])]
    return "\n".join(lines)


def _phase_lines(phase: dict[str, Any]) -> list[str]:
    planned, step = phase["planned_steps"], phase["step"]
    share = f"/{planned:,} ({100 * step / planned:.0f} %)" if planned else ""
    left = f", {format_duration(phase['left_s'])} left" if phase["left_s"] is not None else ""
    workers = f" on {phase['workers']} workers" if phase["workers"] else ""
    lines = [
        f"  {phase['phase']}: step {step:,}{share}{left}",
        f"    training loss {phase['loss']:.4f}, {phase['tokens_per_s']:,.0f} tokens/s{workers}; "
        f"last word {format_duration(phase['last_row_age_s'])} ago",
    ]
    if phase["step_shares"]:
        shares = ", ".join(f"{part.replace('_', ' ')} {share:.1%}" for part, share in phase["step_shares"].items())
        lines.append(f"    time of steps: {shares}")
    if checkpoint := phase["checkpoint"]:
        lines.append(f"    checkpoint of step {checkpoint['step']:,}, {format_duration(checkpoint['age_s'])} old")
    else:
        lines.append("    no checkpoint is known of")
    width = max(len("domain"), *map(len, phase["domains"]))
    titles = ("loss", "reference", "excess", "proportion", "sequences")
    lines += ["", f"    {'domain':{width}}" + "".join(f"{title:>12}" for title in titles)]
    for domain, figures in phase["domains"].items():
        numbers = [figures[key] for key in ("loss", "reference", "excess", "proportion")]
        lines.append(f"    {domain:{width}}" + "".join(map(_number, numbers)) + f"{figures['drawn_sequences']:>12,}")
    if phase["sparsity"]:
        width = max(len("gates"), *map(len, phase["sparsity"]))
        lines += ["", f"    {'gates':{width}}    sparsity      target  widest gap   undecided"]
        for group, gates in phase["sparsity"].items():
            numbers = [gates[key] for key in ("expected", "target", "largest_layer_gap")]
            lines.append(f"    {group:{width}}" + "".join(map(_number, numbers)) + f"{gates['undecided']:>12,}")
    lines += [""] * bool(phase["events"])
    return lines + [f"    step {event['step']:,}: {event['text']}" for event in phase["events"]]


def _number(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.4f}"
