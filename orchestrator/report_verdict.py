"""What a run proved, in plain words: facts with a level each, and one sentence over them.

Levels: `good` holds; `warn` worth a look; `bad` do not trust the result as it is; `info` a figure without judgement;
`open` not known yet.
"""

from typing import Any

from orchestrator.report_fact import Fact, fact
from orchestrator.report_slicing import is_sliced, slicing_facts
from orchestrator.report_text import compact, duration, nats, percent, signed_nats, times

SMALL_GAP_NATS = 0.05  # a learned mask and its exact target further apart than this were not yet decided
WAITING_SHARE = 0.01
TAKEN_OVER = 0.6


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """Headline, summary and facts of a report's contents."""
    judges = (slicing_facts, *JUDGES) if is_sliced(report["recipe"]) else (_target, _proof, *JUDGES)
    facts = [found for judge in judges for found in judge(report)]
    levels = {found["level"] for found in facts}
    unfinished = [stage["stage"] for stage in report["stages"] if stage["state"] != "finished"]
    bad = [found["title"] for found in facts if found["level"] == "bad"]
    warned = [found["title"] for found in facts if found["level"] == "warn"]
    if bad:
        level, headline = "bad", f"Do not rely on this model yet: {_listed(bad)}."
    elif unfinished:
        level, headline = "open", f"The run is not complete: {_listed(unfinished)} not finished."
    elif warned:
        level, headline = "warn", f"The model is sound, with something to look at: {_listed(warned)}."
    else:
        level, headline = "good", "The model has the shape that was asked for, and every check passed."
    return {"level": level, "headline": headline, "summary": _summary(report), "facts": facts, "levels": sorted(levels)}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _listed(names: list[str]) -> str:
    lowered = [name[:1].lower() + name[1:] for name in names]
    return lowered[0] if len(lowered) == 1 else ", ".join(lowered[:-1]) + " and " + lowered[-1]


def _mean_loss(report: dict[str, Any], model: str) -> float | None:
    entry = ((report["scores"] or {}).get("models") or {}).get(model) or {}
    return entry.get("mean_loss")


def _result_loss(report: dict[str, Any]) -> float | None:
    recovered = _mean_loss(report, "recovered")
    return _mean_loss(report, "sliced") if recovered is None else recovered


def _summary(report: dict[str, Any]) -> str:
    parts = []
    counts = (report["shapes"] or {}).get("parameters") or {}
    if counts.get("source") and counts.get("target"):
        share = percent(counts["target"] / counts["source"], 0)
        parts.append(f"Of {compact(counts['source'])} parameters, {compact(counts['target'])} were kept ({share}).")
    source, result = _mean_loss(report, "source"), _result_loss(report)
    if source is not None and result is not None:
        text = f"On held-out text the result has a loss of {nats(result)} nats a token, the source of {nats(source)}"
        scratch = _mean_loss(report, "scratch")
        if scratch is not None:
            text += f", a model of the same small shape trained from nothing on as many tokens of {nats(scratch)}"
        parts.append(text + ". Lower is better.")
    tokens = {phase: part["summary"].get("tokens") for phase, part in report["phases"].items()}
    for phase, words in (("pruning", "Mask learning took"), ("recovery", "Continued pretraining took")):
        if tokens.get(phase):
            parts.append(f"{words} {compact(tokens[phase])} tokens.")
    return " ".join(parts)


def _target(report: dict[str, Any]) -> list[Fact]:
    title = "The masks reached the target shape"
    extraction = report["extraction"]
    if not extraction:
        return [fact("target", "open", title, "not run", "Extraction has not run, so nothing is known yet.")]
    method = (report["recipe"].get("pruning") or {}).get("method", "learned")
    if method != "learned":
        why = "No gate was learned, so none is between: the largest scores stay, at exactly the target's size."
        return [fact("target", "good", "The target shape was chosen at once", f"by {method}", why)]
    gaps = {group: max(map(abs, rows)) for group, rows in (extraction.get("gaps") or {}).items() if rows}
    worst = max(gaps, key=lambda group: gaps[group]) if gaps else None
    value = f"largest gap {gaps[worst]:.3f} ({worst})" if worst else "no gap reported"
    if extraction.get("converged"):
        return [fact("target", "good", title, value, "Extraction then only removes what training had closed already.")]
    value = "; ".join(map(str, (extraction.get("missed") or [])[:3])) or value
    title, forced = "The masks did not reach the target shape", _rounding_cost(extraction)
    if forced is not None and forced <= SMALL_GAP_NATS:
        why = f"Extraction forced the rest, which cost {signed_nats(forced)} nats a token: little. Learn longer."
        return [fact("target", "warn", title, value, why)]
    why = (
        "Extraction cut units that training still used: the pruned model is worse than what was trained. Learn longer."
    )
    return [fact("target", "bad", title, value, why)]


