"""The forecast of a step against sums done by hand."""

from dataclasses import replace

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator.hardware import CPU_CORE_FLOPS_PER_S, GPUS, Hardware, HardwareConfig, hardware_for
from orchestrator.plan import plan
from orchestrator.plan_text import render_plan
from orchestrator.step_time import Work, breaks_first, memory_of, phase_time, step_time
from shearing.data.source import STEPS_A_REQUEST
from shearing.models.family import llama_config
from shearing.models.parameters import count_parameters
from shearing.models.shape import Shape
from shearing.training.config import EngineConfig, TrainingConfig

SHAPE = Shape(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4, head_size=16, intermediate_size=128)
CONFIG = llama_config(SHAPE, 256, 128)
N = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 256 * 64
FLOPS = 6 * (N - 256 * 64) + 12 * 2 * 64 * 32
ROUND = Hardware(
    "round", 2e9, 0.5, 1e9, 4, link_bytes_per_s=1e8, node_bytes_per_s=1e6, wire_share=1.0, link_latency_s=1e-5,
    node_latency_s=1e-3, storage_bytes_per_s=1e7, feeder_tokens_per_s=1e5, feeder_message_s=1e-4,
    actor_round_trip_s=0.1, actor_message_s=0.01,
)  # fmt: skip
TRAINING = TrainingConfig(steps=100, global_batch_tokens=32 * 16, evaluate_every_steps=10, checkpoint_every_steps=20)
WORK = Work(CONFIG, 32, TRAINING, domains=3, evaluation_sequences=5)


def engine(**given):
    return EngineConfig(**{"workers": 4, "zero_stage": 1, "dtype": "bfloat16", "micro_batch_sequences": 2} | given)


