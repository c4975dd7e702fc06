"""Models, tokenizers and datasets small enough for a test, built in code in a folder that lasts as long as pytest.

path = tiny.llama()                                   # a model folder, made once
tiny.write_demonstrations(tmp_path / "demos", 40)     # a dataset
tiny.launch(2, code, *words)                          # run Python code on two processes
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import forked

REPOSITORY = Path(__file__).resolve().parents[1]
STORIES = REPOSITORY.parent / "shared" / "models" / "stories260K"
"""The trained model of the shared folder; may be missing."""

ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant")
COLOURS = ("red", "blue", "green", "black", "white", "brown")
PLACES = ("house", "tree", "river", "garden", "forest", "barn")


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens with <pad> 0, <s> 1 and </s> 2, without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([question(i) + " " + answer(i, i % 7) for i in range(400)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@functools.cache
def llama() -> str:
    """Folder of a random Llama: hidden 32, 2 layers, 4 heads, 128 positions, tied embeddings, with `tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save(LlamaForCausalLM(config), "llama")


@functools.cache
def bert() -> str:
    """Folder of a random BERT encoder: hidden 32, 2 layers, 128 positions, with `tokenizer`."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save(BertModel(config), "bert")


@functools.cache
def encoder_decoder(family: str) -> str:
    """Folder of a random t5, mt5 or bart with `tokenizer`: hidden 32, 2 layers in each half, 128 positions (BART)."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    start = 0
    if family == "bart":
        halves = ("encoder", "decoder")
        sizes = {"d_model": 32, "max_position_embeddings": 128, "forced_eos_token_id": None}
        sizes |= {f"{half}_{name}": size for half in halves for name, size in BART.items()}
        start = 2
    config = AutoConfig.for_model(
        family, vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=start, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save(AutoModelForSeq2SeqLM.from_config(config), family)


BART = {"layers": 2, "ffn_dim": 48, "attention_heads": 4}
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes for `of_family`."""


def of_family(family: str, settings: dict[str, Any]) -> str:
    """Folder of a random causal model of a family of transformers, made once for each settings, with `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = _folder() / f"family-{family}-{digest[:8]}"
    if folder.exists():
        return str(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)), folder.name)


def _save(model: Any, name: str) -> str:
    folder = _folder() / name
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


# ---- data ----------------------------------------------------------------------------------------------------------


def question(number: int) -> str:
    """A prompt; other numbers give other prompts, some of them longer."""
    draw = random.Random(number)
    extra = " Think of the " + ", the ".join(draw.choices(PLACES, k=number % 5)) + "." if number % 5 else ""
    return f"What does the {draw.choice(COLOURS)} {draw.choice(ANIMALS)} number {number} do?{extra}"


def answer(number: int, length: int) -> str:
    """An answer of `length` + 1 short sentences."""
    draw = random.Random(1000 * number + length)
    one = lambda: f"It goes to the {draw.choice(PLACES)} and meets a {draw.choice(ANIMALS)}."  # noqa: E731
    return " ".join(one() for _ in range(length + 1))


def write_demonstrations(path: Path, count: int, held_out: int = 8) -> str:
    """A dataset of `count` demonstrations of unequal length for training and `held_out` more of the eval split."""
    from rlhf.data.schema import Demonstration, Message
    from rlhf.data.writer import DatasetWriter

    with DatasetWriter(path, "demonstration", overwrite=True) as writer:
        for i in range(count + held_out):
            messages = (Message("user", question(i)),)
            split = "train" if i < count else "eval"
            writer.write(Demonstration(messages, split=split, answer=answer(i, i % 4)))
    return str(path)


def write_rankings(path: Path, count: int, held_out: int = 8, candidates: int = 3) -> str:
    """A dataset of rankings whose shorter answers are better, every fifth one with a tie, split as demonstrations."""
    from rlhf.data.schema import Candidate, Message, Ranking
    from rlhf.data.writer import DatasetWriter

    with DatasetWriter(path, "ranking", overwrite=True) as writer:
        for i in range(count + held_out):
            lengths = random.Random(i).sample(range(candidates + 1), candidates)
            ranks = [1 + sorted(lengths).index(length) for length in lengths]
            if i % 5 == 0:
                ranks = [min(rank, 2) for rank in ranks]
            writer.write(
                Ranking(
                    (Message("user", question(i)),),
                    split="train" if i < count else "eval",
                    candidates=tuple(Candidate(answer(i, length), f"writer {k}") for k, length in enumerate(lengths)),
                    ranks=tuple(ranks),
                    annotator=f"annotator {i % 3}",
                )
            )
    return str(path)


# ---- processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(processes: int, code: str, *words: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    """Run Python source on `processes` ranks, as torchrun starts them, one thread each, from the repository root.

    `words` are the program's arguments (`sys.argv[1:]`); `tests` is importable. Standard output and error come back
    together, the exit status is not checked. The ranks are forked (see `forked`), so they start at once.
    """
    ranks = start(processes, code, *words)
    status = ranks.wait(timeout)
    return subprocess.CompletedProcess(words, status, stdout=ranks.text)


def start(processes: int, code: str, *words: str, folder: Path = REPOSITORY) -> forked.Ranks:
    """The same, in a folder, without waiting for the end."""
    script = Path(tempfile.mkdtemp(dir=_folder())) / "program.py"
    script.write_text(code, "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    ranks = [environment]
    if processes > 1:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(processes)}
        world |= {"WORLD_SIZE": str(processes)}
        ranks = [environment | world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    return forked.Ranks(script, words, folder, ranks)


COMMAND = """
import os, sys
from rlhf.cli import child
from stages.cli import main

def run_child(command, environment):
    sys.stdout.flush()
    sys.stderr.flush()
    if not (pid := os.fork()):
        os.environ |= environment
        sys.argv = ["rlhf", *command[3:]]
        main()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

child.run_child = run_child  # a pipeline's stages are forked too
main()
"""


def start_command(folder: Path, *words: str) -> forked.Ranks:
    """Start a command of `rlhf` in a folder; it is forked, as are the stages that a pipeline starts."""
    return start(1, COMMAND, *words, folder=folder)


def command(folder: Path, *words: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    """Run it to its end; standard output and error come back together, the exit status is not checked."""
    ranks = start_command(folder, *words)
    status = ranks.wait(timeout)
    return subprocess.CompletedProcess(words, status, stdout=ranks.text)


def merged_state(model: Any) -> dict[str, Any]:
    """The full weights with adapters merged, under transformers' names; tied weights are one tensor."""
    from rlhf.tuning.merging import merged_parts, weight_marks

    state = {name: weight for part in merged_parts(model) for name, weight in part.items()}
    first: dict[int, str] = {}
    return state | {
        name: state[first.setdefault(mark, name)] for name, mark in weight_marks(model, merge=False).items()
    }
