"""The first half of a step: questions are drawn, completions sampled, rewards computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from cppo.model.prompts import EncodedQuestion, collate
from cppo.ops.advantages import questions_needed
from cppo.rollouts.rollout import Rollouts, merge, sample_completions, sampling_of
from cppo.seeds import seed_from
from cppo.train.draws import QuestionDraws
from cppo.train.engine import PolicyEngine
from cppo.train.journal import Journal, Once, now
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.progress import PhaseTimer
from cppo.train.scoring import RewardFunction, Scores, merge_scores, score
from cppo.train.selection import select_completions


class Collector:
    """Collects the scored completions of a step from the current policy.

    Args:
        engine: samples.
        rewards: the reward functions, as many as `config.reward_weights`.
        say: prints a line.
    """

    def __init__(
        self,
        policy: Policy,
        engine: PolicyEngine,
        questions: QuestionDraws,
        rewards: Sequence[RewardFunction],
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        self._policy, self._config, self._engine = policy, policy.config, engine
        self._questions, self._rewards = questions, rewards
        self._processes, self._say = processes, say
        self._per_step = self._questions_per_step()

    def _questions_per_step(self) -> int:
        """Questions that each process draws; a surplus is cut off again after pruning."""
        questions = self._config.questions_per_step(self._processes.size)
        return self._processes.share("questions", questions)

    @property
    def _sampling(self) -> dict[str, Any]:
        """How completions are drawn: arguments of `sampling_of`."""
        config = self._config
        return {
            "group_size": config.group_size,
            "max_new_tokens": config.max_completion_tokens,
            "temperature": config.loss.temperature,
            "suppressed": self._policy.suppressed,
        }

    @property
    def _may_refill(self) -> bool:
        """Whether a step may draw questions in place of those that are dropped."""
        config = self._config
        drops = config.drop_zero_variance or config.group_top_p is not None
        return drops and config.dynamic_allocation and config.max_refills > 0

    def collect(self, step: int, journal: Journal, timer: PhaseTimer) -> tuple[Rollouts, Scores]:
        """Rollouts with their rewards, and more of them for the groups that `_missing` counts.

        Args:
            step: steps of the run that are finished.
        """
        rollouts: list[Rollouts] = []
        scores: list[Scores] = []
        once = journal.once_breakable
        if self._config.ahead:
            with timer("rollout"):
                once(self._engine.wait)  # `prepare` waits as well, but no signal breaks that off
        if self._engine.holds_weights:
            with timer("sync"):
                self._engine.prepare()
        count = self._per_step
        while count:
            with timer("rollout"):
                rollouts.append(self.sample(self.draw(count), once))
                if not self._may_refill:
                    self._sample_ahead(step + 1)
            with timer("reward"):
                call = functools.partial(self._scored, rollouts[-1], step)
                scores.append(Scores(**once(call)))
            rewards = torch.cat([part.total for part in scores])
            lengths = torch.cat([part.lengths for part in rollouts])
            count = self._missing(rewards, lengths, step, len(scores) - 1)
        if self._may_refill:  # which questions come next is known only now
            self._sample_ahead(step + 1)
        self._engine.sleep()
        return merge(rollouts), merge_scores(scores)

    def _sample_ahead(self, step: int) -> None:
        """Sends the questions of a step to the engine, which goes on while the one before trains.

        Args:
            step: of the run, for the seed.
        """
        policy, config = self._policy, self._config
        if not config.ahead or step == config.steps():
            return
        prompts = collate(policy.model, self._questions.look_ahead(self._per_step))
        sampling = sampling_of(policy.model, policy.processor, **self._sampling)
        seed = seed_from(config.seed, "ahead", step, self._processes.rank)
        self._engine.sample_ahead(prompts, sampling, seed)

    def draw(self, count: int | None = None) -> list[EncodedQuestion]:
        """This process's next questions; None: as many as a step begins with."""
        return self._questions.draw(self._per_step if count is None else count)

    def sample(self, questions: Sequence[EncodedQuestion], once: Once = now) -> Rollouts:
        """`group_size` completions of each question, of an engine that is prepared."""
        policy, config = self._policy, self._config
        with policy.autocast():
            return sample_completions(
                policy.model,
                policy.processor,
                collate(policy.model, questions),
                **self._sampling,
                batch_size=config.generation_batch_size,
                engine=self._engine,
                once=once,
            )

    def _scored(self, rollouts: Rollouts, step: int) -> dict[str, Any]:
        """The fields of `Scores` as a dict, because a checkpoint holds no class of ours."""
        config = self._config
        assert config.reward_weights is not None
        return score(
            self._rewards,
            config.reward_weights,
            rollouts,
            state=TrainerState(global_step=step, max_steps=config.steps()),
            timeout=config.reward_timeout,
            retries=config.reward_retries,
            say=self._say,
        )._asdict()

    def _missing(self, rewards: Tensor, lengths: Tensor, step: int, refills: int) -> int:
        """Questions that every process should draw in place of those that are dropped."""
        config = self._config
        if not self._may_refill:
            return 0
        (everyones, lengths), _ = self._processes.joined(rewards, lengths)
        kept = len(select_completions(everyones, config, step, lengths)[1])
        lacking = max(0, config.batch_size - kept)
        missing = questions_needed(lacking, config.group_size, config.prune_rate)
        if missing and refills == config.max_refills:
            self._say(
                f"step {step + 1}: {kept} of {config.batch_size} completions after "
                f"{refills} refills ({len(everyones) // config.group_size} questions): most "
                "groups have equal rewards or are below group_top_p; use easier or harder "
                "questions, or raise max_refills"
            )
            return 0
        return math.ceil(missing / self._processes.size)
