"""The model of docs/scaling.md: its table, one cell by hand, and its bytes against what two processes send."""

from __future__ import annotations

import sys

import pytest
import tiny

from rlhf.ppo.batching import divide

sys.path.append(str(tiny.REPOSITORY / "benchmarks"))

import plot
import scaling
import scaling_model as model

SIDES = (("ours", 2.0, 100.0), ("trl", 5.0, 400.0))
H100, LLAMA = model.MACHINES["h100"], model.MODELS


def test_the_page_shows_the_table_that_the_model_prints():
    page = (tiny.REPOSITORY / "docs" / "scaling.md").read_text("utf-8")
    assert model.table(H100) in page, "put the output of `python benchmarks/scaling.py --model-table` there"


def test_parameters_are_those_of_llama_3_1():
    """Counts of the published checkpoints."""
    assert LLAMA["8B"].policy == 8_030_261_248
    assert LLAMA["70B"].policy == 70_553_706_496


def test_scoring_8b_on_8_gpus_by_hand():
    """1,024 episodes in 8 minibatches on 8 ranks: 16 a rank, 8 fit in a micro-batch, so 16 passes.

    Each gathers 2 x (8.0303 + 7.5049) billion parameters of 2 bytes = 62.14 GB, of which a rank sends 7/8.
    """
    cost = model.update(LLAMA["8B"], H100, model.Job(1024), 8)["score"]
    assert cost is not None
    assert cost.sent / 1e9 == pytest.approx(16 * 62.14 * 7 / 8, rel=1e-3)
    assert cost.link == "NVLink"
    assert cost.link_seconds == pytest.approx(16 * 62.14 * 7 / 8 / (450 * 0.8), rel=1e-3)


def test_decoding_reads_the_weights_for_every_token():
    """8B on 512 GPUs: 2 sequences each, 512 tokens x (16.06 GB of weights + 2 x 0.10 GB of cache), 40% of 3.35 TB/s."""
    cost = model.update(LLAMA["8B"], H100, model.Job(1024), 512)["rollout"]
    assert cost is not None
    assert cost.limit == "memory bandwidth"
    assert cost.work_seconds == pytest.approx(512 * (16.06 + 2 * 131072 * 768 / 1e9) / (3350 * 0.4), rel=1e-3)


def test_between_hosts_a_whole_enters_each_host_once_over_all_adapters():
    """Two hosts of 8, a whole of 160 GB: 150 GB a rank over NVLink, 80 GB into each host over 8 x 50 GB/s."""
    assert model.links(150e9, 16, H100) == ("NVLink", pytest.approx(150 / 450 / 0.8))
    slow = model.Machine("slow network", H100.memory, H100.hbm, network=10e9)
    assert model.links(150e9, 16, slow) == ("network", pytest.approx(80 / 80 / 0.8))


def test_a_policy_of_70b_fits_no_gpu_whole_and_a_host_together():
    for machine in model.MACHINES.values():
        assert model.update(LLAMA["70B"], machine, model.Job(1024), 64)["rollout"] is None
        assert model.update(LLAMA["70B"], machine, model.Job(1024), 64, split=8)["rollout"] is not None


@pytest.mark.parametrize("ranks", [1, 2, 8, 512])
@pytest.mark.parametrize("episodes", [32, 100, 1024])
def test_micro_batches_are_those_of_the_learner(monkeypatch, ranks, episodes):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    job = model.Job(episodes)
    plan = divide([1024] * episodes, range(episodes), job.minibatches, job.micro_batch_tokens)
    found, expected = sum(len(share[0]) for share in plan), model.micro_batches(job, ranks)[1]
    assert expected - job.minibatches <= found <= expected
    if episodes % (job.minibatches * ranks) == 0:
        assert found == expected


def test_the_figure_of_ppo_shows_times_our_time_and_memory():
    rows = [{"regime": "full", "side": side, "cores": "1x2", "seconds": s, "peak_mb": mb} for side, s, mb in SIDES]
    axes = plot.ratios(rows).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2.5, 4.0]
    assert [text.get_text() for text in axes.texts] == ["2.50x", "4.00x"]


def test_two_processes_stand_beside_the_faster_of_trls_ways():
    found = [("ours", "2x1", 2.0), ("trl", "1x2", 10.0), ("trl", "2x1", 8.0)]
    rows = [{"regime": "full", "side": side, "cores": c, "seconds": s, "peak_mb": 100.0} for side, c, s in found]
    axes = plot.ratios(rows).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [4.0, 1.0]
    assert "2 processes" in axes.get_yticklabels()[0].get_text()


def test_the_figure_of_costs_shows_multiples_of_the_smallest_size():
    rows = [{"axis": "episodes", "size": size, "phases": [size, 1.0], "mb": 100.0} for size in (3, 1)]
    proportion, time, memory = (list(line.get_ydata()) for line in plot.costs(rows).axes[0].lines)
    assert (proportion, time, memory) == ([1, 3], [1, 2], [1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_send_what_the_model_says(shared, stage, record_property):
    setting = scaling.Setting(processes=2, stage=stage, updates=1)
    for found in scaling.measure(setting):
        counted, expected = found["updates"][-1]["sent"], scaling.predicted(setting)
        record_property("figures", f"ZeRO {stage}: {counted} counted, {expected} predicted")
        for phase in model.PHASES:
            assert counted[phase] == pytest.approx(expected[phase], rel=0.1, abs=1e5)