def test_every_part_by_hand():
    """Four workers in one node, two passes of two sequences each."""
    assert count_parameters(CONFIG) == N
    step = step_time(WORK, engine(), ROUND, 4)
    assert step.compute == pytest.approx(2 * 64 * FLOPS / 1e9)
    assert step.communication == pytest.approx(2 * 2 * N * 3 / 4 / 1e8 + 2 * 3 * 1e-5)
    read, busy = 512 / 1e5, step.compute + step.communication
    assert read < busy
    assert step.data == pytest.approx((read + 4 * 1e-4) / 10)
    assert step.evaluation == pytest.approx(-(-3 * 3 // 4) * 64 * FLOPS / 3 / 1e9 / 10)
    assert step.mixture == pytest.approx((0.1 + 4 * 0.01) / 10)
    assert step.checkpoint == pytest.approx((12 * N / 1e8 + 12 * N / 1e7) / 20)
    assert step.idle == 0
    assert step.total == pytest.approx(sum(step.parts.values()))
    time = phase_time(WORK, engine(), ROUND, 4)
    assert time.hours == pytest.approx(100 * step.total / 3600)
    assert time.worker_hours == pytest.approx(4 * time.hours)


@pytest.mark.parametrize(("stage", "moves"), [(1, 2), (2, 3), (3, 6)])
def test_zero_stages_move_what_they_move(stage, moves):
    """Two passes: stage 2 reduces in each, stage 3 gathers twice and reduces once in each (arXiv 1910.02054, 7)."""
    slow = replace(ROUND, link_bytes_per_s=1e5, link_latency_s=0.0)
    step = step_time(WORK, engine(zero_stage=stage), slow, 4)
    hidden = step.compute if stage == 3 else 0.0
    assert step.communication + hidden == pytest.approx(moves * 2 * N * 3 / 4 / 1e5)


def test_a_second_node_is_as_slow_as_its_adapters():
    """A ring over nodes that is charged with the links inside a node looks a hundred times too fast."""
    inside, across = (step_time(WORK, engine(), ROUND, workers).communication for workers in (4, 8))
    assert across == pytest.approx(2 * 2 * N * 7 / 8 / 1e6 + 2 * (6 * 1e-5 + 1e-3))
    assert across > 50 * inside
    assert step_time(WORK, engine(), ROUND, 1).communication == 0


def test_what_is_not_trained_costs_less_and_what_is_done_twice_more():
    plain = step_time(WORK, engine(), ROUND, 4).compute
    assert step_time(WORK, engine(activation_checkpointing=True), ROUND, 4).compute == pytest.approx(plain * 4 / 3)
    adapted = step_time(replace(WORK, adapters=1000), engine(), ROUND, 4)
    assert adapted.compute == pytest.approx(plain * 2 / 3)
    assert adapted.communication == pytest.approx(2 * 2 * 1000 * 3 / 4 / 1e8 + 2 * 3 * 1e-5)
    taught = step_time(replace(WORK, teacher_parameters=10_000), engine(), ROUND, 4).compute
    assert taught - plain == pytest.approx(2 * 64 * 2 * 10_000 / 1e9)


def test_a_slow_stream_holds_up_what_it_cannot_hide():
    slow = step_time(WORK, engine(), replace(ROUND, feeder_tokens_per_s=1e3, feeder_message_s=0.0), 4)
    read, busy = 0.512, slow.compute + slow.communication
    assert slow.data == pytest.approx(0.9 * (read - busy) + 0.1 * read)


def test_requests_hold_up_the_one_who_answers_them():
    """Hundreds of workers that each ask at every step: the feeder's time for a request, not for its tokens."""
    busy = replace(ROUND, feeder_tokens_per_s=1e12, feeder_message_s=1.0)
    for workers, asking in ((4, 4), (64, 16)):  # a batch of 16 sequences: no more than 16 have something to ask for
        step = step_time(WORK, engine(), busy, workers)
        ahead = asking / STEPS_A_REQUEST - step.compute - step.communication
        assert step.data == pytest.approx(0.9 * max(0.0, ahead) + 0.1 * asking, rel=1e-6)


def test_more_workers_than_sequences_stand_idle():
    """Workers beyond the batch that are counted as if they worked."""
    eight, many = (step_time(WORK, engine(), ROUND, workers) for workers in (8, 16))
    assert many.compute == eight.compute
    assert many.idle == pytest.approx(many.compute / 2)
    assert breaks_first(WORK, engine(), ROUND, 16) == "batch: 16 sequences for 32"
    assert breaks_first(WORK, engine(), replace(ROUND, peak_flops_per_s=1e7), 6).startswith("uneven batch: ")


def test_what_breaks_first():
    fast = replace(ROUND, peak_flops_per_s=2e9)
    needed = memory_of(WORK, engine(), 4).total
    assert breaks_first(WORK, engine(), replace(fast, memory_bytes=needed), 4).startswith("memory")
    assert breaks_first(WORK, engine(), replace(fast, memory_bytes=None), 4) == "nothing"
    assert breaks_first(WORK, engine(), replace(fast, storage_bytes_per_s=1e5), 4).startswith("checkpoint: ")


def test_a_device_is_taken_where_it_is_known():
    """A GPU's hours for float32, or a CPU's for bfloat16, of which no constant is known."""
    gpu = engine(gpus_per_worker=1)
    assert [kind.name for kind in hardware_for(gpu, None)] == list(GPUS)
    (kind,) = hardware_for(gpu, HardwareConfig(device="H200", node_bytes_per_s=5.0))
    assert (kind.name, kind.node_bytes_per_s, kind.link_bytes_per_s) == ("H200", 5.0, 450e9)
    (small,) = hardware_for(gpu, HardwareConfig(device="A100", memory_bytes=40e9))
    assert small.memory_bytes == 40e9, "cards of 40 GB that are planned as if they had 80"
    assert hardware_for(engine(gpus_per_worker=1, dtype="float32"), None) == []
    assert hardware_for(engine(), None) == []
    (core,) = hardware_for(engine(dtype="float32", cpus_per_worker=3), None)
    assert core.flops_per_s == 3 * CPU_CORE_FLOPS_PER_S
    assert core.wire_bytes_per_s(8) == float("inf")


def test_the_cpu_constant_is_the_diarys():
    """4,096 tokens in 335 ms on two cores, the quickstart's source model."""
    shape = {"num_layers": 4, "hidden_size": 128, "num_heads": 8, "num_kv_heads": 8, "head_size": 16}
    config = llama_config(Shape(**shape, intermediate_size=344), 2048, 512)
    work = replace(WORK, config=config, sequence_tokens=256, training=TRAINING.model_copy(
        update={"global_batch_tokens": 4096}
    ))  # fmt: skip
    settings = engine(dtype="float32", workers=2, micro_batch_sequences=8)
    (core,) = hardware_for(settings, None)
    assert step_time(work, settings, core, 2).compute == pytest.approx(0.335, rel=0.02)


def test_the_plan_says_time_or_why_not(tmp_path):
    text = render_plan(plan(tiny_recipe(tmp_path)))
    assert "time, forecast" in text
    assert "CPU core" in text
    assert "as the quickstart reached" in text
    unknown = render_plan(plan(tiny_recipe(tmp_path, "engine.dtype=bfloat16")))
    assert "not known: no constant for bfloat16 on a CPU" in unknown
    gpu = ("engine.gpus_per_worker=1", "engine.dtype=bfloat16")
    assert all(f"{name} " in render_plan(plan(tiny_recipe(tmp_path, *gpu))) for name in GPUS)
    one = plan(tiny_recipe(tmp_path, *gpu, "hardware.device=A100", "hardware.achieved_share=0.5"))
    assert [time.hardware.achieved_share for time in one.phases[0].times] == [0.5]
    assert "50% of the peak that data sheets give: the recipe's" in render_plan(one)
    bounded = render_plan(plan(tiny_recipe(tmp_path, "hardware.memory_bytes=1e3")))
    assert "memory: " in bounded
    assert "as the quickstart reached" in bounded
    away = ("source.train=null", f"source.model={tmp_path / 'away'}")
    assert "not known: the source's shape is not" in render_plan(plan(tiny_recipe(tmp_path, *away)))
