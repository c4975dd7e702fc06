"""Stage 3: PPO against a reward, with a KL penalty to the policy that it starts from.

One update is `PPO.update`: prompts -> rollout -> scores, reference and values -> KL-shaped rewards -> advantages ->
minibatch updates. Each phase takes and returns a frozen value of `rlhf.ppo.types`; the mathematics is in `rlhf.ppo.kl`,
`rlhf.ppo.advantages` and `rlhf.ppo.losses`, the optimizer steps in `rlhf.ppo.learner`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.config.base import DataConfig
from rlhf.core.console import is_main, say
from rlhf.core.errors import Terminated, UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.selection import open_datasets
from rlhf.data.tables import prompt_lengths, tokenize
from rlhf.guard.guard import Guard
from rlhf.guard.observers import Observers, outside_range, score_range
from rlhf.guard.perturbed import Perturber
from rlhf.memory.peak import PeakMemory
from rlhf.models.load import load_hf_config, sequence_limit
from rlhf.ppo import kl
from rlhf.ppo.batching import Minibatches, TokenRows
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.learner import Learner, PtxBatches
from rlhf.ppo.metrics import PPOReporter, experience_metrics, peak_memory_gb
from rlhf.ppo.models import can_pack, check_vocabularies, load_separate, most_virtual_tokens
from rlhf.ppo.scoring import Scorer
from rlhf.ppo.shared_base import load_shared
from rlhf.ppo.types import (
    Experience,
    Prompts,
    Rollout,
    gather_completions,
)
from rlhf.replay import record
from rlhf.replay.record import UpdateRecord
from rlhf.replay.tokens import token_records
from rlhf.reward.sources import RewardContext, model_terms, own_chats
from rlhf.rollout import samplers
from rlhf.rollout.kv_cache import check_family
from rlhf.rollout.streams import endless, permutation, stream_seeds
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.runs.parents import check_same_text, parent_facts, resolve_model_path, template_time
from rlhf.runs.random_state import load_rng, save_rng, seed_everything
from rlhf.runs.run import Run, data_facts, finish, open_run
from rlhf.runs.sigterm import sigterm_noted
from rlhf.training.schedule import lr_scale
from rlhf.tuning.merging import adapters_merged
from rlhf.tuning.methods import virtual_tokens
from rlhf.tuning.virtual_tokens import check_scores

KINDS = ("prompt", "demonstration", "ranking")
TRAIN, EVAL, ORDER, EPOCH, PTX = range(5)
"""Purposes of random streams, so that no two draw the same numbers."""


def run(config: PPOConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Run the stage: set up or resume, `config.updates` updates, the policy saved in the run's model folder."""
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    PPO(config, resume, overwrite).train()


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] = self._now() - start

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """Seconds and tokens/s of each phase (completion tokens in the rollout, else all), peak memory in GB."""
        sampled = int(rollout.lengths.sum())
        whole = sum(map(len, rollout.prompts.ids)) + sampled
        tokens = {phase: sampled if phase == "rollout" else whole for phase in self.seconds}
        metrics = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        metrics |= {f"throughput/{p}": tokens[p] / max(s, 1e-9) for p, s in self.seconds.items()}
        return metrics | {"memory/peak_gb": peak_memory_gb()}


