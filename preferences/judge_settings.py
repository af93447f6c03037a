"""What judges are asked, how their answers are read, and what their settings must hold."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template

from omegaconf import DictConfig

from recipe.spin.common.ray_address import joins_cluster
from recipe.spin.common.secrets import shown_address
from recipe.spin.common.settings import MODEL_LENGTH, Settings, Unusable
from recipe.spin.preferences.judge_server import SHOWN, Answer, Judge, JudgeFailed, extra_body, is_address, is_local

# As a server's address: the policy's own vLLM server, with the policy's weights or the reference's
REFERENCE = "reference"
OWN = ("policy", REFERENCE)
# What a server is asked about before a run
EXAMPLE = {"request": "user: What is 1 + 1? Answer with the number only.", "first": "2", "second": "3"}
FAULTS = {
    "": "holds none of [[A]], [[B]] and [[C]]",
    "cut": "was cut off by its length",
    "refused": "was refused",
}
VERDICT = re.compile(r"\[\[([ABC])\]\]")


# ---- Questions and answers -------------------------------------------------------------------------------------------
def read_verdict(answer: str) -> str | None:
    """The last of [[A]], [[B]] and [[C]] in an answer; None if it has none."""
    found = VERDICT.findall(answer)
    return found[-1] if found else None


def fault_of(answer: Answer) -> str:
    """Why an answer cannot be read."""
    return FAULTS[answer.fault]


def shown_content(content: str | list[dict]) -> str:
    """A message's text; models of text and images have it in parts, of which a run takes those of text alone."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def read_template(path: str) -> Template:
    """The question, with $request, $first and $second.

    Raises:
        ValueError: when the file is missing or lacks one of them.
    """
    key = f"algorithm.judge.prompt={path!r}"
    try:
        template = Template(Path(path).read_text())
    except (OSError, ValueError) as error:  # of its text, and its name
        raise ValueError(f"{key}: cannot be read ({error}); name a text file") from error
    names = {match["named"] or match["braced"] for match in template.pattern.finditer(template.template)} - {None}
    if names != EXAMPLE.keys() or not template.is_valid():
        raise ValueError(
            f"{key}: must hold $request, $first and $second, and no other $name; it holds {sorted(names)}. Write $$ "
            "for a dollar sign"
        )
    return template


# ---- Settings --------------------------------------------------------------------------------------------------------
def models(settings: DictConfig) -> list[str | None]:
    """The model to ask for at each server; None takes the first that it serves."""
    return _for_each_server(settings.models, settings)


def key_variables(settings: DictConfig) -> list[str | None]:
    """The environment variable that holds the key to each server; None sends it no key."""
    return _for_each_server(settings.api_key_env, settings)


def _for_each_server(given: str | list[str | None] | None, settings: DictConfig) -> list[str | None]:
    return [given] * len(settings.servers) if given is None or isinstance(given, str) else list(given)


def judges(settings: DictConfig) -> list[Judge]:
    """Those that `algorithm.judge` names."""
    return list(map(Judge, settings.servers, models(settings), key_variables(settings)))


