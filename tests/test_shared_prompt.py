"""Answers that share a row with their prompt: the same scores and gradients as separate rows, where a model can."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from logged import lines as metrics_of
from reward_runs import config, encoded, steps

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.load import recompute_activations
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.models.shared_prompt import (
    NO_SHARING,
    SharedPrompts,
    attention_mask_of,
    completion_ends,
    detect_sharing,
    pad_rows,
    position_ids_of,
)
from rlhf.reward.collator import RankingCollator, RewardBatch
from rlhf.reward.losses import RANKING_LOSSES
from rlhf.reward.scoring import score_rankings
from rlhf.tuning.methods import TUNING
from stages import reward

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(**SIZES),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "gemma2": transformers.Gemma2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "mixtral": transformers.MixtralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    ),
}
CANNOT = {
    "bert": transformers.BertConfig(**SIZES, intermediate_size=64),  # its prompt sees the answer
    "bloom": transformers.BloomConfig(**SIZES),  # its positions follow from the attention mask
    "gpt-neo": transformers.GPTNeoConfig(
        **SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),  # local attention by a mask of its own
    "bidirectional": transformers.Gemma3TextConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True
    ),
}
EVERYTHING = SharedPrompts(max_length=10**6, linear_cost=10**9)
"""All answers in one row, whatever it costs."""


def scalar_of(name: str, attention: str | None = None) -> ScalarModel:
    """A random model with larger weights than usual, so that what it attends to shows in the scores; no dropout."""
    torch.manual_seed(0)
    made = (FAMILIES | CANNOT)[name]
    model = transformers.AutoModelForSequenceClassification.from_config(made, attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return ScalarModel(model)


def some_rankings(counts: tuple[int, ...] = (2, 4, 9, 3)) -> list[dict[str, Any]]:
    """Rankings of so many candidates each, of unequal prompts and answers, with ties, ratings and weights."""
    draw = random.Random(0)
    tokens = lambda low, high: [draw.randrange(3, 320) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [
        {
            "prompt": tokens(4, 20),
            "candidates": [tokens(1, 12) for _ in range(count)],
            "ranks": [1, 2, *(draw.randint(1, 2) for _ in range(count - 2))],
            "ratings": [None] * count,
            "weight": 1.0 + index / 2,
        }
        for index, count in enumerate(counts)
    ]


def loss_of(scalar: ScalarModel, batch: RewardBatch, loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [N] and gradients, end to end, of a batch."""
    scalar.zero_grad()
    scores = scalar(batch.input_ids, batch.attention_mask, batch.branches)
    losses, _ = loss(scores, batch.rankings)
    losses.sum().backward()
    gradients = [w.grad.flatten() for w in scalar.parameters() if w.grad is not None]
    return scores.detach(), torch.cat(gradients)


def assert_same_as_separate(scalar: ScalarModel, chat: ChatTokenizer, rows: list[Any], loss: Any) -> None:
    together, apart = RankingCollator(chat, sharing=EVERYTHING)(rows), RankingCollator(chat)(rows)
    assert len(together.input_ids) == len(rows) and apart.branches is None
    scores, gradients = loss_of(scalar, together, loss)
    expected, expected_gradients = loss_of(scalar, apart, loss)
    assert expected.std() > 0.01 and expected_gradients.abs().max() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


# ---- exactly the same ----------------------------------------------------------------------------------------------


def test_a_row_says_whose_each_token_is_where_it_stands_and_what_it_sees(chat: ChatTokenizer) -> None:
    ids, mask, branches = pad_rows(chat, [([7, 8], [[3, 4], [5]]), ([9], [[6]])])
    assert ids.tolist() == [[7, 8, 3, 4, 5], [9, 6, 0, 0, 0]]
    assert mask.sum(1).tolist() == [5, 2]
    assert branches is not None and branches.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert position_ids_of(branches).tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert completion_ends(branches).nonzero().tolist() == [[0, 3], [0, 4], [1, 1]]
    sees = attention_mask_of(branches, "sdpa", torch.float32)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in sees] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]
    added = attention_mask_of(branches, "eager", torch.float32)[0, 0]
    assert torch.equal(added == 0, sees) and added.min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["bradley-terry", "davidson"])
def test_scores_and_all_gradients_are_those_of_separate_rows(
    name: str, attention: str, loss: str, chat: ChatTokenizer
) -> None:
    assert_same_as_separate(scalar_of(name, attention), chat, some_rankings(), RANKING_LOSSES.pick(loss))


