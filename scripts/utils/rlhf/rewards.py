"""What PPO is rewarded for: a reward model, a Python function, or both weighted; and how an answer ends."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..lora.config import load_adapter_config
from .actor_critic import hidden_states, use_adapter
from .rollouts import Rollout, collate

REWARD_ADAPTER = "reward"
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class Scorer(Protocol):
    """A reward model: (prompt ids, answer ids) -> scores (N,)."""

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16) -> Tensor: ...


class Rewards:
    """The reward of answers: weighted scores of a model and of a function, and what ending or not ending adds."""

    def __init__(
        self,
        model: Scorer | None = None,
        function: tuple[str, RewardFunction] | None = None,
        *,
        model_weight: float = 1.0,
        function_weight: float = 1.0,
        end_bonus: float = 0.0,
        missing_end_penalty: float = 0.0,
        batch_size: int = 16,
    ) -> None:
        """
        Args:
            function: its name for messages, and the function.
            end_bonus: added where an answer ended by itself; missing_end_penalty: taken off where it did not.
        """
        self.model, self.function = model, function
        self.model_weight, self.function_weight = model_weight, function_weight
        self.end_bonus, self.missing_end_penalty = end_bonus, missing_end_penalty
        self.batch_size = batch_size

    def score(self, rollouts: Sequence[Rollout], prompt_texts: list[str]) -> None:
        """Set each rollout's score. Raises: InputError if the function fails or a score is not finite."""
        if not rollouts:
            return  # fewer held-out prompts than processes
        totals = [self.end_bonus if rollout.ended else -self.missing_end_penalty for rollout in rollouts]
        if self.model is not None:
            scores = self.model.score([(r.prompt, r.answer) for r in rollouts], self.batch_size).tolist()
            if not all(map(math.isfinite, scores)):
                raise InputError(
                    "the reward model's scores are not finite; its weights are damaged, or float16 is too narrow"
                )
            totals = [total + self.model_weight * score for total, score in zip(totals, scores, strict=True)]
        if self.function is not None:
            name, function = self.function
            scores = call_reward_function(name, function, prompt_texts, [rollout.text for rollout in rollouts])
            totals = [total + self.function_weight * score for total, score in zip(totals, scores, strict=True)]
        for rollout, total in zip(rollouts, totals, strict=True):
            rollout.score = total


def load_reward_function(spec: str) -> tuple[str, RewardFunction]:
    """The function `name` of `file.py:name`, which takes lists of prompts and answers and returns as many numbers.

    Raises: InputError if there is no such file or function, or the file cannot be run.
    """
    path, _, name = spec.rpartition(":")
    if not (path.endswith(".py") and name):
        raise InputError(f"--reward_function {spec}: need file.py:name")
    if not Path(path).is_file():
        raise InputError(f"--reward_function {spec}: there is no file {path}")
    module = _run_file(spec, path)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(
            f"--reward_function {spec}: {path} has no function {name}; it has {', '.join(functions) or 'none'}"
        )
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise InputError(f"--reward_function {spec}: it is called as {name}(prompts, answers), but {error}") from None
    return spec, function


def _run_file(spec: str, path: str) -> ModuleType:
    located = importlib.util.spec_from_file_location(f"reward_function_{Path(path).stem}", path)
    assert located is not None and located.loader is not None
    module = importlib.util.module_from_spec(located)
    sys.modules[located.name] = module  # where dataclasses look for it
    try:
        located.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--reward_function {spec}: {path} failed: {_describe(error)}") from error
    return module


def _describe(error: Exception) -> str:
    """Type, message and the last line of the user's file it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
    file = getattr(error, "filename", None) or (frames[-1].filename if frames else "")
    return f"{type(error).__name__}: {error} ({Path(str(file)).name}, line {line})"


def call_reward_function(name: str, function: RewardFunction, prompts: list[str], answers: list[str]) -> list[float]:
    """The function's rewards. Raises: InputError if it raises, or gives too few, too many, or not numbers."""
    try:
        returned: Any = function(list(prompts), list(answers))
        returned = list(returned) if inspect.isgenerator(returned) else returned
    except Exception as error:
        raise InputError(f"--reward_function {name} raised {_describe(error)}") from error
    try:
        rewards = [float(value) for value in returned]
    except (TypeError, ValueError):
        raise InputError(f"--reward_function {name} returned {returned!r:.80}; need a list of numbers") from None
    if len(rewards) != len(answers):
        raise InputError(f"--reward_function {name} returned {len(rewards)} rewards for {len(answers)} answers")
    for prompt, answer, reward in zip(prompts, answers, rewards, strict=True):
        if not math.isfinite(reward):
            raise InputError(
                f"--reward_function {name} returned {reward} for the answer {answer!r:.80} to {prompt!r:.80}"
            )
    return rewards


class BackboneReward:
    """A reward adapter on the policy's own backbone: a second reward model without a second set of weights."""

    @staticmethod
    def fits(folder: str | Path) -> bool:
        """Whether the adapter is low-rank updates and a head alone; other weights would take the backbone's place."""
        config = load_adapter_config(folder)
        return set(config.modules_to_save) <= {"score", "classifier"} and not config.trainable_token_indices

    def __init__(self, policy: Any, folder: str | Path, pad_token_id: int, device: torch.device) -> None:
        """Load the adapter and its head from a folder that rm.py wrote. Raises: InputError if it has no head."""
        import dataclasses

        from peft import LoraConfig, set_peft_model_state_dict
        from peft.utils import load_peft_weights

        weights = load_peft_weights(str(folder), device="cpu")
        heads = [name for name in weights if name.endswith("score.weight")]
        if len(heads) != 1:
            raise InputError(f"--reward_model {folder}: its adapter has no score head; pass a folder that rm.py wrote")
        head = weights.pop(heads[0])
        config: Any = LoraConfig.from_pretrained(str(folder))
        config = dataclasses.replace(config, modules_to_save=None, task_type="CAUSAL_LM", inference_mode=True)
        policy.add_adapter(REWARD_ADAPTER, config)
        set_peft_model_state_dict(policy, weights, adapter_name=REWARD_ADAPTER)
        for name, parameter in policy.named_parameters():
            if f".{REWARD_ADAPTER}." in name:
                parameter.requires_grad_(False)
        self.policy, self.pad_token_id = policy, pad_token_id
        self.head = nn.Linear(head.shape[1], 1, bias=False).requires_grad_(False)
        self.head.weight.copy_(head)
        self.head.to(device)

    @torch.no_grad()
    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16) -> Tensor:
        """Scores (N,) in float32, read at each answer's last token."""
        scores = torch.zeros(len(sequences))
        order = sorted(range(len(sequences)), key=lambda number: -sum(map(len, sequences[number])))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch, places = collate([sequences[number] for number in numbers], self.pad_token_id)
            device = self.head.weight.device
            with use_adapter(self.policy, REWARD_ADAPTER):
                hidden = hidden_states(self.policy, batch["input_ids"].to(device), batch["position_ids"].to(device))
            last = places.amax(1).to(device) + 1  # targets stand one place before their tokens
            rows = hidden[torch.arange(len(numbers), device=device), last]
            with torch.autocast(device.type, enabled=False):
                scores[numbers] = self.head(rows.float()).squeeze(1).cpu()
        return scores
