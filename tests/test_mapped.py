"""Weights that stay as stored until an engine places them are, once placed, those of a model that is loaded whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
import transformers
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from rlhf.config.base import ModelConfig
from rlhf.distributed.deepspeed_json import BUCKET, SUB_GROUP, with_sizes
from rlhf.models.load import load_policy
from rlhf.models.mapped import computing, dtype_of
from rlhf.models.scalar import load_scalar
from rlhf.training.placing import flatten_one_by_one, place
from rlhf.tuning.methods import TUNING

EXPERTS = {
    **tiny.SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives the folder of a random model of a family, in bfloat16 on disk."""
    made: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                if family == "llama":  # with tied embeddings, and tiny's vocabulary
                    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama())
                elif family == "experts":
                    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.of_family("qwen3_moe", EXPERTS))
                elif family == "mixtral":
                    shape = {**tiny.SMALL, "num_local_experts": 4}
                    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.of_family("mixtral", shape))
                elif family == "bert":
                    model = transformers.AutoModel.from_pretrained(tiny.bert())
                else:
                    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(families.FAMILIES[family]))
            model.to(torch.bfloat16).save_pretrained(made[family], max_shard_size="20KB")
        return made[family]

    return of


def both(load, path, **options):
    """A model loaded whole, and as stored; each with the random state that it left."""
    found = []
    settings = ModelConfig(path=path, **options.pop("config", {}))
    for as_stored in (False, True):
        torch.manual_seed(1)
        model = load(settings, path, as_stored=as_stored, **options)
        found.append((model, torch.get_rng_state()))
    assert torch.equal(found[0][1], found[1][1]), "another number of random values was drawn"
    return found[0][0], found[1][0]


def assert_equal(whole, placed):
    mine, theirs = dict(placed.named_parameters()), dict(whole.named_parameters())
    mine |= dict(placed.named_buffers())
    theirs |= dict(whole.named_buffers())
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "experts"])
def test_a_policy_is_the_same_once_it_is_placed(family, folder):
    whole, stored = both(load_policy, folder(family))
    linear = [module.weight for module in stored.modules() if isinstance(module, torch.nn.Linear)]
    assert linear and {weight.dtype for weight in linear} == {torch.bfloat16}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), computing(stored.eval()):
        early = stored(ids).logits
    assert {weight.dtype for weight in linear} == {torch.bfloat16}
    assert_equal(whole, place(stored, torch.float32))
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert tied == (stored.get_input_embeddings().weight is stored.get_output_embeddings().weight)
    with torch.no_grad():
        logits = whole.eval()(ids).logits
    assert torch.equal(logits, stored(ids).logits)
    if not tied and family != "experts":  # else the head's or the experts' weights are read, not called
        torch.testing.assert_close(early, logits)


def test_a_base_in_bfloat16_keeps_what_transformers_keeps_in_float32():
    whole, stored = both(load_policy, tiny.llama(), dtype=torch.bfloat16)
    assert "float32" in {str(b.dtype).removeprefix("torch.") for b in whole.buffers()}
    assert_equal(whole, place(stored, torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_new_head_is_drawn_as_in_a_whole_model(family, folder):
    whole, stored = both(load_scalar, folder(family))
    assert_equal(whole, place(stored, torch.float32))


def test_the_test_of_shared_prompts_computes_in_the_dtype_of_the_engine(folder):
    whole, stored = both(load_scalar, folder("llama"))
    assert dtype_of(stored) == torch.float32
    assert whole.shared_prompts == stored.shared_prompts and stored.shared_prompts.max_length
    assert_equal(whole, place(stored, torch.float32))


@pytest.mark.parametrize(
    ("family", "tuning"),
    [
        ("llama", "lora"), ("llama", {"name": "lora", "dora": True}), ("llama", "ia3"), ("llama", "bottleneck"),
        ("llama", "prompt-tuning"), ("experts", "lora"),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_start_as_on_a_whole_model(family, tuning, folder):
    whole, stored = both(load_policy, folder(family))
    tuned = []
    for model in (whole, stored):
        torch.manual_seed(2)
        tuned.append(TUNING.pick(tuning)(model, None, "causal"))
    trained = [p for p in tuned[1].parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    assert_equal(tuned[0], place(tuned[1], torch.float32))


def test_added_rows_are_the_mean_in_the_dtype_of_the_engine(folder):
    whole, stored = both(load_policy, folder("llama"), tokens=330, config={"resize_embeddings": True})
    assert len(stored.get_input_embeddings().weight) == 330
    assert_equal(whole, place(stored, torch.float32))


@pytest.mark.parametrize("family", ["experts", "mixtral"])
def test_experts_are_put_together_when_they_are_placed(family, folder, capsys):
    whole, waiting = both(load_policy, folder(family))
    experts = [p for name, p in waiting.named_parameters() if "experts" in name]
    assert experts and {p.untyped_storage().nbytes() for p in experts} == {4}, "one element of float32 each"
    assert capsys.readouterr().out == ""
    assert_equal(whole, place(waiting, torch.float32))
    assert not any(hasattr(p, "put_together") for p in experts)


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [3, 1, 0]])
@pytest.mark.parametrize("where", ["data", "cpu_data"])
def test_the_flat_buffer_is_that_of_deepspeed_and_its_parameters_are_views(padding, where):
    theirs = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    optimizer = SimpleNamespace(flatten=torch._utils._flatten_dense_tensors)
    parameters = [torch.nn.Parameter(torch.randn(*shape, dtype=torch.bfloat16)) for shape in ((5, 2), (7,), (3, 3))]
    for parameter in parameters:
        parameter.cpu_data = parameter.data.clone()
    before = [parameter.clone() for parameter in parameters]
    expected = theirs(optimizer, parameters, 8, where == "cpu_data", padding)
    found = flatten_one_by_one(optimizer, parameters, 8, where == "cpu_data", padding)
    assert torch.equal(found, expected) and found.numel() % 8 == 0
    for parameter, old in zip(parameters, before):
        part = getattr(parameter, where)
        assert torch.equal(part, old)
        assert part.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()


def test_buffers_fit_the_trained_weights_unless_the_file_sizes_them():
    sized = with_sizes({"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}, 320, 5)["zero_optimization"]
    assert sized == {"stage": 3, "reduce_bucket_size": 7, "sub_group_size": 20}
    assert with_sizes({"zero_optimization": {"stage": 2}}, 320, 50)["zero_optimization"]["reduce_bucket_size"] == 50
    large = with_sizes({"zero_optimization": {"stage": 3}}, 70 * 10**9, 10**9)["zero_optimization"]
    assert (large["reduce_bucket_size"], large["sub_group_size"]) == (BUCKET, SUB_GROUP)
    assert with_sizes({"zero_optimization": {"stage": 0}}, 320, 5) == {"zero_optimization": {"stage": 0}}