def _rounding_cost(extraction: dict[str, Any]) -> float | None:
    """Loss at the exact target minus loss with the gates as learned, nats a token; None where it is not known."""
    proof = extraction.get("proof") or {}
    learned, exact = ((proof.get(key) or {}).get("mean") for key in ("learned", "exact_target"))
    return None if learned is None or exact is None else exact - learned


def _proof(report: dict[str, Any]) -> list[Fact]:
    extraction = report["extraction"]
    if not extraction:
        return []
    difference, tolerance = extraction.get("largest_difference"), extraction.get("agreement_tolerance")
    value = f"largest difference {_small(difference)}, allowed {_small(tolerance)}"
    why = "The masked model, the extracted one and the one read back from disk by stock software compute the same."
    facts = [fact("proof", "good", "The saved model is the trained one", value, why)]
    if not extraction.get("agrees"):
        why = "Masked, extracted and reloaded model should compute the same and do not: do not use the files."
        facts = [fact("proof", "bad", "The saved model differs from the trained one", value, why)]
    gap = _rounding_cost(extraction)
    if gap is not None:
        level = "good" if gap <= SMALL_GAP_NATS else "warn"
        title = "Rounding the masks cost little" if level == "good" else "Rounding the masks cost much"
        why = f"Loss at the exact target shape minus loss with the masks as learned; up to {SMALL_GAP_NATS} is small."
        facts.append(fact("rounding", level, title, f"{signed_nats(gap)} nats a token", why))
    return facts


def _recovery(report: dict[str, Any]) -> list[Fact]:
    source, recovered, scratch = (_mean_loss(report, model) for model in ("source", "recovered", "scratch"))
    pruned = _mean_loss(report, "sliced" if is_sliced(report["recipe"]) else "pruned")
    if recovered is None and pruned is not None:
        return []  # the recipe asks for no recovery
    if all(stage["stage"] != "scores" for stage in report["stages"]):
        why = "A comparison measures the models of all its methods together; its page says what this one is worth."
        return [fact("recovery", "info", "Quality of the result", "not scored in this run", why)]
    if recovered is None:
        return [fact("recovery", "open", "Quality of the result", "not scored", "The stage scores has not run.")]
    facts = []
    if pruned is not None and source is not None:
        healed = recovered < pruned
        smaller = "slicing" if is_sliced(report["recipe"]) else "pruning"
        share = (pruned - recovered) / (pruned - source) if pruned > source else None
        value = f"{nats(pruned)} to {nats(recovered)} nats a token"
        why = f"Continued training undid {percent(share, 0)} of what {smaller} cost. " if share is not None else ""
        why += (
            f"The source stands at {nats(source)}; the rest, {signed_nats(recovered - source)}, is the price of size."
        )
        if recovered < source:
            why = f"It came out below the source, which stands at {nats(source)}: {signed_nats(recovered - source)}."
        title = "Continued training healed the model" if healed else "Continued training did not help"
        facts.append(fact("recovery", "good" if healed else "bad", title, value, why))
    if lora := report["settings"]["lora"]:
        why = "Continued training moved low-rank adapters alone; all other weights are as they were before it."
        facts.append(fact("lora", "info", "Recovery by LoRA", lora, why))
    if scratch is not None:
        better = recovered < scratch
        title = "Pruning beat training from nothing" if better else "Training from nothing did as well or better"
        why = "Same shape, same number of tokens, no source model. " + (
            "The difference is what pruning inherited from the source."
            if better
            else "At this budget pruning bought nothing; check learning rates and length."
        )
        facts.append(
            fact(
                "scratch", "good" if better else "warn", title, f"{signed_nats(recovered - scratch)} nats a token", why
            )
        )
    return facts


