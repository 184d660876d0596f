"""Every benchmark runs at its smallest setting and prints its table. What the figures are is not asked here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TESTED = {
    "corpus",
    "inference",
    "mask_overhead",
    "orchestration",
    "scaling",
    "slicing",
    "start",
    "step_parts",
    "streams",
}


def run(name: str, *arguments: str, seconds: int = 300) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_benchmark_is_tested():
    """A benchmark that nobody runs breaks with the first change of what it measures."""
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == TESTED
    assert {path.name for path in BENCHMARKS.iterdir() if path.is_dir()} - {"__pycache__"} == {"study"}  # test_study.py


def test_mask_overhead():
    printed = run("mask_overhead", "--sizes", "0.2M", "--rounds", "2")
    rows = dict(re.findall(r"^ *0\.2M +(\w+) .*?x(\d\.\d+) \(", printed, flags=re.MULTILINE))
    assert rows["plain"] == "1.000"  # by itself
    assert {"again", "folded", "activations", "bookkeeping", "linears", "norms"} < set(rows)
    assert all(0.2 < float(ratio) < 5 for ratio in rows.values())


def test_inference():
    """Also that the forms are equal in parameters: a ratio of speeds says nothing otherwise."""
    printed = run("inference", "--sizes", "1M", "--rounds", "2", "--prompt", "16", "--decode", "3")
    rows = re.findall(r"^ +1M (\S+) +([\d,]+) .*x(\d+\.\d+) \(.*, x(\d+\.\d+) \(", printed, flags=re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count, *_ in rows}
    assert counts["dense"] == counts["again"] == counts["2:4"] > counts["sheared"]
    assert 0.85 * counts["sheared"] < counts["sliced"] <= counts["sheared"]
    assert 0.7 * counts["sheared"] < counts["shared"] <= counts["sheared"]
    assert rows[0] == ("dense", rows[0][1], "1.00", "1.00")
    assert "2:4 is multiplied as dense" in printed or "semi-structured kernels in" in printed


def test_slicing():
    """Also that both sides find the same rotations, which the benchmark itself asserts."""
    small = ["--layers", "2", "--width", "32", "--sequences", "2", "--tokens", "16", "--rounds", "1"]
    printed = run("slicing", *small)
    rows = re.findall(r"^(base|\w+ x2) +(plain|streamed) +[\d.]+ +[\d.]+ +", printed, flags=re.MULTILINE)
    assert len(rows) == 8
    assert len(re.findall(r"[\d.]+ of time, [\d.]+ of memory$", printed, flags=re.MULTILINE)) == 4


def test_corpus():
    printed = run("corpus", "--megabytes", "0.3", "--vocabulary", "400", "--rounds", "1")
    rows = re.findall(r"^(encode_batch|preparation).* {2,}([\d,]+) {2,}.* (\d+\.\d\d)$", printed, flags=re.MULTILINE)
    assert len(rows) == 7
    assert all(float(ratio) > 0 for *_, ratio in rows)


def test_streams():
    small = ["--steps", "3", "--sequence-tokens", "64", "--batch-tokens", "1024", "--domain-sequences", "256"]
    printed = run("streams", "--rates", "0", "--ray-cpus", "4", *small)
    for reader in ("DataLoader cursor", "Parquet, in process", "Ray Data feeder"):
        assert re.search(rf"^{reader} +flat out .*%.*x$", printed, flags=re.MULTILINE), printed
    assert ": 0 were off by 2" in printed, "proportions that change reach the very next batch"


@pytest.mark.slow
def test_step_parts():
    """Also that the parts add up to the step."""
    printed = run("step_parts", "--pairs", "3", "--megabytes", "0.4")
    rows = re.findall(r"^ +[13] .* to [\d.]+\) +[\d.]+ +[\d.]+ %((?: +[\d.]+ %){4})$", printed, flags=re.MULTILINE)
    assert len(rows) == 2, printed
    for shares in rows:
        assert sum(map(float, re.findall(r"[\d.]+", shares))) == pytest.approx(100, abs=0.03)


@pytest.mark.slow
def test_scaling():
    """Also that all clients hear one and the same version, which the benchmark itself asserts."""
    workers = ["--workers", "1", "2", "--steps", "2", "--batch-sequences", "4", "engine.micro_batch_sequences=2"]
    printed = run("scaling", "workers", *workers)
    rows = re.findall(r"^(strong|weak) +(\d) +\d+ +(\d+) ", printed, flags=re.MULTILINE)
    assert rows == [("strong", "1", "4"), ("strong", "2", "4"), ("weak", "1", "4"), ("weak", "2", "8")]
    printed = run("scaling", "actor", "--clients", "2", "12", "--rounds", "2", "--ray-cpus", "2")
    rows = re.findall(r"^ +(\d+)  (submit|fetch) +[\d.]+ ", printed, flags=re.MULTILINE)
    assert rows == [("2", "submit"), ("2", "fetch"), ("12", "submit"), ("12", "fetch")]


def test_scaling_on_paper():
    assert "recovery-1.3B" in run("scaling", "paper")


TINY = [
    "source.train.shape={num_layers: 2, hidden_size: 32, num_heads: 2, num_kv_heads: 2, head_size: 16, "
    "intermediate_size: 64}",
    "source.train.tokenizer.vocab_size=400",
    "source.train.global_batch_tokens=2048",
    "corpus.sequence_tokens=64",
    "corpus.split.eval=0.3",
    "evaluation.sequences_per_domain=2",
]


@pytest.mark.slow
def test_orchestration():
    """Also that both sides train on the same: a batch that Ray brings otherwise would show in the last loss."""
    sizes = ["--rounds", "1", "--steps", "30", "--skip", "2", "--megabytes", "0.2"]
    printed = run("orchestration", *sizes, *TINY, "engine.micro_batch_sequences=16")
    rows = re.findall(r"^ +1 +(bare loop|whole path) +.* (\d\.\d+)$", printed, flags=re.MULTILINE)
    losses = {side: float(loss) for side, loss in rows}
    assert losses["whole path"] == pytest.approx(losses["bare loop"], abs=1e-4)
    assert re.search(r"whole path / bare loop, tokens/s: \d+\.\d+ \(.* to .*\); goal 0.95", printed)
    assert re.search(r"evaluations took +\d+\.\d %", printed)


@pytest.mark.slow
def test_start():
    """Also that the parts are all there and add up to the whole."""
    printed = run("start", "--rounds", "1", "--megabytes", "0.3", "corpus.split.eval=0.1", seconds=580)
    parts = re.findall(r"^  \S.*? {2,}(\d+\.\d\d) +[\d.]+ +[\d.]+ +[\d.]+%$", printed, flags=re.MULTILINE)
    whole = re.search(r"^the command, traced.*? {2,}(\d+\.\d\d)", printed, flags=re.MULTILINE)
    assert len(parts) == 15
    assert sum(map(float, parts)) == pytest.approx(float(whole[1]), abs=0.5)
    assert re.search(r"^command / floor: \d", printed, flags=re.MULTILINE)
