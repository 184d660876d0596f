"""A workspace as a whole run leaves it, with invented, plausible figures. For tests of the report only."""

import json
import math

import numpy as np
import yaml

from shearing.storage import open_store

DOMAINS = {"code": 0.3, "headers": 0.15, "docstrings": 0.2, "tests": 0.15, "prose": 0.12, "licences": 0.08}
SOURCE_LOSS = {"code": 1.92, "headers": 1.41, "docstrings": 2.75, "tests": 1.63, "prose": 3.31, "licences": 1.08}
EXCESS = {"code": 1.2, "headers": 0.9, "docstrings": 1.3, "tests": 0.8, "prose": 1.1, "licences": 0.7}
SOURCE = {"num_layers": 6, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "head_size": 32}
TARGET = {"num_layers": 4, "hidden_size": 192, "num_heads": 6, "num_kv_heads": 6, "head_size": 32}
SOURCE |= {"intermediate_size": 688}
TARGET |= {"intermediate_size": 448}
TOKENS, BATCH, START = 256, 16, 1_790_000_000.0
PLAN = {"source": (600, 50), "pruning": (200, 20), "recovery": (400, 40), "scratch": (400, 40)}


def write_example(path, leave_out=(), draw=None):
    """Write a workspace under `path`; `leave_out` names stages that did not run. Returns its Store."""
    draw = draw or np.random.default_rng(11)
    store = open_store(str(path / "workspace"))
    corpus = open_store(str(path / "corpus"))
    corpus.write_json("manifest.json", manifest(draw))
    store.write_bytes("recipe.yaml", yaml.safe_dump(recipe(str(path)), sort_keys=False).encode())
    store.write_json("stages.json", [*SECONDS, "report"])
    clock = START
    for stage, seconds in SECONDS.items():
        if stage in leave_out:
            continue
        if stage in PLAN:
            write_phase(store, stage, clock, draw)
        mark = {"stage": stage, "inputs": f"{hash(stage) & 0xFFFFFFFF:08x}", "started": clock}
        mark |= {"finished": clock + seconds, "seconds": seconds, "outputs": outputs(stage, corpus, draw, leave_out)}
        mark["versions"] = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu"}
        store.write_json(f"stages/{stage}.json", mark)
        clock += seconds
    return store


SECONDS = {
    "corpus": 21.4, "source": 214.0, "references": 4.1, "pruning": 96.3, "extraction": 8.8, "recovery": 92.7,
    "scratch": 83.0, "scores": 31.9,
}  # fmt: skip


def recipe(path):
    phase = {"global_batch_tokens": BATCH * TOKENS, "learning_rate": 1e-3}
    return {
        "name": "quickstart",
        "workspace": f"{path}/workspace",
        "seed": 17,
        "corpus": {
            "path": f"{path}/corpora",
            "domains": {d: {"text": f"text/{d}/*.jsonl", "proportion": p} for d, p in DOMAINS.items()},
            "sequence_tokens": TOKENS,
        },
        "source": {"model": None, "train": {**phase, "steps": 600, "shape": SOURCE}},
        "references": {"kind": "source"},
        "mixture": {"rule": "sheared", "floor": 0.0, "cap": 1.0},
        "engine": {"workers": 1, "zero_stage": 1, "dtype": "float32"},
        "pruning": {**phase, "steps": 200, "target": TARGET, "gates": {"tolerance": 0.01, "learning_rate": 1.0}},
        "recovery": {**phase, "steps": 400},
        "scratch": {},
        "evaluation": {"sequences_per_domain": 64},
    }