def _data(report: dict[str, Any]) -> list[Fact]:
    facts = []
    phases = {phase: part for phase, part in report["phases"].items() if part["summary"]["steps"]}
    wrong = {
        p: s
        for p, part in phases.items()
        if (s := part["summary"]["steps_unaccounted"] + part["summary"]["gaps_in_steps"])
    }
    if phases:
        why = "At every step the sequences drawn add up to the tokens trained on, and no count ever goes back."
        value = f"{sum(part['summary']['steps'] for part in phases.values()):,} steps checked"
        counted = fact("accounting", "good", "Every training token is accounted for", value, why)
        if wrong:
            value = ", ".join(f"{p}: {count} of {phases[p]['summary']['steps']:,} steps" for p, count in wrong.items())
            why = "The sequences drawn do not add up to the tokens trained on: data was lost, repeated or not recorded."
            counted = fact("accounting", "bad", "Training tokens are not all accounted for", value, why)
        facts.append(counted)
    repeated = {
        (phase, domain): use["epochs"]
        for phase, part in phases.items()
        for domain, use in part["data_use"].items()
        if (use["epochs"] or 0) > 1
    }
    known = any(use["epochs"] is not None for part in phases.values() for use in part["data_use"].values())
    if repeated:
        (phase, domain), most = max(repeated.items(), key=lambda item: item[1])
        why = f"{_counted(len(repeated), 'stream')} began again; a training loss on text seen before flatters."
        facts.append(
            fact("epochs", "warn", "Some text was read more than once", f"{domain} in {phase}: {times(most)}", why)
        )
    elif known:
        most = max(use["epochs"] or 0 for part in phases.values() for use in part["data_use"].values())
        why = "No domain ran out, so within a phase every training loss was measured on text not seen before."
        facts.append(
            fact("epochs", "good", "No text was read twice in a phase", f"at most {percent(most, 0)} of a domain", why)
        )
    return facts


def _losses(report: dict[str, Any]) -> list[Fact]:
    bad = {p: n for p, part in report["phases"].items() if (n := part["summary"].get("steps_with_bad_loss"))}
    if not bad:
        return []
    phases = report["phases"]
    value = ", ".join(f"{p}: {count} of {phases[p]['summary']['steps']:,} steps" for p, count in bad.items())
    return [
        fact("finite", "bad", "Some losses were not numbers", value, "Training broke down; lower the learning rate.")
    ]


def _mixture(report: dict[str, Any]) -> list[Fact]:
    for phase in ("recovery", "pruning"):
        proportions = (report["phases"].get(phase) or {}).get("proportions") or {}
        last = {d: series[-1] for d, series in proportions.items() if series and series[-1] is not None}
        prior = report["prior"]
        if not last or any(prior.get(d) is None for d in last):
            continue
        moved = max(last, key=lambda d: abs(last[d] - prior[d]))
        value = f"{moved}: {percent(prior[moved])} to {percent(last[moved])}"
        if last[moved] > TAKEN_OVER and last[moved] > 2 * prior[moved]:
            why = "One domain takes most of the data. Look at its reference loss, or set mixture.cap or prior_pull."
            return [fact("mixture", "warn", "One domain took over the mixture", value, why)]
        why = f"Largest change of a proportion over {phase}; domains further above their reference loss get more data."
        return [fact("mixture", "info", "How far the mixture moved", value, why)]
    return []


def _predicted(report: dict[str, Any]) -> list[Fact]:
    """Predicted reference losses, how far they may be off, and what the fit warned of."""
    references = report["references"] or {}
    if references.get("kind") != "scaling_law":
        return []
    errors = references.get("standard_errors") or {}
    spread = {domain: f" \u00b1 {nats(error)}" for domain, error in errors.items()}
    value = ", ".join(f"{d} {nats(loss)}{spread.get(d, '')}" for d, loss in references["losses"].items())
    warnings = references.get("warnings") or []
    why = f"From sibling models, at the target's size. {_counted(len(warnings), 'warning')}" + (
        f": {'; '.join(warnings)}." if warnings else "."
    )
    return [fact("references", "info", "Reference losses are predicted", value, why)]