@pytest.mark.parametrize("count", range(2, 10))
def test_every_number_of_answers_can_share_a_prompt(count: int, chat: ChatTokenizer) -> None:
    loss = RANKING_LOSSES.pick("plackett-luce")
    for name in ("llama", "gpt2"):
        assert_same_as_separate(scalar_of(name), chat, some_rankings((count, count)), loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_can_share_prompts_are_recognised_and_exact(name: str, chat: ChatTokenizer) -> None:
    scalar = scalar_of(name).train()
    assert scalar.shared_prompts.max_length >= 4096 and scalar.training
    assert_same_as_separate(scalar, chat, some_rankings(), RANKING_LOSSES.pick("bradley-terry"))


def test_adapters_and_recomputed_activations_change_nothing(chat: ChatTokenizer) -> None:
    scalar = scalar_of("llama")
    scalar.model = TUNING.pick("lora")(scalar.model, chat, "scalar")
    with torch.no_grad():
        for name, weight in scalar.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    recompute_activations(scalar.model, use_reentrant=False)
    scalar.train()
    assert scalar.shared_prompts.max_length
    assert_same_as_separate(scalar, chat, some_rankings(), RANKING_LOSSES.pick("bradley-terry"))


# ---- where it cannot be, or does not pay ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_cannot_share_prompts_encodes_them_for_each_answer(name: str, chat: ChatTokenizer) -> None:
    scalar = scalar_of(name)
    assert scalar.shared_prompts == NO_SHARING
    assert RankingCollator(chat, sharing=scalar.shared_prompts)(some_rankings()).branches is None


@pytest.mark.parametrize("std", [0.05, 0.25])
def test_rounding_does_not_hide_that_completions_see_each_other(std: float) -> None:
    # LFM2's convolution carries the end of a completion into the start of the next one, whatever the mask says.
    made = transformers.Lfm2Config(
        **SIZES, intermediate_size=64, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    torch.manual_seed(0)
    body = transformers.AutoModel.from_config(made).to(torch.bfloat16)
    with torch.no_grad():
        for weight in body.parameters():
            if weight.dim() > 1:
                weight.normal_(std=std)

        def encode(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
            return body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state

        assert detect_sharing(body, encode) == NO_SHARING


def test_where_a_text_is_longer_than_a_sliding_window_nothing_in_its_batch_is_shared(chat: ChatTokenizer) -> None:
    made = transformers.MistralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=24
    )
    scalar = ScalarModel(transformers.AutoModelForSequenceClassification.from_config(made))
    assert scalar.shared_prompts.max_length == 24
    short, long = ([{**row, "prompt": [5] * size} for row in some_rankings()] for size in (12, 13))
    long[0]["candidates"][0] = [7] * 12
    collate = RankingCollator(chat, sharing=scalar.shared_prompts)
    assert collate(short).branches is not None and collate(long).branches is None
    for rows in (short, long, short + long):
        rows = [row | {"characters": row["ranks"], "source": "", "annotator": "", "group": None} for row in rows]
        together = score_rankings(scalar, chat, rows, 4096)
        apart = [item for row in rows for item in score_rankings(scalar, chat, [row], 1)]
        for one, other in zip(together, apart):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_an_attention_that_takes_no_such_mask_is_left_alone() -> None:
    scalar = scalar_of("llama")
    scalar.config._attn_implementation = "flash_attention_2"
    assert scalar.shared_prompts == NO_SHARING


def test_answers_share_a_row_only_while_that_is_less_work() -> None:
    sharing = SharedPrompts(max_length=1000, linear_cost=100)
    assert sharing.rows(200, [100] * 4) == [[0, 1, 2], [3]]
    assert sharing.rows(1, [500, 500]) == [[0], [1]]
    assert sharing.rows(200, [100] * 4, max_tokens=450) == [[0, 1], [2, 3]]
    assert NO_SHARING.rows(200, [1, 1]) == [[0], [1]]
    assert sharing.rows(5, []) == []


# ---- in the stage --------------------------------------------------------------------------------------------------


def test_scoring_encodes_a_prompt_once_and_gives_the_same_scores(chat: ChatTokenizer, rankings: str) -> None:
    torch.manual_seed(0)
    scalar = load_scalar(ModelConfig(path=tiny.llama()), tiny.llama())
    rows = encoded(rankings, chat)
    scalar.shared_prompts = NO_SHARING
    apart = score_rankings(scalar, chat, rows + rows[:3], 1024)
    scalar.shared_prompts = EVERYTHING
    tokens = []
    scalar.register_forward_pre_hook(lambda _, words: tokens.append(int(words[1].sum())))
    together = score_rankings(scalar, chat, rows + rows[:3], 1024)
    assert sum(tokens) == sum(len(row["prompt"]) + sum(map(len, row["candidates"])) for row in rows)
    for one, other in zip(together, apart):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_run_with_shared_prompts_learns_the_same_from_fewer_tokens(
    tmp_path: Path, rankings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {}
    for shared in (True, False):
        made = config(tmp_path / str(shared), rankings, shared_prompts=shared)
        reward.run(made)
        lines[shared] = metrics_of(made.run)
    torch.testing.assert_close(
        steps(lines[True], "train/loss", "optimizer/grad_norm"),
        steps(lines[False], "train/loss", "optimizer/grad_norm"),
        rtol=2e-4,
        atol=1e-5,
    )
    assert (steps(lines[True], "train/tokens") < 0.9 * steps(lines[False], "train/tokens")).all()
    assert "cannot share" not in capsys.readouterr().out


def test_a_run_says_once_that_its_model_cannot_share_prompts(
    tmp_path: Path, rankings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, rankings, model={"path": tiny.bert()})
    reward.run(made)
    assert capsys.readouterr().out.count("BertForSequenceClassification cannot share them") == 1
