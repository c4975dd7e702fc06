"""Stage 3: PPO against a reward, with a KL penalty to the policy that it starts from.

One update is `PPO.update`: prompts -> rollout -> scores, reference and values -> KL-shaped rewards -> advantages ->
minibatch updates. Each phase takes and returns a frozen value of `rlhf.ppo.types`; the mathematics is in
`rlhf.ppo.kl`, `rlhf.ppo.advantages` and `rlhf.ppo.losses`, the minibatches in `rlhf.ppo.learner`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.config.base import DataConfig
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError
from rlhf.data.chat import ChatTokenizer, load_tokenizer
from rlhf.data.tables import longest_prompt, open_all, tokenize
from rlhf.memory.peak import PeakMemory
from rlhf.models.load import count_parameters, load_hf_config, load_policy, recompute_activations, sequence_limit
from rlhf.models.merging import adapters_merged
from rlhf.models.save import save_result
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.ppo import kl
from rlhf.ppo.actor_critic import ActorCritic, adapters_off, compile_layers
from rlhf.ppo.batching import (
    Batcher,
    RankBatches,
    endless,
    episode_batcher,
    gather_completions,
    gather_tokens,
    permutation,
    plan_minibatches,
)
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.frozen_layers import gather_states, rows_of
from rlhf.ppo.learner import Learner, PtxBatches
from rlhf.ppo.losses import explained_variance, importance_weights
from rlhf.ppo.masked import masked_mean, masked_sum
from rlhf.ppo.metrics import Clock, PPOReporter, RunningMeanStd
from rlhf.ppo.packing import packs
from rlhf.ppo.shared_base import load_shared, save_critic
from rlhf.ppo.types import Experience, MicroBatch, Prompts, Rollout
from rlhf.reward.sources import RewardContext, RewardInputs
from rlhf.rollout.types import SamplingParams, stream_seed
from rlhf.runs.checkpoint import rng_state, seed_everything, set_rng_state
from rlhf.runs.run import Run, check_same_text, data_facts, finish, open_run, parent_facts, resolve_model_path
from rlhf.training.engine import Engine, make_engine, rate_scale

KINDS = ("prompt", "demonstration", "ranking")
TRAIN, EVAL, ORDER, EPOCH, PTX = range(5)
"""Purposes of random streams, so that no two draw the same numbers."""


def run(config: PPOConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Run the stage: set up or resume, `config.updates` updates, the policy saved in the run's model folder."""
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    PPO(config, resume, overwrite).train()