def _decisions(report: dict[str, Any]) -> list[Fact]:
    """Whether every decision on the mixture follows from its recorded losses, and what measuring them cost."""
    facts = []
    replays = report["replays"]
    wrong = {p: r for p, r in replays.items() if r.get("differs_at") is not None}
    unknown = {p: r["problem"] for p, r in replays.items() if r.get("problem")}
    if wrong:
        value = "; ".join(f"{phase}, version {r['differs_at']}: {r['how']}" for phase, r in wrong.items())
        why = "Decided again from the losses that were recorded, it comes out otherwise: history or rule was changed."
        facts.append(fact("replay", "warn", "A decision on the mixture does not replay", value, why))
    elif unknown:
        value = "; ".join(f"{phase}: {problem}" for phase, problem in unknown.items())
        facts.append(
            fact("replay", "info", "Decisions on the mixture could not be replayed", value, "Nothing is said.")
        )
    elif replays:
        value = ", ".join(f"{phase}: {_counted(r['versions'], 'version')} equal" for phase, r in replays.items())
        why = "Every version of the proportions was decided again from the losses on record and came out the same."
        facts.append(fact("replay", "good", "Decisions on the mixture replay", value, why))
    costs = {p: part["summary"] for p, part in report["phases"].items() if part["summary"].get("evaluation_s")}
    if costs:
        value = ", ".join(
            f"{phase}: {duration(s['evaluation_s'])} ({percent(s['evaluation_share'])})" for phase, s in costs.items()
        )
        why = "Time in held-out evaluation and its share of the phase. "
        if report["settings"]["loss_from"] == "train":
            why += "It only measured: the mixture was moved by the losses of training batches, at no cost."
        else:
            why += "Its losses moved the mixture; mixture.loss_from=train takes those of training batches, at no cost."
        facts.append(fact("evaluation", "info", "What held-out evaluation cost", value, why))
    return facts


def _communication(report: dict[str, Any]) -> list[Fact]:
    shares = {p: s for p, part in report["phases"].items() if (s := part["summary"].get("step_shares"))}
    if not shares:
        return []
    value = ", ".join(f"{phase}: {percent(split['communication'])}" for phase, split in shares.items())
    why = (
        "Share of step time in which the first worker did nothing but wait for collectives, or slower workers in them."
    )
    return [fact("communication", "info", "Time that communication took", value, why)]


def _forecast(report: dict[str, Any]) -> list[Fact]:
    summaries = {phase: part["summary"] for phase, part in report["phases"].items()}
    known = {phase: part for phase, part in summaries.items() if part.get("step_forecast_s")}
    if not known:
        return []
    value = ", ".join(
        f"{phase}: {times(part['step_measured_s'] / part['step_forecast_s'])}" for phase, part in known.items()
    )
    why = "Measured over planned seconds a step, evaluations and checkpoints included (docs/SCALING.md)."
    return [fact("forecast", "info", "Time against the plan", value, why)]


def _run(report: dict[str, Any]) -> list[Fact]:
    facts = []
    interrupted = {p: n for p, part in report["phases"].items() if (n := part["summary"].get("interruptions"))}
    if interrupted:
        repeated = sum(part["summary"].get("repeated_steps", 0) for part in report["phases"].values())
        value = ", ".join(f"{phase}: {count}" for phase, count in interrupted.items())
        why = f"The run went on from its checkpoints; {repeated:,} steps were done again and count once here."
        facts.append(fact("interruptions", "info", "Interruptions survived", value, why))
    waits = {p: s for p, part in report["phases"].items() if (s := part["summary"].get("data_wait_share")) is not None}
    if waits:
        phase = max(waits, key=lambda p: waits[p])
        level = "good" if waits[phase] <= WAITING_SHARE else "warn"
        title = "Training did not wait for data" if level == "good" else "Training waited for data"
        why = f"Largest share of step time spent waiting (in {phase}); up to {percent(WAITING_SHARE, 0)} is fine."
        facts.append(fact("waiting", level, title, percent(waits[phase], 2), why))
    facts += _communication(report)
    facts += _forecast(report)
    provenance = report["provenance"]
    if not provenance["problem"]:
        lines, malformed = provenance["lines"], provenance["malformed_lines"]
        why = "Lines of raw text that could not be read and were left out; files and lines are listed under provenance."
        level = "good" if not malformed else "info"
        facts.append(fact("malformed", level, "Malformed lines skipped", f"{malformed:,} of {lines:,}", why))
    return facts


def _speed(report: dict[str, Any]) -> list[Fact]:
    models = (report["scores"] or {}).get("models") or {}
    source, result = (
        models.get("source") or {},
        models.get("recovered") or models.get("sliced") or models.get("pruned") or {},
    )
    if not (source.get("decode_tokens_per_s") and result.get("decode_tokens_per_s")):
        return []
    decode = result["decode_tokens_per_s"] / source["decode_tokens_per_s"]
    prefill = result["prefill_tokens_per_s"] / source["prefill_tokens_per_s"]
    value = f"prefill {times(prefill)}, decoding {times(decode)}"
    level = "good" if min(prefill, decode) > 1 else "warn"
    title = "The result is faster than the source" if level == "good" else "The result is not faster throughout"
    return [fact("speed", level, title, value, "Tokens a second against the source, measured in turns in one process.")]


def _small(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}"


JUDGES = (_recovery, _data, _losses, _speed, _mixture, _predicted, _decisions, _run)