class PPO:
    """Holds the models, the reward source, tokenised tables, and the state that changes with each update."""

    def __init__(self, config: PPOConfig, resume: bool, overwrite: bool) -> None:
        self.config, self.rank, self.ranks = config, distributed.rank(), distributed.world_size()
        seed_everything(config.seed)
        path = resolve_model_path(config.model.path)
        frozen_at = template_time(config, resume)
        self.chat = load_tokenizer(config.model, path, frozen_at)
        own: dict[str, ChatTokenizer] = {}
        for pick in (config.reward, *config.onlookers.values()):
            own |= own_chats(pick, config.model, frozen_at)
        model_config = load_hf_config(config.model, path)
        limit = sequence_limit(config.model, model_config) - most_virtual_tokens(config)
        self.vocab_size = model_config.get_text_config().vocab_size
        check_family(model_config)
        if config.needs_critic and virtual_tokens(config.critic.tuning):
            check_scores(config.critic.tuning.name, model_config, "scalar")
        check_vocabularies(config, self.chat)
        self.run = open_ppo_run(config, self.chat, own, resume, overwrite)
        self.memory = PeakMemory()
        load = load_shared if config.model.sharing == "shared" else load_separate
        self.models = load(config, self.chat)
        context = RewardContext(config.model, self.chat, self.models.engine.freeze, self.models.scorers, own)
        reward, observers = config.reward(context), Observers(config.onlookers, context)
        self.scorer = Scorer(config, self.chat, self.models, reward, observers)
        self.guard, self.score_range = Guard(config.guard), score_range(config.reward)
        self.perturber = Perturber(config.guard.perturb, reward, self.chat, limit, config.batch.micro_batch_tokens)
        room = min(config.data.max_prompt_tokens, limit - config.rollout.max_new_tokens)
        if room < 1:
            raise UserError(f"rollout.max_new_tokens leaves no room for a prompt in the model's {limit} tokens")
        longest = limit if config.data.ptx else room + config.rollout.max_new_tokens
        self.packed = can_pack(self.models, self.vocab_size, longest, config.batch.packing)
        prompts = DataConfig(train=config.data.prompts, eval=config.data.eval)
        others = list(own.values())
        self.tables = tokenize(self.run.path, self.chat, room, prompts, "prompt", KINDS, "prompts", others)
        self.learner = Learner(self.models.engine, config, self._ptx(limit))
        self.kl_controller = config.kl.controller()
        self.score_stats = kl.RunningMeanStd()
        """Of all scores so far; stays empty unless scores are normalised."""
        self.done = 0
        self.ahead: Callable[[], Rollout] | None = None
        """Waits for the rollout of the next update, if that has been started."""
        self.checkpoints = self.run.checkpoints(config.checkpoints.keep)
        evaluations = self._resume() if resume else []
        self.reporter = PPOReporter(config, self.run, self.done, evaluations)

    def _ptx(self, limit: int) -> PtxBatches | None:
        if not self.config.data.ptx:
            return None
        data = DataConfig(train=self.config.data.ptx)
        table = tokenize(self.run.path, self.chat, limit, data, "demonstration", KINDS[1:], "ptx").train
        rows = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in table]
        token_rows = TokenRows(rows, self.chat.pad_id, self.packed)
        return PtxBatches(token_rows, self.config.loss.ptx_batch_size, (self.config.seed, PTX))

    def train(self) -> None:
        """All remaining updates, with evaluations and checkpoints between them; then the result.

        Raises:
            Terminated: SIGTERM was received; the update was finished and a checkpoint written.
        """
        config = self.config
        if self.done == 0:
            self.evaluate()
        with sigterm_noted() as ended:
            while self.done < config.updates and self.guard.end is None:
                metrics = self.update(self.done)
                self.done += 1
                self.reporter.update(self.done, metrics)
                self.reporter.alarms(self.guard.observe(self.done, metrics))
                last = self.done == config.updates or self.guard.end is not None
                if self.done % config.eval.every == 0 or last:
                    self.evaluate()
                end = not last and ended()
                if self.done % config.checkpoints.every == 0 or last or end:
                    self.save()
                if end:
                    raise Terminated(f"Update {self.done:,} is in a checkpoint.")
        facts = self.take_result()
        self.models.save(self.run.path, self.chat, config)
        finish(self.run, metrics=self.reporter.headline(), peak_memory=self.memory.measured(), **facts)
        self.reporter.close()
        self.memory.report(config, *prompt_lengths(self.tables.train))

    def take_result(self) -> dict[str, Any]:
        """If the guard has ended the run, load the policy that it chose, and say so. Returns facts for run.json."""
        end, step = self.guard.end, self.done
        if end is None:
            return {}
        if end.action == "best-checkpoint" and self.guard.best not in (None, self.done):
            step = self.guard.best
            self.models.engine.load(self.checkpoints.check(step), optimizer=False)
        say(f"The guard ended the run after update {self.done:,} ({end.rule}); the result is the policy of {step:,}")
        return {"step": step, "ended_by": end.as_event()}

    # ---- one update ----------------------------------------------------------------------------------------------

    def update(self, index: int) -> dict[str, float]:
        """One update: rollout and learning. Returns the metrics that are logged."""
        config, clock = self.config, Clock()
        # 1. prompts, 2. rollout; a sampler with its own copy of the weights reloads them here
        with clock("rollout"):
            rollout = self.next_rollout(index)
        minibatches = self.minibatches(rollout, index)
        # 3. log-probs, values and scores, in the micro-batches of epoch 0: the ratio at the first step is exactly 1
        with clock("score"):
            gold = config.gold is not None and index % config.gold.every == 0
            experience = self.scorer.score(rollout, minibatches.epochs[0], gold)
            perturbed = self.perturber(index, rollout.prompts.ids, rollout.prompts.messages, rollout.completions)
        # 4. rewards: the score at the last token, the KL penalty at every token
        mask, kl_coef = rollout.response_mask, self.kl_coef
        scores, *score_scale = self.shape_scores(experience)
        kl_per_token = config.kl.estimator(experience.logprobs, experience.ref_logprobs)
        rewards = kl.shape_rewards(scores, kl_per_token, mask, kl_coef, scale=config.shaping.whiten_rewards)
        # 5. advantages and returns
        advantages = config.advantage(rewards, experience.values, mask, rollout.prompts.groups)
        # 6. minibatch updates
        lr_scale = self.lr_scale(index) * self.guard.lr_factor
        with clock("learn"):
            learned = self.learner.learn(experience, advantages, minibatches, index, lr_scale)
        metrics = experience_metrics(experience, scores, rewards, advantages)
        parts = (experience, scores, kl_per_token, rewards, advantages, kl_coef, *score_scale)
        record.note(self.run.path, config.log, UpdateRecord(index + 1, *parts))
        self.kl_controller.update(metrics["objective/kl"], len(mask))
        if self.score_range is not None:
            metrics["guard/outside_range"] = outside_range(experience.scores, *self.score_range)
        metrics |= {"objective/kl_coef": kl_coef, "optimizer/lr": lr_scale * config.optimizer.policy_lr}
        return metrics | perturbed | learned | clock.metrics(rollout)

    def draw_prompts(self, index: int) -> Prompts:
        """Phase 1: the next prompts of the table, reshuffled for each pass; determined by seed and index."""
        count = self.config.rollout.prompts_per_update
        samples = self.config.rollout.samples_per_prompt
        rows = endless(len(self.tables.train), index * count, count, self.config.seed, ORDER)
        seeds = stream_seeds(count * samples, self.config.seed, TRAIN, index)
        return self._prompts(self.tables.train, rows, samples, seeds)

    def _prompts(self, table: Any, rows: Sequence[int], samples: int, seeds: list[int]) -> Prompts:
        found = [table[row] for row in rows for _ in range(samples)]
        return Prompts(
            ids=[row["prompt"] for row in found],
            messages=[json.loads(row["messages"]) for row in found],
            groups=torch.arange(len(rows)).repeat_interleave(samples),
            seeds=seeds,
        )

    def next_rollout(self, index: int) -> Rollout:
        """Phase 2: the rollout of an update. With `rollout.ahead` the next one is started before learning from it."""
        rollout = self.ahead() if self.ahead is not None else self.rollout(self.draw_prompts(index))
        more = self.config.rollout.ahead and index + 1 < self.config.updates
        self.ahead = self.start_rollout(self.draw_prompts(index + 1)) if more else None
        return rollout

    def rollout(self, prompts: Prompts) -> Rollout:
        """Sample a completion of each prompt with the current weights."""
        return self.start_rollout(prompts)()

    def start_rollout(self, prompts: Prompts) -> Callable[[], Rollout]:
        """Start to sample: each rank completes a block of the prompts. Returns a function that waits for the
        completions and gathers them on all ranks."""
        c, policy = self.config.rollout, self.models.policy
        params = SamplingParams(
            c.max_new_tokens, c.min_new_tokens, c.temperature, c.top_k, c.top_p, tuple(c.stop), c.batch_size,
            logprobs=self.config.score.policy == "sampler", merge_adapters=c.merge_adapters,
        )  # fmt: skip
        mine = torch.arange(len(prompts.ids)).tensor_split(self.ranks)[self.rank].tolist()
        part = slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)
        ids, seeds = prompts.ids[part], prompts.seeds[part]
        copies = c.sampler.row.traits.get("merged", False)  # the sampler copies the weights, and merges its copy
        merged = adapters_merged(policy) if c.merge_adapters and not copies else nullcontext()
        with self.models.engine.gathered(policy, whole=not copies), merged, torch.compiler.set_stance("force_eager"):
            wait = samplers.start(c.sampler, policy, ids, seeds, params, self.chat)

        def gathered() -> Rollout:
            mine = wait()
            return Rollout(prompts, mine if self.ranks == 1 else gather_completions(mine, part.start))

        return gathered

    def minibatches(self, rollout: Rollout, index: int) -> Minibatches:
        """The minibatches of all epochs of an update, divided among the ranks."""
        batch, count = self.config.batch, len(rollout.completions)
        orders = [permutation(count, self.config.seed, EPOCH, index, epoch) for epoch in range(batch.epochs)]
        budget = self.learner.budget.tokens
        return Minibatches.of_rollout(rollout, self.chat.pad_id, self.packed, orders, batch.minibatches, budget)

    def shape_scores(self, experience: Experience) -> tuple[Tensor, float, float]:
        """Scores normalised and clipped, with the rule for completions that did not end, float32 [N]; and the mean and
        standard deviation by which they were normalised."""
        rule, raw, ended = self.config.shaping, experience.scores, experience.rollout.ended
        if rule.normalize_scores:
            self.score_stats = self.score_stats.add(raw)
        mean, std = self.score_stats.mean, self.score_stats.scale
        scores = kl.shape_scores(raw, ended, mean=mean, std=std, clip=rule.clip_score, missing_eos=rule.missing_eos)
        return scores, mean, std

    @property
    def kl_coef(self) -> float:
        """The current coefficient of the KL penalty."""
        return self.kl_controller.coef * self.guard.kl_factor

    def lr_scale(self, index: int) -> float:
        """Learning rates of an update as a fraction of their peak."""
        optimizer, updates = self.config.optimizer, self.config.updates
        return lr_scale(optimizer.schedule, index, updates, math.ceil(optimizer.warmup * updates), first=1)

    def evaluate(self) -> None:
        """Sample and score completions of held-out prompts, with the same random streams every time."""
        rows = range(min(self.config.eval.prompts, len(self.tables.eval)))
        if not rows:
            return
        rollout = self.rollout(
            self._prompts(self.tables.eval, rows, 1, stream_seeds(len(rows), self.config.seed, EVAL, 0))
        )
        budget = self.learner.budget.tokens
        whole = Minibatches.of_rollout(rollout, self.chat.pad_id, self.packed, [rows], 1, budget)
        experience = self.scorer.score(rollout, whole.epochs[0])
        tokens = token_records(
            self.config, self.chat, experience, self.kl_coef, self.score_stats.mean, self.score_stats.scale
        )
        self.reporter.evaluation(self.done, experience, self.chat, tokens)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint: weights, optimizer, KL coefficient, score statistics, random generators, and the next
        rollout if it was sampled ahead."""
        ahead = self.ahead() if self.ahead is not None else None
        if ahead is not None:
            self.ahead = lambda: ahead
        with self.checkpoints.write(self.done, self.guard.note_checkpoint(self.done)) as folder:
            self.models.engine.save(folder)
            save_rng(folder)
            if is_main():
                state = {"done": self.done, "score_stats": vars(self.score_stats), "budget": vars(self.learner.budget)}
                state |= {"controller": self.kl_controller.state_dict(), "guard": self.guard.state_dict()}
                state["evaluations"] = self.reporter.evaluations
                if ahead is not None:
                    state["ahead"] = [vars(completion) for completion in ahead.completions]
                (folder / "ppo.json").write_text(json.dumps(state), "utf-8")

    def _resume(self) -> list[dict[str, float]]:
        """Continue from the newest checkpoint; returns the metrics of the first and the last evaluation so far."""
        newest = self.checkpoints.newest()
        if newest is None:
            say(f"No checkpoint in {self.checkpoints.folder}: starting from the beginning")
            self.run.rewind(-1)
            record.forget_after(self.run.path, 0)
            return []
        step, folder = newest
        self.models.engine.load(folder)
        state = json.loads((folder / "ppo.json").read_text("utf-8"))
        self.done = state["done"]
        self.kl_controller.load_state_dict(state["controller"])
        if self.config.shaping.normalize_scores:
            self.score_stats = kl.RunningMeanStd(**state["score_stats"])
        self.guard.load_state_dict(state["guard"])
        self.learner.budget.load_state_dict(state.get("budget"))
        if "ahead" in state:
            rollout = Rollout(self.draw_prompts(self.done), [Completion(**one) for one in state["ahead"]])
            self.ahead = lambda: rollout
        load_rng(folder, self.config.seed, step)
        self.run.rewind(step)
        record.forget_after(self.run.path, step)
        say(f"Continuing after update {step}")
        found: list[dict[str, float]] = state.get("evaluations", [])
        return found


def open_ppo_run(
    config: PPOConfig, chat: ChatTokenizer, own: Mapping[str, ChatTokenizer], resume: bool, overwrite: bool
) -> Run:
    """The run folder, with parents and data recorded; refuses a reward model with another tokenizer."""
    data = [
        *open_datasets(config.data.prompts, KINDS, "data.prompts"),
        *open_datasets(config.data.ptx, KINDS[1:], "data.ptx"),
    ]
    if config.needs_critic and config.critic.init == "reward":
        check_same_text(chat.fingerprints(), str(config.reward_model))
    scorers = dict.fromkeys(term["path"] for term in model_terms(config.reward))
    onlookers = dict.fromkeys(term["path"] for pick in config.onlookers.values() for term in model_terms(pick))
    facts = {
        "parents": [parent_facts(path) for path in (config.model.path, *scorers)],
        "onlookers": [parent_facts(path) for path in onlookers],
        "data": data_facts(data),
        **chat.facts(),
    }
    if times := [one.frozen_at for one in own.values() if one.frozen_at]:
        facts["reward_template_time"] = times[0]  # the same for all, for --resume
    return open_run(config, "ppo", resume, overwrite, facts)


if __name__ == "__main__":
    main("ppo")