def manifest(draw):
    def split(sequences, documents):
        tokens = sequences * TOKENS
        sizes = {"sequences": sequences, "tokens": tokens, "documents": documents, "text_bytes": int(tokens * 3.4)}
        return {**sizes, "shards": []}

    domains, sources = {}, []
    for domain, share in DOMAINS.items():
        train = int(40_000 * share)
        domains[domain] = {"eval": split(90, 31), "prune": split(train // 4, 200), "train": split(train, 1500)}
        for number in range(2):
            file = {"path": f"text/{domain}/{number}.jsonl", "domain": domain, "file_bytes": int(5e6 * share)}
            sources.append({**file, "documents": int(draw.integers(500, 900)), "malformed": int(domain == "tests")})
    return {
        "fingerprint": "3fa9c0de11ab22cd",
        "sequence_tokens": TOKENS,
        "token_dtype": "uint16",
        "tokenizer": {"sha256": "9b1e" * 16, "vocab_size": 4096, "boundary_token_id": 0},
        "domains": domains,
        "sources": sources,
        "malformed": [{"path": "text/tests/0.jsonl", "line": 17, "problem": "not JSON"}],
        "malformed_lines": 2,
        "lines": 9120,
    }


def write_phase(store, phase, clock, draw):
    steps, every = PLAN[phase]
    losses = {
        "source": lambda d, f: SOURCE_LOSS[d] + 5.2 * math.exp(-6 * f),
        "pruning": lambda d, f: (
            SOURCE_LOSS[d] + EXCESS[d] * (0.9 * math.sin(min(f, 0.35) / 0.35 * math.pi / 2) - 0.25 * f)
        ),
        "recovery": lambda d, f: SOURCE_LOSS[d] + EXCESS[d] * (0.20 + 0.5 * math.exp(-5 * f)),
        "scratch": lambda d, f: SOURCE_LOSS[d] + 0.52 + 4.6 * math.exp(-7 * f),
    }[phase]
    proportions, drawn, version = dict(DOMAINS), dict.fromkeys(DOMAINS, 0), 0
    credit = dict.fromkeys(DOMAINS, 0.0)
    first = {"kind": "evaluation", "step": 0, "time": clock, "losses": {d: losses(d, 0.0) for d in DOMAINS}}
    references = SOURCE_LOSS if phase != "source" else {}
    decide(store, phase, {"version": 0, "step": 0, "proportions": dict(DOMAINS), "losses": {}, "references": {}})
    rows = [{**first, "references": references, "proportions": dict(DOMAINS), "version": 0, "seconds": 1.1}]
    for step in range(1, steps + 1):
        f = step / steps
        for d in DOMAINS:
            credit[d] += BATCH * proportions[d]
        for d in DOMAINS:
            whole = int(credit[d])
            drawn[d] += whole
            credit[d] -= whole
        while sum(drawn.values()) < step * BATCH:
            d = max(credit, key=credit.get)
            drawn[d] += 1
            credit[d] -= 1
        noise = {d: float(draw.normal(0, 0.08)) for d in DOMAINS}
        batch = {d: losses(d, f) + noise[d] for d in DOMAINS}
        row = {"kind": "step", "step": step, "time": clock + step * 0.4, "tokens": step * BATCH * TOKENS}
        row |= {"loss": sum(proportions[d] * batch[d] for d in DOMAINS), "learning_rate": 1e-3, "losses": batch}
        row |= {"tokens_per_s": 10_400 + float(draw.normal(0, 200)), "step_s": 0.39, "data_wait_s": 0.001}
        if phase != "source":  # whose log is one of a release that did not split steps
            row |= {"forward_backward_s": 0.273, "communication_s": 0.078, "update_s": 0.038}
        row |= {"gradient_norm": 0.8, "proportions": dict(proportions), "drawn": dict(drawn)}
        if phase == "pruning":
            row |= {"lagrangian": 0.01, "gate_gradient_norm": 0.2, "sparsity": sparsity(f, draw)}
        rows.append(row)
        if phase == "recovery" and step == 150:
            rows.append({"kind": "event", "step": 120, "time": clock, "event": "resumed", "text": "worker 0 was lost"})
        if step % every == 0:
            held_out = {d: losses(d, f) + float(draw.normal(0, 0.015)) for d in DOMAINS}
            if phase != "source":
                weights = {d: proportions[d] * math.exp(max(held_out[d] - SOURCE_LOSS[d], 0)) for d in DOMAINS}
                proportions = {d: w / sum(weights.values()) for d, w in weights.items()}
                version += 1
            evaluation = {"kind": "evaluation", "step": step, "time": clock + step * 0.4, "losses": held_out}
            evaluation |= {"references": references, "proportions": dict(proportions)}
            rows.append({**evaluation, "version": version, "seconds": 1.1})
            state = {"version": version, "step": step, "proportions": proportions, "losses": held_out}
            if phase != "source":
                decide(store, phase, {**state, "references": SOURCE_LOSS})
    if phase == "recovery":  # the steps after the checkpoint at 120, as they went before the worker was lost
        lost = [{**row, "loss": 99.0} for row in rows if row["kind"] == "step" and 120 < row["step"] <= 150]
        at = next(i for i, row in enumerate(rows) if row["kind"] == "step" and row["step"] == 121)
        rows[at:at] = lost
    store.write_bytes(f"metrics/{phase}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def decide(store, phase, state):
    decision = {"state": {**state, "memory": {}, "warnings": []}, "attempt": "1f2e3d4c", "world": 1}
    store.write_json(f"mixture/{phase}/{state['version']:06d}.json", decision)


SIZES = {"layer": 6, "hidden": 256, "head": 8, "intermediate": 688}


def sparsity(f, draw):
    ends = {"layer": 1 / 3, "hidden": 0.25, "head": 0.25, "intermediate": 1 - 448 / 688}
    state = {}
    for group, end in ends.items():
        target = end * min(f / 0.4, 1.0)
        lag = 0.04 * math.exp(-8 * max(f - 0.1, 0)) * math.sin(9 * f)
        expected = max(0.0, target - lag + float(draw.normal(0, 0.001)))
        gap = abs(expected - target) + 0.002
        undecided = round((1 - f) * 40)
        state[group] = {"expected": expected, "target": target, "undecided": undecided, "largest_layer_gap": gap}
        size, rows = SIZES[group], 1 if group in ("layer", "hidden") else 6
        units = [round(size * (1 - expected) + 0.01 * row, 2) for row in range(rows)]
        state[group] |= {"size": size, "target_units": round(size * (1 - target), 2), "expected_units": units}
        state[group]["undecided_units"] = [undecided, *[0] * (rows - 1)]
    return state


def kept(draw):
    def choose(size, count):
        return sorted(int(i) for i in draw.choice(size, count, replace=False))

    layers = [0, 1, 3, 5]
    return {
        "layer": layers,
        "hidden": choose(256, 192),
        "head": [choose(8, 6) if layer in layers else [] for layer in range(6)],
        "intermediate": [choose(688, 448) if layer in layers else [] for layer in range(6)],
    }


def outputs(stage, corpus, draw, leave_out):
    if stage == "corpus":
        return {"path": corpus.uri, "fingerprint": "3fa9c0de11ab22cd"}
    if stage == "references":
        return {"kind": "source", "losses": SOURCE_LOSS}
    if stage == "extraction":

        def proof(extra):
            domains = {d: loss + EXCESS[d] * extra for d, loss in SOURCE_LOSS.items()}
            return {"mean": sum(domains.values()) / len(domains), "domains": domains}

        gaps = {"layer": [0.001], "hidden": [0.002], "head": [0.003, 0.001, 0.0, 0.002, 0.0, 0.004]}
        return {
            "proof": {
                "learned": proof(0.66), "exact_target": proof(0.68),
                "extracted": proof(0.680001), "reloaded": proof(0.680001),
            },
            "largest_difference": 1.2e-6, "agreement_tolerance": 1e-4, "agrees": True, "converged": True,
            "gaps": {**gaps, "intermediate": [0.001] * 6},
            "forced": {"head": {"units": [0, -1, 0, 0, 1, 0], "nats": 0.0123}}, "kept": kept(draw),
            "source_shape": SOURCE, "target_shape": TARGET, "parameters": {"source": 6_834_432, "target": 3_197_568},
        }  # fmt: skip
    if stage == "scores":
        models = {"source": 0.0, "pruned": 0.68, "recovered": 0.203, "scratch": 0.524}
        return {
            "models": {name: scores(name, extra) for name, extra in models.items() if name not in leave_out},
            "protocol": {
                "split": "eval", "sequences_per_domain": 64, "sequence_tokens": TOKENS, "dtype": "float32",
                "windows": "whole stored sequences, side by side without overlap", "device": "cpu", "threads": 1,
                "bos_rule": "no token is put before a window; its first token is read and not predicted",
                "prompt_tokens": 256, "decode_tokens": 64, "load_batch_sequences": 1, "repeats": 5,
                "predicted_tokens": dict.fromkeys(DOMAINS, 64 * (TOKENS - 1)),
            },
        }  # fmt: skip
    return {}


def scores(name, extra):
    losses = {d: loss + EXCESS[d] * extra for d, loss in SOURCE_LOSS.items()}
    small = name != "source"
    entry = {
        "parameters": 3_197_568 if small else 6_834_432,
        "prunable_parameters": 1_622_016 if small else 4_743_168,
        "disk_bytes": 13_012_331 if small else 27_551_022,
        "losses": losses,
        "mean_loss": sum(losses.values()) / len(losses),
        "perplexity": {d: math.exp(loss) for d, loss in losses.items()},
        "peak_memory_bytes": 17_100_000 if small else 33_300_000,
    }
    if name in ("source", "recovered"):
        entry |= {"prefill_tokens_per_s": 21_044.0 if small else 11_310.0, "prefill_quartiles": [20_000.0, 21_500.0]}
        entry |= {"decode_tokens_per_s": 402.0 if small else 265.0, "decode_quartiles": [390.0, 410.0]}
    return entry
