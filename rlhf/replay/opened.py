"""A recorded update of a run, opened and checked: what `rlhf replay` and the report show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.config.load import check_config
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.ppo.config import PPOConfig
from rlhf.replay.recompute import Recomputed, check_mathematics, check_metrics
from rlhf.replay.record import UpdateRecord, read
from rlhf.runs.logged import logged_lines, logged_numbers
from rlhf.runs.parents import resolve_model_path, template_time
from rlhf.runs.run_config import read_run_config


@dataclass(frozen=True)
class OpenedUpdate:
    """A record with what was recomputed from it."""

    record: UpdateRecord
    intact: bool
    """Whether the file has the checksum that was written with it."""
    comparisons: list[Recomputed]
    config: PPOConfig
    damage: list[str]
    """What is wrong with lines of metrics.jsonl, which may be those of other steps."""

    @property
    def wrong(self) -> list[str]:
        """What differs from the record."""
        return [one.name for one in self.comparisons if not one.agrees]


def open_update(run: Path, step: int) -> OpenedUpdate:
    """Read a recorded update, and recompute it without the models.

    Raises:
        UserError: It was not recorded, or it or config.yaml is damaged.
    """
    config, damage = ppo_config(run), list[str]()
    record, intact = read(run, step)
    logged: dict[str, float] = {}
    for place, row in logged_lines(run / "metrics.jsonl", damage, complete=False):
        if row["step"] == step:
            logged |= logged_numbers(place, row, damage)
    if damage and not logged:
        damage.insert(0, f"no line that can be read has the metrics of update {step:,}, so they are not compared")
    comparisons = check_mathematics(config, record) + check_metrics(record, logged)
    return OpenedUpdate(record, intact, comparisons, config, damage)


def ppo_config(run: Path) -> PPOConfig:
    """The config of a PPO run, with the run folder where it is now.

    Raises:
        UserError: config.yaml is absent or damaged.
    """
    config = check_config(PPOConfig, read_run_config(run), str(run / "config.yaml"))
    return config.model_copy(update={"run": str(run)})


def tokenizer_of(run: Path, config: PPOConfig) -> ChatTokenizer:
    """The tokenizer of a PPO run: from its result, or while it trains from the model that it started from.

    Raises:
        UserError: Neither can be loaded.
    """
    own = run / "model"
    path = str(own) if (own / "tokenizer_config.json").is_file() else resolve_model_path(config.model.path)
    return load_tokenizer(config.model, path, template_time(config, resume=True))
