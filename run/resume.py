"""Whether a run may go on from what its folder holds: its settings compared, and what is in the way set aside."""

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from recipe.spin.checks.contents import contents_of
from recipe.spin.common.secrets import shown_address, without_secrets
from recipe.spin.common.settings import ConfigError
from recipe.spin.run_folder import (
    TRACKER,
    UNREADABLE,
    answers_files,
    checkpoints,
    copy_answers,
    is_complete,
    metrics_files,
    tracked_step,
    write_whole,
)

SETTINGS = "settings.yaml"
CONTENTS = "contents"  # a section there: what the files held
SERVERS = "algorithm.judge.servers"
UNREADABLE_REMEDY = "correct it, or delete it to go on uncompared"
MODES = ("auto", "disable", "resume_path", "force")  # verl's, and auto in spite of other settings
RANKS = "trainer.nnodes * trainer.n_gpus_per_node"

# A checkpoint cannot be loaded with another value: it has a file a rank, and its place in the data a state a worker
FIXED = (
    RANKS,
    "actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.fsdp_config.fsdp_size",
    "data.dataloader_num_workers",
)
# With prompts that are answered ahead a checkpoint has a file a storage unit as well
FIXED_AHEAD = ("transfer_queue.backend.SimpleStorage.num_data_storage_units",)
# Settings of these names say how long, where, how fast and in how much memory; what is trained stays the same
HARMLESS = (
    "trainer.*",
    "ray_kwargs.*",
    "transfer_queue.*",
    "global_profiler.*",
    "*.profiler.*",
    "*.num_workers",
    "data.filter_overlong_prompts_workers",
    "data.val_batch_size",
    "*.use_shm",
    "*.use_dynamic_bsz",
    "*.log_prob_use_dynamic_bsz",
    "*micro_batch_size*",
    "*max_token_len_per_gpu",
    "*_offload",
    "*.offload_policy",
    "*.reshard_after_forward",
    "*.forward_prefetch",
    "*.use_torch_compile",
    "*.ulysses_sequence_parallel_size",
    "*timeout*",
    "algorithm.judge.api_key_env",
    "algorithm.judge.concurrency",
    "algorithm.judge.retries",
    "algorithm.judge.max_unreadable",
    "actor_rollout_ref.share_prompt",
    "actor_rollout_ref.keep_products",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.actor.calculate_entropy",
    "actor_rollout_ref.actor.checkpoint.save_contents",
    "actor_rollout_ref.rollout.*_parallel_size",
    "actor_rollout_ref.rollout.checkpoint_engine.*",
    "actor_rollout_ref.rollout.cudagraph_capture_sizes",
    "actor_rollout_ref.rollout.disable_log_stats",
    "actor_rollout_ref.rollout.enable_chunked_prefill",
    "actor_rollout_ref.rollout.enable_prefix_caching",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.block_size",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.load_format",
    "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.prometheus.*",
    "actor_rollout_ref.rollout.trace.*",
)
# The exceptions among them
MEANINGFUL = ("trainer.device", "trainer.ref_update_*", "trainer.rollout_sync_freq", "trainer.v1.*")
# How long a run is matters where a schedule is stretched over it
LENGTH = ("trainer.total_training_steps", "trainer.total_epochs")
# Said by other keys, or by the command about this start alone
NOT_COMPARED = (
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.default_local_dir",
    "trainer.resume_*",
    "actor_rollout_ref.*.rollout_n",
    "actor_rollout_ref.rollout.prompt_length",
    "actor_rollout_ref.rollout.response_length",
    "actor_rollout_ref.rollout.nnodes",
    "actor_rollout_ref.rollout.n_gpus_per_node",
    "*._target_",
    f"{CONTENTS}*",  # by changed_files
)
ABSENT = "(not set)"
# Of the stored settings, what each must be
STORED = (
    (CONTENTS, lambda value: isinstance(value, dict), "a section of files"),
    (SERVERS, lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of texts"),
)

Difference = tuple[str, Any, Any]


def prepare(config: DictConfig) -> None:
    """Makes the run's folder ready for the step that the run begins at, and stores the settings there.

    Settings and files that differ from those of the checkpoint's run are refused where they change what is trained or
    measured, and said on the console where they do not. `trainer.resume_mode=force` takes them all and becomes verl's
    auto. Everything above that step, of the run's earlier attempts, is moved into a folder `set_aside_N`, and all of
    another run's where the checkpoint is from elsewhere.

    Raises:
        ConfigError: when the run may not go on from the checkpoint, or its folder cannot be written.
    """
    folder = Path(config.trainer.default_local_dir)
    settings = settings_of(config) | {CONTENTS: _contents(config)}
    try:
        step, origin = _beginning(config, folder)
    except OSError as error:
        named = config.trainer.resume_from_path if config.trainer.resume_mode == "resume_path" else str(folder)
        raise ConfigError(f"{named}: {error}; let this user read it, or begin elsewhere (RUN_DIR)") from error
    try:
        _prepare(config, folder, settings, step, origin)
    except OSError as error:
        raise ConfigError(
            f"trainer.default_local_dir={str(folder)!r}: {error}; let this user read and write all of it and make room "
            "there, or name another folder (RUN_DIR)"
        ) from error


def _prepare(config: DictConfig, folder: Path, settings: dict, step: int, origin: Path) -> None:
    comes_from_elsewhere = step > 0 and origin.resolve() != folder.resolve()
    if comes_from_elsewhere:
        ahead = config.trainer.v1.trainer_mode != "sync"  # TransferQueue unpickles what was answered ahead
        _say(
            f"goes on from {origin}, not this run's folder"
            + ahead * ": its transfer_queue/ runs code that its maker may have put into it"
        )
    if step > 0:
        _compare(settings, origin, step, config)
    if config.trainer.resume_mode == "force":
        config.trainer.resume_mode = "auto"
    moved_to = set_aside(folder, 0 if comes_from_elsewhere else step)
    if comes_from_elsewhere:
        copy_answers(origin, folder, step)
    _store(settings, folder)
    if moved_to:
        _say(f"begins at step {step}; what {folder} held of other starts is in {moved_to}, which may be deleted")


def _say(text: str) -> None:
    sys.stderr.write(f"[spin] {text}\n")


# ---------------------------------------------------------------------- the step to begin at


def _beginning(config: DictConfig, folder: Path) -> tuple[int, Path]:
    """The step of the checkpoint that verl will load, 0 for none, and the folder of the run that saved it."""
    mode = config.trainer.resume_mode
    if mode not in MODES:
        raise ConfigError(f"trainer.resume_mode={mode!r}: choose one of {', '.join(MODES)}")
    if mode == "disable":
        return 0, folder
    if mode == "resume_path":
        checkpoint = Path(str(config.trainer.resume_from_path))
        step = {path.name: number for number, path in checkpoints(checkpoint.parent).items()}.get(checkpoint.name)
        if step is None:
            raise ConfigError(
                f"trainer.resume_from_path={config.trainer.resume_from_path!r}: there is no such checkpoint; name a "
                "folder global_step_N"
            )
        config.trainer.resume_from_path = str(checkpoint)  # verl stumbles over a slash at the end
        return step, checkpoint.parent
    return _latest(folder), folder


def _latest(folder: Path) -> int:
    """The step that the tracker names. One that a kill cut off is written again."""
    tracker = folder / TRACKER
    if not tracker.exists():
        return 0
    step, saved = tracked_step(folder), checkpoints(folder)
    complete = [number for number, path in saved.items() if is_complete(path)]
    if step is None and tracker.read_text(errors="replace").strip() == "" and complete:
        step = max(complete)
        tracker.write_text(str(step))
        _say(f"{tracker} was empty, as a kill leaves it; {saved[step].name} is complete and taken")
    if step is None or (step not in saved and complete):
        raise ConfigError(
            f"{tracker} says {tracker.read_text(errors='replace')!r}, and there is no such checkpoint. Write one of "
            f"these into it: {', '.join(map(str, complete)) or 'there are none'}; or delete it to start over"
        )
    return step if step in saved else 0


def set_aside(folder: Path, step: int) -> Path | None:
    """Moves what a run that begins at `step` does not go on from into a folder of its own, and returns that.

    These are checkpoints above it, half-written ones and another run's, metrics that began above it, held-out answers
    given above it, and the summary, which marks a finished run. What the user put into the folder stays.
    """
    saved, tracker = checkpoints(folder), folder / TRACKER
    leftover = [path for number, path in saved.items() if number > step]
    leftover += [path for (start, _), path in metrics_files(folder).items() if start > step or step == 0]
    leftover += [path for given, path in answers_files(folder).items() if given > step or step == 0]
    unreadable = [folder / UNREADABLE] if step == 0 else []
    leftover += [path for path in [folder / "summary.json", *unreadable] if path.exists()]
    if (tracked_step(folder) or 0) > step:
        leftover.append(tracker)
    if not leftover:
        return None
    number = 1
    while (folder / f"set_aside_{number}").exists():
        number += 1
    aside = folder / f"set_aside_{number}"
    for path in leftover:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    if step in saved and not tracker.exists():
        tracker.write_text(str(step))
    return aside


# ---------------------------------------------------------------------- settings


def settings_of(config: DictConfig) -> dict:
    """The resolved settings as plain values, secrets left out."""
    return without_secrets(OmegaConf.to_container(config, resolve=True))


def _contents(config: DictConfig) -> dict[str, str]:
    try:
        return contents_of(config)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read ({error.strerror}), and a run notes what its files hold; let this user "
            "read it"
        ) from error


