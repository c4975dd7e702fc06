"""Generation with unequal lengths: the samplers `hf`, `transformers` and `vllm`, and static `generate`.

    OMP_NUM_THREADS=1 python benchmarks/generation.py ../shared/models/stories260K
    OMP_NUM_THREADS=1 python benchmarks/generation.py ../shared/models/stories260K --samplers transformers hf
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/generation.py llama-30m --samplers vllm hf --episodes 64

`llama-30m` is a random Llama: 30M parameters, heads of 64, a vocabulary of 32,000.

All sides sample at temperature 1 with the same prompts (8 to 40 random tokens) and the same completion lengths, drawn
from a log-normal distribution with a mean of 40% of the maximum. A completion cannot end before its length and must end
at it (`transformers` gets the lengths as limits). `generate` runs one batch after another, each until its longest
completion ends, as a trainer would call it. The sides alternate, so that a busy machine slows all; ratios are to the
last one. Only completion tokens count; tokens that `generate` computes after an end do not.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager

from rlhf.rollout import slots, vllm_engine
from rlhf.rollout.samplers import SAMPLERS
from rlhf.rollout.types import SamplingParams
from rlhf.rollout.vllm import sent_weights

Side = Callable[[Any, list[list[int]], list[int], int, int], int]
"""(model, prompts, lengths, longest, sequences at a time) -> tokens that were generated."""

END, PAD = 2, 0
NOW = 2.0
"""Takes the place of a uniform number: the completion ends here."""


def draw_lengths(count: int, longest: int) -> list[int]:
    """Log-normal, sigma 0.8, cut to 1..longest, scaled so that their mean is 40% of the longest."""
    shape = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.8).exp()
    scale = 0.4 * longest
    for _ in range(50):  # clipping lowers the mean
        lengths = (shape * scale).clamp(1, longest)
        scale *= 0.4 * longest / float(lengths.mean())
    return lengths.round().int().tolist()


def impose_on_ours(lengths: Sequence[int]) -> None:
    """Seeds are completion indices here; their random streams encode where they end."""
    plain_noise, plain_choose = slots.uniform_noise, slots.choose

    def noise(seed: int, count: int) -> torch.Tensor:
        stream = plain_noise(seed, count)
        stream[lengths[seed] - 1] = NOW
        return stream

    def choose(logits: torch.Tensor, noise: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
        logits[:, END] = float("-inf")
        return torch.where(noise == NOW, END, plain_choose(logits, noise, sampling))

    slots.uniform_noise, slots.choose = noise, choose


class ImposedLengths(transformers.LogitsProcessor):
    """The same for `generate`."""

    def __init__(self, lengths: Sequence[int], width: int) -> None:
        self.last = torch.tensor(lengths) + width - 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Allows only the end token at a completion's length, and every other token before it."""
        ends = (input_ids.shape[1] == self.last)[:, None]
        is_end = torch.arange(scores.shape[1]) == END
        return scores.masked_fill(ends ^ is_end, float("-inf"))


def impose_on_transformers(lengths: Sequence[int]) -> None:
    """For the sampler `transformers`: each request has its own length limit and no end token."""
    plain = ContinuousBatchingManager.add_request

    def add_request(manager: Any, prompt: list[int], request_id: str) -> Any:
        length = lengths[int(request_id)]
        return plain(manager, prompt, request_id=request_id, max_new_tokens=length, eos_token_id=-1)

    ContinuousBatchingManager.add_request = add_request


def by_sampler(name: str, **options: Any) -> Side:
    """Wraps a row of SAMPLERS."""

    def side(model: Any, prompts: list[list[int]], lengths: list[int], longest: int, batch: int) -> int:
        chat: Any = SimpleNamespace(end_id=END, pad_id=PAD, tokenizer=SimpleNamespace(eos_token_id=END))
        sampling = SamplingParams(longest, batch_size=batch)
        answers = SAMPLERS[name].fn(model, prompts, range(len(prompts)), sampling, chat, **options)
        assert [len(answer.ids) for answer in answers] == lengths
        return sum(lengths)

    return side


def by_generate(model: Any, prompts: list[list[int]], lengths: list[int], longest: int, batch: int) -> int:
    """Number of generated tokens, without the padding after an end."""
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        imposed = ImposedLengths(lengths[start : start + batch], width)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, top_k=0, pad_token_id=PAD,
            eos_token_id=END, logits_processor=transformers.LogitsProcessorList([imposed]),
        )  # fmt: skip
        assert output.shape[1] - width == max(lengths[start : start + batch])
    return sum(lengths)


def by_vllm(model: Any, prompts: list[list[int]], lengths: list[int], longest: int, batch: int) -> int:
    """vLLM's engine as the sampler `vllm` starts it, with a length for each request."""
    import vllm

    llm = _engine(model.name_or_path, batch)
    llm.collective_rpc("replace_weights", kwargs={"weights": sent_weights(model)})
    requests = [
        vllm.SamplingParams(max_tokens=n, seed=i, ignore_eos=True, detokenize=False, logprobs=0)
        for i, n in enumerate(lengths)
    ]
    texts = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(texts, requests, use_tqdm=False)
    assert [len(one.outputs[0].token_ids) for one in outputs] == lengths
    return sum(lengths)


@functools.cache
def _engine(path: str, batch: int) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options = vllm_engine.engine_options(
        path, batch, "float32", gpu_memory_utilization=0.4, max_model_len=512, enforce_eager=True, kv_cache_gib=1.0
    )
    return vllm_engine.start(**options, skip_tokenizer_init=True, distributed_executor_backend="uni")


def llama_30m() -> str:
    """Folder of a random Llama with 30M parameters, which is removed at the end."""
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=384, intermediate_size=1_024, num_hidden_layers=3, num_attention_heads=6,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="llama-30m-")
    atexit.register(shutil.rmtree, folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SIDES: dict[str, Side] = {
    "hf": by_sampler("hf"),
    "transformers": by_sampler("transformers"),
    "vllm": by_vllm,
    "generate": by_generate,
}


def main() -> None:
    """Print tokens per second of each side, the ratios within a turn, and their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samplers", nargs="+", choices=SIDES, default=["hf", "generate"])
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="Sequences at a time, on all sides.")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--same", type=int, default=1, help="Completions of each prompt.")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = llama_30m() if args.model == "llama-30m" else args.model
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = END
    random = torch.Generator().manual_seed(1)
    sizes = torch.randint(8, 41, (args.episodes // args.same,), generator=random).tolist()
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=random).tolist() for n in sizes]
    prompts = [prompt for prompt in prompts for _ in range(args.same)]
    lengths = draw_lengths(len(prompts), args.max_new_tokens)
    impose_on_ours(lengths)
    impose_on_transformers(lengths)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in args.samplers}
    for turn in range(args.repeats + 1):
        for name in args.samplers:
            start, worked = time.perf_counter(), time.process_time()
            tokens = SIDES[name](model, prompts, lengths, args.max_new_tokens, args.batch)
            if turn:  # the first is a warm-up
                rates[name].append((tokens / (time.perf_counter() - start), time.process_time() - worked))
    print(f"{len(prompts)} completions, {args.same} per prompt, {sum(lengths) / len(lengths):.0f} tokens on average\n")
    last = args.samplers[-1]
    print(f"| sampler | tokens/s | processor seconds | times {last} |\n| --- | --- | --- | --- |")
    for name, found in rates.items():
        ratios = [a / b for (a, _), (b, _) in zip(found, rates[last])]
        speed, work = (statistics.median(column) for column in zip(*found))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {speed:,.0f} | {work:.2f} | {spread} |")


if __name__ == "__main__":
    main()
