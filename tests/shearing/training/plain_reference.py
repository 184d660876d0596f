"""Training and mask learning once more, as plainly as torch allows: one process, no engine, own schedule and clip."""

import math

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from shearing.data.manifest import load_manifest
from shearing.data.mixing import MixState, plan_batch
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import make_orders
from shearing.models.family import family_of, shape_of
from shearing.models.loading import read_config
from shearing.pruning.gates import LOG_ALPHA_LIMIT, Gates
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import gate_groups, target_shape
from shearing.storage import open_store


def clip_(parameters, limit):
    """Scale gradients together to the norm `limit` at most. Returns the norm before."""
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    for parameter in parameters:
        parameter.grad *= min(1.0, limit / norm)
    return norm


class PlainGates:
    """Gates and multipliers with optimisers of their own."""

    def __init__(self, phase, model):
        config = read_config(phase.model)
        self.config, shape = phase.pruning, shape_of(config)
        groups = gate_groups(shape, target_shape(shape, self.config.target))
        options = self.config.gates
        self.gates = Gates(groups, options.initial_log_alpha, options.initial_log_alpha_std, phase.seed)
        self.slots = attach_gates(model, family_of(config))
        self.multipliers = {name: [torch.zeros((), requires_grad=True) for _ in range(2)] for name in groups}
        ascending = [multiplier for pair in self.multipliers.values() for multiplier in pair]
        self.optimizers = [
            torch.optim.Adam(self.gates.parameters(), lr=options.learning_rate, betas=(0.9, 0.95)),
            torch.optim.Adam(ascending, lr=options.learning_rate, betas=(0.9, 0.95), maximize=True),
        ]

    def constraint(self, step):
        ramp, total = min(1.0, step / self.config.gates.sparsity_warmup_steps), 0.0
        for name, expected in self.gates.expected_sparsity().items():
            spec, (linear, quadratic) = self.gates.groups[name], self.multipliers[name]
            gap = expected - ramp * (1 - spec.target / spec.size)
            total = total + (linear * gap + quadratic * gap**2).mean()
        return total

    def update(self, step):
        constraint = self.constraint(step)
        constraint.backward()
        norm = clip_(list(self.gates.parameters()), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for log_alpha in self.gates.parameters():
            log_alpha.data.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)
        return constraint.item(), norm


def plain_divergence(teacher_NTV, student_NTV, temperature):
    """Mean over sequences and all positions but the last of sum p (log p - log q), p and q softmax(logits / t)."""
    p, q = (torch.softmax(logits[:, :-1] / temperature, -1) for logits in (teacher_NTV.detach(), student_NTV))
    return (p * (p.log() - q.log())).sum(-1).mean()


def plain_adapters(model, phase):
    """A llama as PEFT wraps it, by PEFT's own front door."""
    torch.manual_seed(phase.seed)
    halves = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    targets, lora = [name for half in phase.lora.targets for name in halves[half]], phase.lora
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    return get_peft_model(model, config)


def plain_run(phase, noise_ranks=(None,)):
    """Losses, norms and end of a phase with constant proportions.

    Args:
        phase: In float32.
        noise_ranks: Whose gate noise: one entry for a draw that all share, or every rank's own, where rank r has
            every r-th sequence of a batch.
    """
    training, store = phase.training, open_store(phase.corpus)
    manifest = load_manifest(store)
    source = ParquetSource(store, make_orders(manifest, phase.split, list(phase.proportions), phase.seed))
    model = AutoModelForCausalLM.from_pretrained(phase.model, dtype=torch.float32).train()
    model = plain_adapters(model, phase) if phase.lora else model
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=training.betas, weight_decay=training.weight_decay)
    gates = PlainGates(phase, model) if phase.pruning else None
    taught = phase.distillation
    teacher = AutoModelForCausalLM.from_pretrained(taught.teacher, dtype=torch.float32).eval() if taught else None
    mix, history = MixState.start(list(phase.proportions)), []
    for step in range(training.steps):
        sequences = training.global_batch_tokens // manifest.sequence_tokens
        draws, mix = plan_batch(mix, phase.proportions, sequences, phase.seed, step)
        tokens_NT = torch.from_numpy(source.fetch(draws).tokens_NT.astype("int64"))
        row = {"loss": 0.0}
        torch.manual_seed(phase.seed * 1_000_003 + step * 4099)  # rank 0's dropout
        for number, noise_rank in enumerate(noise_ranks):
            if gates:
                sample = gates.gates.sample(gates.gates.noise(phase.seed, step, noise_rank))
                gates.slots.set(sample)
            mine_NT = tokens_NT[number :: len(noise_ranks)]
            logits_NTV = model(input_ids=mine_NT).logits
            loss = functional.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), mine_NT[:, 1:].flatten())
            loss = loss / len(noise_ranks)
            row["loss"] += loss.item()
            if taught:
                divergence = plain_divergence(teacher(input_ids=mine_NT).logits, logits_NTV, taught.temperature)
                row["divergence"] = divergence.item()
                loss = (1 - taught.weight) * loss + taught.weight * taught.temperature**2 * divergence
            loss.backward()
            if gates:
                found = gates.slots.gradients()
                torch.autograd.backward(list(sample.values()), [found[name] for name in sample])
        row["gradient_norm"] = clip_(weights, training.gradient_clip)
        warm = training.warmup_steps
        progress = (step - warm) / (training.steps - warm)
        cosine = 0.1 + 0.9 * (math.cos(math.pi * progress) + 1) / 2
        optimizer.param_groups[0]["lr"] = training.learning_rate * ((step + 1) / warm if step < warm else cosine)
        optimizer.step()
        optimizer.zero_grad()
        if gates:
            row["lagrangian"], row["gate_gradient_norm"] = gates.update(step)
        history.append(row)
    return history, model, optimizer, gates