def check_settings(settings: DictConfig) -> None:
    """Raises ValueError where judges and models do not fit together."""
    servers = list(settings.servers)
    shown = list(map(shown_address, servers))
    if not all(address in OWN or is_address(address) for address in servers):
        raise ValueError(
            f"algorithm.judge.servers={shown!r}: give addresses such as http://127.0.0.1:8000/v1, or policy or "
            "reference for the policy's own vLLM server with the weights of either"
        )
    if set(OWN) <= set(servers):
        raise ValueError(
            f"algorithm.judge.servers={shown!r}: the policy's own vLLM server has one model's weights at a time; "
            "name policy or reference"
        )
    try:
        json.dumps(extra_body(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"algorithm.judge.extra_body: cannot be sent as JSON ({error}); correct it") from error
    if len(models(settings)) != len(servers):
        raise ValueError(f"algorithm.judge.models={settings.models!r}: give one name, a name a server, or null")
    if len(key_variables(settings)) != len(servers):
        raise ValueError(
            f"algorithm.judge.api_key_env={settings.api_key_env!r}: give one name, a name or null a server, or null"
        )


def warn_of_loopback(config: DictConfig) -> None:
    """Says where workers on several machines would each ask a judge of their own machine."""
    alone = [shown_address(address) for address in config.algorithm.judge.servers if is_local(address)]
    if alone and joins_cluster(config):
        sys.stderr.write(
            f"[spin] warning: algorithm.judge.servers: {', '.join(alone)} is the machine itself to each machine of the "
            "Ray cluster, whose workers all ask: unless a judge listens on each, name its machine by an address that "
            "they reach\n"
        )


def check_answer(answer: Answer, judge: Judge, settings: DictConfig) -> None:
    """Looks at the answer to a question that any judge can answer.

    Raises:
        JudgeFailed: when a limit of its length cut it off: the answers to harder ones will be no shorter.
    """
    if not answer.fault and read_verdict(answer.text):
        return
    said = f"judge {shown_address(judge.address)}: its answer to a trial question {fault_of(answer)}: "
    said += repr(answer.text[:SHOWN])
    if answer.fault == "cut" and settings.max_unreadable < 1:
        raise JudgeFailed(
            f"{said}; raise algorithm.judge.max_tokens={settings.max_tokens}, have it reason less "
            "(algorithm.judge.extra_body), or let all answers be unreadable (algorithm.judge.max_unreadable=1.0)"
        )
    sys.stderr.write(
        f"[spin] warning: {said}; such answers count as ties, and above algorithm.judge.max_unreadable="
        f"{settings.max_unreadable} of them the run stops. Ask for a verdict in algorithm.judge.prompt\n"
    )


def cost(config: DictConfig, compares_held_out: bool) -> str:
    """In words, the questions that a step asks at most, and a validation where held-out answers are compared."""
    settings, n, steps = config.algorithm.judge, config.actor_rollout_ref.rollout.n, config.trainer.total_training_steps
    prompts, servers = config.data.train_batch_size, len(settings.servers)
    a_prompt = 2 * servers * (n - 1 if settings.comparisons == "tournament" else n * (n - 1) // 2)
    said = f"judges are asked up to {prompts * a_prompt:,} questions a step ({prompts} prompts, {a_prompt} each)"
    said += f", {steps * prompts * a_prompt:,} in {steps} steps" if steps else ""
    if config.algorithm.filter_groups.enable:
        said += ", as many again for each batch of prompts that dynamic sampling adds"
    if compares_held_out:
        said += f"; and up to {2 * servers} a held-out prompt at each validation after the first"
    return said


def check_step_limit(config: DictConfig) -> None:
    """Raises ValueError where a step's comparisons have a time limit and do not come together."""
    limit = config.algorithm.judge.step_timeout_s
    if limit is not None and config.trainer.v1.trainer_mode != "sync":
        raise ValueError(
            f"algorithm.judge.step_timeout_s={limit}: with asynchronous generation the comparisons of a step's prompts "
            "are spread over several steps; leave it null, algorithm.judge.timeout_s limits each call"
        )


def check_length(settings: Settings, prompt_length: Callable[[list[dict]], int | None]) -> None:
    """Notes a fault when the policy's own vLLM server has no room for a question about two long responses."""
    length = settings[MODEL_LENGTH]
    if length is None:
        return
    try:
        template = read_template(settings["algorithm.judge.prompt"])
    except ValueError as error:  # JudgeSource.check says which
        raise Unusable("algorithm.judge.prompt") from error
    question = prompt_length([{"role": "user", "content": template.substitute(dict.fromkeys(EXAMPLE, ""))}])
    if question is None:
        return
    tokens = settings["data.max_prompt_length"] + 2 * settings["data.max_response_length"]
    tokens += settings["algorithm.judge.max_tokens"] + question
    settings.require(
        tokens <= length,
        MODEL_LENGTH,
        f"as its own judge the policy reads and writes up to {tokens} tokens; raise it, or lower "
        "algorithm.judge.max_tokens",
    )