class PPO:
    """The stage: models in one engine, reward, tables, and what changes from update to update."""

    def __init__(self, config: PPOConfig, resume: bool, overwrite: bool) -> None:
        self.config = config
        seed_everything(config.seed)
        path = resolve_model_path(config.model.path)
        self.chat = load_tokenizer(config.model, path)
        limit = sequence_limit(config.model, load_hf_config(config.model, path))
        self.run = open_ppo_run(config, self.chat, resume, overwrite)
        self.memory = PeakMemory()
        self.shared, rewards = None, {}
        if config.model.sharing == "shared":
            self.shared = shared = load_shared(config, self.chat)
            self.engine, self.reference, rewards = shared.engine, shared.reference, shared.scorers
        else:
            self.engine, self.reference = load_models(config, self.chat, path)
        self.vocab_size = load_hf_config(config.model, path).get_text_config().vocab_size
        self.packed = packs(self.engine, self.reference, self.vocab_size, config.batch.packing)
        self.reward = config.reward(RewardContext(config.model, self.chat, self.engine.freeze, rewards))
        room = min(config.data.max_prompt_tokens, limit - config.rollout.max_new_tokens)
        if room < 1:
            raise UserError(f"rollout.max_new_tokens leaves no room for a prompt in the model's {limit} tokens")
        prompts = DataConfig(train=config.data.prompts, eval=config.data.eval)
        self.tables = tokenize(self.run.path, self.chat, room, prompts, "prompt", KINDS, "prompts")
        self.learner = Learner(self.engine, config, self._ptx(limit))
        self.controller = config.kl.controller()
        self.moments = RunningMeanStd()
        self.done = 0
        self.checkpoints = self.run.checkpoints(config.checkpoints.keep)
        if resume:
            self._resume()
        self.reporter = PPOReporter(config, self.run, self.done)

    def _ptx(self, limit: int) -> PtxBatches | None:
        if not self.config.data.ptx:
            return None
        table = tokenize(
            self.run.path, self.chat, limit, DataConfig(train=self.config.data.ptx), "demonstration", KINDS[1:], "ptx"
        )
        rows = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in table.train]
        batcher = Batcher(rows, self.chat.pad_id, self.vocab_size, self.packed)
        return PtxBatches(batcher, self.config.loss.ptx_batch_size, (self.config.seed, PTX))

    def train(self) -> None:
        """All updates that are left, with evaluations and checkpoints between them; then the result."""
        config = self.config
        if self.done == 0:
            self.evaluate(0)
        while self.done < config.updates:
            figures = self.update(self.done)
            self.done += 1
            self.reporter.update(self.done, figures)
            last = self.done == config.updates
            if self.done % config.eval.every == 0 or last:
                self.evaluate(self.done)
            if self.done % config.checkpoints.every == 0 or last:
                self.save()
        save_result(self.run.path, self.engine.module.policy, self.chat, config.tuning)
        if self.shared is not None:
            save_critic(self.run.path, self.engine.module)
        finish(self.run, metrics=self.reporter.headline())
        self.reporter.close()
        self.memory.report(config, longest_prompt(self.tables.train))

    # ---- one update ----------------------------------------------------------------------------------------------

    def update(self, number: int) -> dict[str, float]:
        """One round of rollout and learning; gives the figures that are logged."""
        config, clock = self.config, Clock()
        # 1. prompts
        prompts = self.draw(number)
        # 2. sync the sampler and roll out: one that holds a copy of the weights takes the new ones when it is called
        with clock("rollout"):
            rollout = self.rollout(prompts)
        # 3. policy, reference, values and scores, in the very batches that the first epoch trains on: the ratio of
        # the first minibatch is exactly 1
        plans = [self.plan(rollout, number, epoch) for epoch in range(config.batch.epochs)]
        batcher = episode_batcher(rollout, self.chat.pad_id, self.vocab_size, self.packed)
        with clock("score"):
            experience = self.score(rollout, batcher, plans[0])
        # 4. rewards: the score at the last token, the KL penalty at every token
        mask, coef = rollout.response_mask, self.controller.coef
        penalty = config.kl.estimator(experience.logprobs, experience.ref_logprobs)
        scores = self.shape_scores(experience)
        rewards = kl.shape_rewards(scores, penalty, mask, coef, scale=config.shaping.whiten_rewards)
        # 5. advantages and returns
        advantages = config.advantage(rewards, experience.values, mask, prompts.groups)
        # 6. minibatch updates
        warmup = math.ceil(config.optimizer.warmup * config.updates)
        rate = rate_scale(config.optimizer.schedule, number, config.updates, warmup, first=1)
        with clock("learn"):
            learned = self.learner.learn(experience, advantages, batcher.over(experience.trunk), plans, number, rate)
        figures = describe(experience, scores, rewards, advantages.returns)
        self.controller.update(figures["objective/kl"], len(mask))
        return (
            figures
            | {"objective/kl_coef": coef, "optimizer/lr": rate * config.optimizer.policy_lr}
            | learned
            | clock.figures(rollout)
        )

    def draw(self, number: int) -> Prompts:
        """Phase 1: the table in a new random order each pass. Follows from seed and number, so it needs no state."""
        count, table = self.config.rollout.prompts_per_update, self.tables.train
        rows = endless(len(table), number * count, count, self.config.seed, ORDER)
        return self._prompts(table, rows, self.config.rollout.samples_per_prompt, TRAIN, number)

    def _prompts(self, table: Any, rows: Sequence[int], answers: int, purpose: int, number: int) -> Prompts:
        found = [table[row] for row in rows for _ in range(answers)]
        return Prompts(
            ids=[row["prompt"] for row in found],
            messages=[json.loads(row["messages"]) for row in found],
            groups=torch.arange(len(rows)).repeat_interleave(answers),
            seeds=[stream_seed(self.config.seed, purpose, number, episode) for episode in range(len(found))],
        )

    def rollout(self, prompts: Prompts) -> Rollout:
        """Phase 2: each rank answers a block of the prompts; then all ranks hold all answers."""
        c, policy = self.config.rollout, self.engine.module.policy
        sampling = SamplingParams(
            c.max_new_tokens, c.min_new_tokens, c.temperature, c.top_k, c.top_p, tuple(c.stop), c.batch_size
        )
        mine = torch.arange(len(prompts.ids)).tensor_split(distributed.world_size())[distributed.rank()].tolist()
        merged = adapters_merged(policy) if c.merge_adapters else nullcontext()
        with self.engine.gathered(policy), merged, torch.compiler.set_stance("force_eager"):
            ids, seeds = [prompts.ids[i] for i in mine], [prompts.seeds[i] for i in mine]
            answers = c.sampler(policy, ids, seeds, sampling, self.chat)
        return Rollout(prompts, gather_completions(answers, mine[0] if mine else 0))

    def plan(self, rollout: Rollout, number: int, epoch: int) -> list[RankBatches]:
        """The minibatches of one epoch, shared out over the ranks."""
        order = permutation(len(rollout.answers), self.config.seed, EPOCH, number, epoch)
        batch = self.config.batch
        return plan_minibatches(rollout.totals, order, batch.minibatches, batch.micro_batch_tokens, self.packed)

    @torch.no_grad()
    def score(self, rollout: Rollout, batcher: Batcher, plan: list[RankBatches]) -> Experience:
        """Phase 3: this rank's share of the passes through policy, critic, reference and reward; then gathered."""
        temperature, module = self.config.rollout.temperature, self.engine.module
        episodes: list[int] = []
        columns: list[Tensor] = []
        scores: list[Tensor] = []
        trunk: dict[int, Tensor] = {}
        for batch in (batch for share in plan for batch in batcher.share(share)):
            if self.shared is not None:
                batch = self.shared.prepared(batch)
            mine = self.engine(batch, temperature)
            if self.reference is not None:
                reference = self.reference(batch, temperature)
            else:
                with adapters_off(module.policy):
                    reference = self.engine(batch, temperature)
            values = mine.logprobs if mine.values is None else mine.values
            columns.append(torch.stack([mine.logprobs, reference.logprobs, values, mine.entropies], dim=1))
            scores.append(self._rewards(rollout, batcher, batch)[: len(batch.rows)])
            episodes += batch.rows
            trunk |= gather_states(batch) if batch.trunk is not None else {}
        tokens = gather_tokens(torch.cat(columns), episodes, rollout.lengths)
        order = distributed.all_gather_rows(
            torch.tensor(episodes, dtype=torch.int64, device=distributed.device())
        ).cpu()
        found = distributed.all_gather_rows(torch.cat(scores).to(distributed.device())).cpu()
        values = tokens[2] if module.critic is not None else None
        entropy = float(masked_mean(tokens[3], rollout.response_mask))
        most, sampled = self.config.rollout.max_importance_weight, rollout.sampler_logprobs
        importance = None
        if most is not None and sampled is not None:
            importance = importance_weights(tokens[0], sampled, rollout.response_mask, most)
        scored = torch.zeros_like(found).index_copy(0, order, found)
        return Experience(rollout, tokens[0], tokens[1], values, scored, entropy, importance, trunk or None)

    def _rewards(self, rollout: Rollout, batcher: Batcher, batch: MicroBatch) -> Tensor:
        rows = batch.rows or [0]  # a filler: under ZeRO-3 every rank calls the reward model alike
        answers = [self.chat.decode(rollout.answers[i].ids) for i in rows]
        messages = [rollout.prompts.messages[i] for i in rows]
        states = None if batch.trunk is None else pad_sequence(rows_of(batch), batch_first=True)
        scores: Tensor = self.reward(RewardInputs(messages, answers, *batcher.padded(batch.rows), states))
        if not torch.isfinite(scores).all():
            worst = int((~torch.isfinite(scores)).nonzero()[0])
            raise UserError(
                f"reward: the score of an answer is {scores[worst]}, not a finite number",
                f"Prompt: ...{messages[worst][-1]['content'][-80:]!r}; the answer is {answers[worst][:80]!r}.",
                "Mend the reward; the last checkpoint is usable.",
            )
        return scores

    def shape_scores(self, experience: Experience) -> Tensor:
        """Scores normalised and clipped, with the rule for answers that did not end. float32 [N]."""
        rule, scale = self.config.shaping, RunningMeanStd()
        if rule.normalize_scores:
            scale = self.moments = self.moments.add(experience.scores)
        ended = experience.rollout.ended
        return kl.shape_scores(
            experience.scores,
            ended,
            mean=scale.mean,
            std=scale.std,
            clip=rule.clip_score,
            missing_eos=rule.missing_eos,
        )

    def evaluate(self, number: int) -> None:
        """Answer and score held-out prompts, with the same random streams every time; write them to samples.jsonl."""
        table = self.tables.eval
        rows = range(min(self.config.eval.prompts, len(table)))
        if not rows:
            return
        rollout = self.rollout(self._prompts(table, rows, 1, EVAL, 0))
        batcher = episode_batcher(rollout, self.chat.pad_id, self.vocab_size, self.packed)
        plan = plan_minibatches(rollout.totals, list(rows), 1, self.config.batch.micro_batch_tokens, self.packed)
        self.reporter.evaluation(number, self.score(rollout, batcher, plan), self.chat)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Everything to continue exactly: weights, optimizer, KL coefficient, score moments, random generators."""
        with self.checkpoints.write(self.done) as folder:
            self.engine.save(folder)
            torch.save(rng_state(), folder / f"rng-{distributed.rank()}.pt")
            if is_main():
                state = {"done": self.done, "controller": self.controller.state_dict(), "moments": vars(self.moments)}
                (folder / "ppo.json").write_text(json.dumps(state), "utf-8")

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        if newest is None:
            say(f"No checkpoint in {self.checkpoints.folder}: starting from the beginning")
            self.run.rewind(-1)
            return
        step, folder = newest
        self.engine.load(folder)
        state = json.loads((folder / "ppo.json").read_text("utf-8"))
        self.done = state["done"]
        self.controller.load_state_dict(state["controller"])
        self.moments = RunningMeanStd(**state["moments"])
        set_rng_state(torch.load(folder / f"rng-{distributed.rank()}.pt", weights_only=True))
        self.run.rewind(step)
        say(f"Continuing after update {step}")


# ---- set-up ------------------------------------------------------------------------------------------------------


def open_ppo_run(config: PPOConfig, chat: ChatTokenizer, resume: bool, overwrite: bool) -> Run:
    """The run folder, with parents and data noted; refuses a reward model of other tokens."""
    data = [*open_all(config.data.prompts, KINDS, "data.prompts"), *open_all(config.data.ptx, KINDS[1:], "data.ptx")]
    if config.needs_critic and config.critic.init == "reward":
        check_same_text("the policy", chat.fingerprints(), str(config.reward_model))
    parents = [parent_facts(path) for path in (config.model.path, config.reward_model) if path]
    return open_run(
        config, "ppo", resume, overwrite, {"parents": parents, "data": data_facts(data), **chat.fingerprints()}
    )


def load_models(config: PPOConfig, chat: ChatTokenizer, path: str) -> tuple[Engine, Any]:
    """Policy and critic in one engine, and the frozen reference (None where the policy without adapters serves)."""
    policy = config.tuning(load_policy(config.model, path), chat, "causal")
    critic: ScalarModel | None = None
    if config.needs_critic:
        start = resolve_model_path(str(config.reward_model)) if config.critic.init == "reward" else path
        critic = load_scalar(config.model, start, head="small")
        critic.model = config.critic.tuning(critic.model, chat, "scalar")
    if config.gradient_checkpointing:
        for part in [policy] if critic is None else [policy, critic.model]:
            recompute_activations(part, use_reentrant=False)
            part.train()  # transformers recomputes in training mode alone; it changes nothing else, dropout is off
    rates = ((policy, config.optimizer.policy_lr), (critic, config.optimizer.critic_lr))
    groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": lr} for m, lr in rates if m is not None]
    module = ActorCritic(policy, critic)
    if config.compile:
        compile_layers(module)
    trained, total = count_parameters(module)
    say(f"Policy{' and critic' if critic else ', no critic'}: {trained:,} of {total:,} parameters are trained")
    engine = make_engine(module, groups, config.optimizer, config.precision, config.deepspeed)
    if config.tuning.row.traits["adapter"]:
        return engine, None
    return engine, engine.freeze(ActorCritic(load_policy(config.model, path), None))


def describe(experience: Experience, scores: Tensor, rewards: Tensor, returns: Tensor | None) -> dict[str, float]:
    """Figures of one update's experience: scores, KL per answer (nats), lengths, ends, explained variance."""
    mask, lengths = experience.rollout.response_mask, experience.rollout.lengths.float()
    pair = (experience.logprobs, experience.ref_logprobs)
    figures = {
        "objective/scores": float(experience.scores.mean()),
        "objective/scores_std": float(experience.scores.std(correction=0)),
        "objective/shaped_scores": float(scores.mean()),
        "objective/rlhf_reward": float(masked_sum(rewards, mask)) / len(mask),
        "objective/kl": float(masked_sum(kl.k1(*pair), mask)) / len(mask),
        "objective/kl_k3": float(masked_sum(kl.k3(*pair), mask)) / len(mask),
        "objective/entropy": experience.entropy,
        "rollout/response_length": float(lengths.mean()),
        "rollout/eos_rate": float(experience.rollout.ended.float().mean()),
    }
    if (importance := experience.importance) is not None:
        figures |= {
            "rollout/sampler_gap_mean": float(importance.gap_mean),
            "rollout/sampler_gap_max": float(importance.gap_max),
            "rollout/importance_truncated": float(importance.truncated),
        }
    if experience.values is not None and returns is not None:
        explained = float(explained_variance(experience.values, returns, mask))
        figures["val/explained_variance"] = explained if explained == explained else 0.0  # returns without variance
    return figures


if __name__ == "__main__":
    main("ppo")
