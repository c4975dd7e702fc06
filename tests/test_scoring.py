"""Scores of texts and rankings: each text once, whatever the batches; what a scalar model may be made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from reward_runs import encoded

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.load import POSITIONS_AFTER_PADDING, load_hf_config, sequence_limit
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.reward.scoring import score_rankings, score_texts


class Counting(ScalarModel):
    """Notes the shape of every forward pass, and its number of scores."""

    shapes: list[tuple[int, int]]
    texts: int = 0

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, branches: torch.Tensor | None = None
    ) -> torch.Tensor:
        scores = super().forward(input_ids, attention_mask, branches)
        self.shapes.append(tuple(input_ids.shape))
        self.texts += len(scores)
        return scores


@pytest.fixture
def counting() -> Counting:
    torch.manual_seed(0)
    scalar = Counting(load_scalar(ModelConfig(path=tiny.llama()), tiny.llama()).model)
    scalar.shapes = []
    return scalar


def test_scores_do_not_depend_on_the_batches_that_texts_are_in(
    counting: Counting, chat: ChatTokenizer, rankings: str
) -> None:
    rows = encoded(rankings, chat)
    together, alone = (score_rankings(counting, chat, rows, tokens) for tokens in (4096, 1))
    for one, other in zip(together, alone):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert (one.ranks, one.lengths, one.annotator) == (other.ranks, other.lengths, other.annotator)


def test_a_text_in_several_rankings_is_scored_once_and_batches_keep_to_their_tokens(
    counting: Counting, chat: ChatTokenizer, rankings: str
) -> None:
    rows = encoded(rankings, chat)
    once = score_rankings(counting, chat, rows, 300)
    assert all(texts * tokens <= 300 for texts, tokens in counting.shapes)
    distinct = {(*row["prompt"], *answer) for row in rows for answer in row["candidates"]}
    assert counting.texts == len(distinct)
    twice = score_rankings(counting, chat, rows + rows, 300)
    assert counting.texts == 2 * len(distinct)
    assert [item.scores for item in twice] == [item.scores for item in once] * 2


def test_scores_are_raw_whatever_the_scale_and_leave_the_model_as_it_was(
    counting: Counting, chat: ChatTokenizer, rankings: str
) -> None:
    rows = encoded(rankings, chat)
    counting.train()
    before = score_rankings(counting, chat, rows, 1024)
    counting.set_scale(3.0, 0.25)
    after = score_rankings(counting, chat, rows, 1024)
    assert counting.training
    for one, other in zip(before, after):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_no_text_gives_no_score(counting: Counting, chat: ChatTokenizer) -> None:
    assert score_texts(counting, chat, lambda number: [], [], 100) == []


def test_positions_that_follow_padding_are_not_promised(tmp_path: Path) -> None:
    from transformers import RobertaConfig

    assert "roberta" in POSITIONS_AFTER_PADDING
    RobertaConfig(max_position_embeddings=514, pad_token_id=1).save_pretrained(tmp_path)
    made = ModelConfig(path=str(tmp_path))
    assert sequence_limit(made, load_hf_config(made, str(tmp_path))) == 512


def test_a_model_without_a_score_head_is_refused_where_a_trained_one_is_needed() -> None:
    with pytest.raises(UserError, match="has no trained score head"):
        load_scalar(ModelConfig(path=tiny.llama()), tiny.llama(), head="trained")
