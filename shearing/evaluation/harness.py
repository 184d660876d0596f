"""Zero-shot and few-shot tasks by the LM evaluation harness (`lm-eval`), an extra of the installation.

The harness gets a model that `shearing.models.loading` has loaded, so that it scores every directory this project
writes. This is the one module that knows the harness.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from shearing.errors import UserError
from shearing.evaluation.config import TasksConfig
from shearing.evaluation.inference import Inference

INSTALL = "pip install 'lm-eval==0.4.13'"
NEAREST = 5
FEWSHOT_SEED = 1234  # the harness' own default
UNFILTERED = "none"  # what the harness calls answers that no filter has touched


def check_tasks(config: TasksConfig) -> None:
    """Raises UserError where the harness is not installed or does not know a task; all problems at once."""
    _task_manager(config)


def _task_manager(config: TasksConfig) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"tasks are scored by the LM evaluation harness, which is not installed here. Run `{INSTALL}`.")
    if config.files is not None and not Path(config.files).is_dir():
        raise UserError(f"{config.files} is no folder; name the one that holds the task files")
    from lm_eval.tasks import TaskManager

    manager, problems = TaskManager(include_path=config.files), []
    known = manager.all_tasks
    for name in dict.fromkeys(config.names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=NEAREST)
            hint = f"did you mean {', '.join(near)}?" if near else "nothing there has a name like it."
            unread = "" if config.files is None else f" Files in {config.files} that are no task are passed over."
            problems.append(f"the harness knows no task {name!r}; {hint} `lm-eval ls tasks` lists all.{unread}")
    if problems:
        raise UserError(problems)
    return manager


def score_tasks(model_dir: str, config: TasksConfig, inference: Inference) -> dict[str, Any]:
    """What the harness finds of a model: each task's metrics with standard errors, and the protocol they hold for.

    While the data are loaded, the process' working directory is the folder of task files.

    Returns:
        `tasks`: task or group -> version, examples, questions, metrics (name -> value and stderr, which is None where
        the harness has none); `protocol`.

    Raises:
        UserError: As `check_tasks`; the model has no tokenizer; the data of a task cannot be loaded.
    """
    torch.set_num_threads(inference.threads)
    manager, tokenizer = _task_manager(config), inference.load_tokenizer(model_dir)
    from lm_eval.evaluator import evaluate  # after the check that it is there
    from lm_eval.models.huggingface import HFLM

    with contextlib.chdir(config.files or "."):
        tasks = _load_tasks(config, manager)
    harness: Any = HFLM(
        pretrained=inference.load_model(model_dir),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=inference.batch_sequences,
    )
    found = evaluate(harness, tasks, limit=config.limit, log_samples=False)
    assert found is not None, "only other ranks get nothing, and there are none"
    results = found["results"] | found.get("groups", {})
    return {
        "tasks": {name: _entry(name, results[name], found) for name in results},
        "protocol": {
            "harness": f"lm-eval {importlib.metadata.version('lm-eval')}",
            "fewshot": config.fewshot,
            "limit": config.limit,
            "files": config.files,
            "most_tokens": harness.max_length,
            "opening_token_ids": list(tokenizer("")["input_ids"]),
            "stderr": "of the mean over questions, by formula or bootstrap as the harness has it",
            "batch_sequences": inference.batch_sequences,
            "dtype": inference.dtype,
            "device": inference.device,
        },
    }


def _load_tasks(config: TasksConfig, manager: Any) -> Any:
    """Tasks with their data, and with as many examples as asked for where a task does not fix them at none."""
    try:
        loaded = manager.load(list(config.names))
    except Exception as error:  # a hub, a builder of data sets and a task's own code: each raises what it likes
        raise UserError(
            f"the data of {', '.join(config.names)} cannot be loaded ({type(error).__name__}: {error}). Without "
            "network give a folder of task files whose `dataset_path` is json and whose `data_files` are local."
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (config.fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=config.fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _entry(name: str, result: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """One task or group out of all that the harness tells; a key that it has not for groups is None."""
    metrics = {}
    for key, value in result.items():
        metric, comma, applied = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = result.get(f"{metric}_stderr,{applied}")
            metrics[metric if applied == UNFILTERED else f"{metric} ({applied})"] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,  # "N/A" where there is none
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
    return {
        "version": found["versions"].get(name),
        "fewshot": found["n-shot"].get(name),
        "questions": result.get("sample_len"),
        "metrics": metrics,
    }
