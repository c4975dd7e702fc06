"""PPO's scoring phase: policy, critic, reference and reward on a rollout, before anything is learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.guard.observers import Observers
from rlhf.ppo.batching import Minibatch
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.frozen_layers import gather_states, states_per_sequence
from rlhf.ppo.losses import importance_weights
from rlhf.ppo.masked import masked_mean
from rlhf.ppo.models import Models
from rlhf.ppo.types import Experience, MicroBatch, Rollout, gather_parts
from rlhf.reward.sources import RewardInputs, Source, scores_with_disagreement


@dataclass(frozen=True)
class Scorer:
    """Computes the experience of a rollout. `observers` score completions and have no part in the reward."""

    config: PPOConfig
    chat: ChatTokenizer
    models: Models
    reward: Source
    observers: Observers

    @torch.no_grad()
    def score(self, rollout: Rollout, minibatches: Sequence[Minibatch], gold: bool = True) -> Experience:
        """Pass this rank's micro-batches through policy, critic, reference and reward; gather results on all ranks.

        Args:
            rollout: The completions of all ranks.
            minibatches: Those of one epoch. Where it is the first epoch of learning, the ratio at its first step is
                exactly 1: the same tensors pass through the same weights.
            gold: Whether the gold reward scores these completions too.

        Raises:
            UserError: A score is not finite.
        """
        config, mask = self.config, rollout.response_mask
        lengths, sampled = rollout.lengths, rollout.sampler_logprobs
        from_sampler = config.score.policy == "sampler"
        episodes: list[int] = []
        columns: list[Tensor] = []
        parts: list[Tensor] = []
        states: dict[int, Tensor] = {}
        for batch in list(chain.from_iterable(map(Minibatch.micro_batches, minibatches))):
            batch = self.models.with_frozen_states(batch)
            tokens = self.models.token_scores(batch, config.rollout.temperature, policy=not from_sampler)
            # the reference's log-probs are placeholders for what is not computed
            columns.append(torch.stack([tokens.ref_logprobs if c is None else c for c in tokens], dim=1))
            found = self._scores(rollout, batch, batch.episodes or [minibatches[0].rows.filler], gold)
            parts.append(torch.stack(list(found.values()), dim=1)[: len(batch.episodes)])
            episodes += batch.episodes
            states |= gather_states(batch) if batch.frozen_states is not None else {}
        per_token, per_episode = gather_parts(episodes, torch.cat(columns), torch.cat(parts), lengths)
        logprobs, ref_logprobs, entropies, values = per_token
        scores, importance = dict(zip(found, per_episode)), None
        for name, one in scores.items():
            if not torch.isfinite(one).all():
                raise self._not_finite(name, one, rollout)
        if from_sampler:
            assert sampled is not None  # PPOConfig allows only samplers and options for which log-probs are reported
            logprobs, entropies = sampled, -sampled  # the mean of -log p over sampled tokens estimates the entropy
        elif sampled is not None and config.rollout.max_importance_weight is not None:
            importance = importance_weights(logprobs, sampled, mask, config.rollout.max_importance_weight)
        return Experience(
            rollout,
            logprobs,
            ref_logprobs,
            values=None if self.models.critic is None else values,
            scores=scores.pop("reward"),
            disagreement=scores.pop("disagreement", None),
            observed=scores,
            entropy=float(masked_mean(entropies, mask)),
            importance=importance,
            frozen_states=states or None,
        )

    def _scores(self, rollout: Rollout, batch: MicroBatch, episodes: Sequence[int], gold: bool) -> dict[str, Tensor]:
        """Scores of the episodes of a micro-batch, a filler's too (under ZeRO-3 every rank must make the pass),
        float32 [N] each: `reward`, with an ensemble its `disagreement`, and those of the observers."""
        states = None if batch.frozen_states is None else pad_sequence(states_per_sequence(batch), batch_first=True)
        messages = [rollout.prompts.messages[i] for i in episodes]
        responses = [rollout.completions[i].ids for i in episodes]
        rows = [rollout.prompts.ids[i] + rollout.completions[i].ids for i in episodes]
        texts, (ids, mask) = self.chat.decode_all(responses), self.chat.pad(rows, batch.input_ids.device)
        inputs = RewardInputs(messages, texts, ids, mask, states)
        scores, disagreement = scores_with_disagreement(self.reward, inputs)
        found = {"reward": scores} | ({} if disagreement is None else {"disagreement": disagreement})
        return found | (self.observers(inputs, gold) if self.observers.sources else {})

    def _not_finite(self, name: str, scores: Tensor, rollout: Rollout) -> UserError:
        worst = int((~torch.isfinite(scores)).nonzero()[0])
        prompt, answer = rollout.prompts.messages[worst][-1]["content"], rollout.completions[worst].ids
        return UserError(
            f"{name}: the score of a completion is {scores[worst]}, not a finite number",
            f"Prompt: ...{prompt[-80:]!r}; completion: {self.chat.decode(answer)[:80]!r}.",
            "Correct the reward; the last checkpoint is usable.",
        )