def _store(settings: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _read(file: Path) -> dict:
    try:
        settings = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{file}: not readable ({error}); {UNREADABLE_REMEDY}") from error
    if not isinstance(settings, dict) or "trainer" not in settings:
        raise ConfigError(f"{file} holds no settings; {UNREADABLE_REMEDY}")
    _require_sound(settings, file)
    return settings


def _require_sound(settings: dict, file: Path) -> None:
    """A file that was edited may hold anything; what is not only compared must be of its kind, if it is there."""
    for key, is_kind, kind in STORED:
        section, value = settings, ABSENT
        for name in key.split("."):
            value = section.get(name, ABSENT) if isinstance(section, dict) else ABSENT
            section = value
        if value != ABSENT and not is_kind(value):
            raise ConfigError(f"{file}: {key}={shown_address(repr(value))} must be {kind}; {UNREADABLE_REMEDY}")


def differences(old: dict, new: dict, prefix: str = "") -> list[Difference]:
    """(key, old value, new value) of each setting that differs, NOT_COMPARED ones left out."""
    found: list[Difference] = []
    for name in [*old, *(name for name in new if name not in old)]:
        key = f"{prefix}{name}"
        before, after = old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{key}.")
        elif before != after and not _matches(key, NOT_COMPARED):
            found.append((key, before, after))
    return found


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _is_harmless(key: str, settings: dict) -> bool:
    if key in LENGTH and _has_schedule(settings):
        return False
    return _matches(key, HARMLESS) and not _matches(key, MEANINGFUL)


def _are_the_same_judges(key: str, before: Any, after: Any, settings: dict) -> bool:
    """Whether what differs are addresses alone at which judges answer: as many, with models that the settings name."""
    if key != SERVERS or before == ABSENT or settings["algorithm"]["judge"]["models"] is None:
        return False
    return len(before) == len(after) and all(
        old == new or ("://" in old and "://" in new) for old, new in zip(before, after, strict=True)
    )


def _has_schedule(settings: dict) -> bool:
    """Whether beta or the learning rate is stretched over the whole of a run."""
    optimizer = settings["actor_rollout_ref"]["actor"]["optim"]
    return (
        isinstance(settings["algorithm"]["dpo_beta"], dict)
        or optimizer["lr_scheduler_type"] != "constant"
        or optimizer["lr_warmup_steps_ratio"] > 0
    )


def changed_files(old: dict, new: dict) -> list[Difference]:
    """(file, what it held, what it holds) of each that both settings know; others are told by the settings' names."""
    before, after = (settings.get(CONTENTS, {}) for settings in (old, new))
    return [(file, before[file], after[file]) for file in before if before[file] != after.get(file, before[file])]


def _compare(settings: dict, origin: Path, step: int, config: DictConfig) -> None:
    """Refuses, or says, in what settings and files differ from those that are stored beside the checkpoint."""
    file = origin / SETTINGS
    if not file.exists():
        _say(f"{origin} does not hold its settings ({SETTINGS}): they are not compared with this command's")
        return
    old = _read(file)
    found = differences(old, settings)
    try:
        ranks = _ranks(old)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file} lacks trainer.nnodes or trainer.n_gpus_per_node; {UNREADABLE_REMEDY}") from error
    if ranks != _ranks(settings):
        found.append((RANKS, ranks, _ranks(settings)))
    ahead = settings["trainer"]["v1"]["trainer_mode"] != "sync"
    fixed = [difference for difference in found if difference[0] in (FIXED + FIXED_AHEAD if ahead else FIXED)]
    if fixed:
        raise ConfigError(
            f"the checkpoint of step {step} in {origin} cannot be loaded with\n{_listed(fixed)}\nSet these as before, "
            "or train into another folder (RUN_DIR=..., trainer.default_local_dir=...)"
        )
    meaningful = [one for one in found if not (_is_harmless(one[0], settings) or _are_the_same_judges(*one, settings))]
    changed = changed_files(old, settings)
    found, meaningful = found + changed, meaningful + changed
    insists = config.trainer.resume_mode in ("force", "resume_path")
    if meaningful and not insists:
        raise ConfigError(
            f"{origin} holds step {step} of a run with other settings or files:\n{_listed(meaningful)}\nPut these back "
            "as they were, train into another folder (RUN_DIR=..., trainer.default_local_dir=...), or go on from that "
            "step in spite of them with trainer.resume_mode=force"
        )
    if found:
        _say(f"goes on from step {step} in {origin} with other settings or files:\n{_listed(found)}")


def _ranks(settings: dict) -> int:
    return settings["trainer"]["nnodes"] * settings["trainer"]["n_gpus_per_node"]


def _listed(found: list[Difference]) -> str:
    return "\n".join(f"  {key}: {old} -> {new}" for key, old, new in found)
