"""Trained models in use: loading a policy, sampling with progress, scoring. What sample, evaluate and chat share."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf.config import ModelConfig
from rlhf.console import err, is_main, warn
from rlhf.errors import UserError
from rlhf.lazy import lazy
from rlhf.rewards import REWARDS, Finished, RewardContext
from rlhf.rollout import Answer, Sampling, end_ids, episode_seed, hf
from rlhf.runs import is_run, read_run, result_of
from rlhf.schema import Prompt
from rlhf.tokenization import ChatTokenizer, load_tokenizer

if TYPE_CHECKING:
    import peft
    import torch
    import transformers
else:
    peft, torch, transformers = lazy("peft"), lazy("torch"), lazy("transformers")

BATCH_SIZE = 32
BATCHES_AT_ONCE = 8
"""So many batches are handed to the sampler together: waiting prompts take the places of finished answers."""


def quiet() -> None:
    """Keep the libraries' chatter about loading off the terminal, and all of it off standard output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Position ids are not supported")  # virtual tokens have none, rightly
    if not torch.cuda.is_available():  # DeepSpeed, which transformers imports, would print that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# ---- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A causal LM that is ready to answer: in evaluation mode, on this process's device."""

    path: str
    """As it was named: a run, a model folder or a hub name."""
    model: Any
    chat: ChatTokenizer
    limit: int
    """Longest sequence in tokens, prompt and answer together."""
    trust_remote_code: bool = False

    @property
    def prompt_learning(self) -> bool:
        """True where learned virtual tokens stand before every prompt, so that only PEFT's own passes are right."""
        return hasattr(self.model, "peft_config") and self.model.active_peft_config.is_prompt_learning

    def room(self, sampling: Sampling, limit: int | None = None) -> int:
        """How many tokens a prompt may have, `limit` bounding the sequence further.

        Raises:
            UserError: None are left.
        """
        longest = min(self.limit, limit or self.limit)
        if sampling.max_new_tokens + 1 > longest:
            raise UserError(
                f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt in {longest} tokens",
                remedy=f"Use --max-new-tokens {longest // 2} or less.",
            )
        return longest - sampling.max_new_tokens


def model_kind(path: str | Path, trust_remote_code: bool = False) -> str:
    """`policy` or `reward`: what a run, model folder or hub name holds.

    Raises:
        UserError: An unfinished run, or no model there.
    """
    folder = result_of(path)
    if is_run(path):
        return "reward" if read_run(path)["stage"] == "reward" else "policy"
    from rlhf.models import load_config

    found = load_config(ModelConfig(path=str(path), trust_remote_code=trust_remote_code), folder)
    names = found.architectures or []
    return "reward" if any(name.endswith("ForSequenceClassification") for name in names) else "policy"


def open_policy(path: str | Path, chat_template: str = "auto", trust_remote_code: bool = False) -> Policy:
    """Load the policy of a run, a model folder or a hub name.

    Raises:
        UserError: No finished run or model there, a reward model, or no usable chat template.
    """
    from rlhf import distributed
    from rlhf.models import compute_dtype, load_config, load_policy, sequence_limit

    quiet()
    folder = result_of(path)
    if not (Path(folder) / "adapter_config.json").is_file() and model_kind(path, trust_remote_code) == "reward":
        raise UserError(
            f"{path}: a reward model gives scores, not answers",
            remedy=f"Name an SFT or PPO run, and this one as --reward {path}.",
        )
    config = ModelConfig(path=str(path), chat_template=chat_template, trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, folder)
    base = adapter_base(Path(folder)) or folder
    model: Any = load_policy(config, base, compute_dtype("auto"))
    limit = sequence_limit(config, load_config(config, base))
    # Sampling follows the command's options alone, not what a model's author set for `generate` (penalties, top_k 50).
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=end_ids(model, chat), pad_token_id=chat.pad_id, bos_token_id=chat.tokenizer.bos_token_id
    )
    if base != folder:
        model = peft.PeftModel.from_pretrained(model, folder)
        limit -= getattr(model.active_peft_config, "num_virtual_tokens", None) or 0
    return Policy(str(path), model.to(distributed.device()).eval(), chat, limit, trust_remote_code)


def adapter_base(folder: Path) -> str | None:
    """The model that a PEFT adapter folder belongs to; None where the folder is no adapter.

    Raises:
        UserError: The base is a local folder that is not there any more.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = str(json.loads(file.read_text("utf-8"))["base_model_name_or_path"])
    if base.startswith((".", "/", "runs/")) and not (Path(base) / "config.json").is_file():
        raise UserError(
            f"{folder}: the model {base} that this adapter belongs to is not there",
            "An adapter holds only what was added to that model.",
            "Bring that folder back, or run the command from the folder where the stage was started.",
        )
    return base


# ---- sampling ----------------------------------------------------------------------------------------------------


def sampling_for(path: str | Path, **given: Any) -> Sampling:
    """How to sample: the options that were given, else how a PPO run sampled in training, else the plain distribution.

    Args:
        path: A run, model folder or hub name.
        given: Fields of `Sampling`; None (or an empty `stop`) stands for "not given".

    Raises:
        UserError: A value is out of its range.
    """
    chosen: dict[str, Any] = {"max_new_tokens": 128}
    if is_run(path) and read_run(path)["stage"] == "ppo":
        rollout = yaml.safe_load((Path(path) / "config.yaml").read_text("utf-8"))["rollout"]
        names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "stop")
        chosen |= {name: rollout[name] for name in names}
    chosen |= {name: value for name, value in given.items() if value not in (None, [], ())}
    sampling = Sampling(**chosen | {"stop": tuple(chosen.get("stop", ())), "batch_size": BATCH_SIZE})
    if not 0 <= sampling.temperature < math.inf:
        raise UserError(f"--temperature {sampling.temperature} is not a number from 0 (greedy) up")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"--top-p {sampling.top_p} is not above 0 and at most 1")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise UserError(
            f"--min-new-tokens {sampling.min_new_tokens} is above --max-new-tokens {sampling.max_new_tokens}"
        )
    return sampling


@dataclass(frozen=True)
class Sampled:
    """One answer to one prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    answer: Answer
    text: str
    """The answer as text; a stop string that ended it is its end."""


def sample(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, seed: int, n: int = 1, room: int | None = None
) -> Iterator[list[Sampled]]:
    """Sample `n` answers to each prompt, yielded prompt by prompt in order, with a progress bar.

    The random stream of an answer follows from the seed, the prompt's content and the answer's number alone, so
    other prompts beside it, or more answers, change nothing.

    Args:
        policy: Answers.
        prompts: What is answered. A prompt longer than the room keeps its end; how many do is warned of.
        sampling: How to draw.
        seed: Of all random streams.
        n: Answers to each prompt.
        room: Tokens that a prompt may have; what the policy leaves when not given.
    """
    room = room or policy.room(sampling)
    batches = 1 if policy.prompt_learning else BATCHES_AT_ONCE
    per_batch, cut = max(1, batches * sampling.batch_size // n), 0
    with _token_meter(f"sampling from {policy.path}", len(prompts)) as advance:
        for start in range(0, len(prompts), per_batch):
            batch = prompts[start : start + per_batch]
            whole = [policy.chat.prompt(p.messages) for p in batch]
            cut += sum(len(row) > room for row in whole)
            ids = [policy.chat.cut_prompt(row, room) for row in whole]
            seeds = [episode_seed(seed, int(p.prompt_id, 16), k) for p in batch for k in range(n)]
            answers = draw(policy, [row for row in ids for _ in range(n)], seeds, sampling)
            advance(len(batch), sum(len(answer.ids) for answer in answers))
            for i, prompt in enumerate(batch):
                mine = answers[i * n : (i + 1) * n]
                yield [Sampled(prompt, ids[i], answer, policy.chat.decode(answer.ids)) for answer in mine]
    if cut:
        warn(f"{cut:,} prompts are longer than {room:,} tokens and were cut to their end")


def draw(policy: Policy, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Answer]:
    """One answer to each tokenised prompt, each from its own random stream; prompt-learning policies go one by one."""
    if policy.prompt_learning:
        return [generate(policy, ids, seed, sampling) for ids, seed in zip(prompts, seeds)]
    return hf(policy.model, prompts, seeds, sampling, policy.chat)


def generate(
    policy: Policy, prompt: list[int], seed: int, sampling: Sampling, on_token: Callable[[int], None] | None = None
) -> Answer:
    """One answer through transformers' `generate`, token by token.

    Args:
        policy: Answers.
        prompt: Token ids.
        seed: Of torch's generator.
        sampling: How to draw.
        on_token: Called with each token as it comes; what it raises ends the answer.
    """
    chat, ends = policy.chat, policy.model.generation_config.eos_token_id
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options["top_p"] = sampling.top_p

    def stopped(ids: torch.Tensor, scores: Any = None) -> torch.Tensor:
        """As `hf` sees it. (The option `stop_strings` would also find a stop string that begins in the prompt.)"""
        text = chat.decode(ids[0, len(prompt) :].tolist())
        return torch.tensor([any(string in text for string in sampling.stop)], device=ids.device)

    if sampling.stop:
        options["stopping_criteria"] = transformers.StoppingCriteriaList([stopped])
    if on_token is not None:
        options["streamer"] = _TokenStream(on_token)
    ids = torch.tensor([prompt], device=policy.model.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True,
            max_new_tokens=sampling.max_new_tokens, min_new_tokens=sampling.min_new_tokens or None, **options,
        )  # fmt: skip
    answer = output[0, len(prompt) :].tolist()
    return Answer(answer, ended=answer[-1] in ends or bool(stopped(output)))


class _TokenStream:
    """What `generate` calls a streamer: first put the prompt, then each new token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value.item()))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def _token_meter(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over prompts that shows tokens a second; silent where nobody looks."""
    console = err()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not (is_main() and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total, rate="")
        started, tokens = time.monotonic(), 0

        def advance(prompts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.update(task, advance=prompts, rate=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")

        yield advance


# ---- scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A reward source made ready for a policy's answers."""

    name: str
    limit: int | None
    """Longest sequence in tokens that it reads; None for a function."""
    chat: ChatTokenizer
    source: Callable[[Finished], torch.Tensor]

    def __call__(self, answers: Sequence[Sampled]) -> list[float]:
        """One score for each answer, higher = better.

        Raises:
            UserError: A score is not finite.
        """
        from rlhf import distributed

        rows = [a.prompt_ids + a.answer.ids for a in answers]
        ids, mask = self.chat.pad(rows, distributed.device())
        finished = Finished([a.prompt.chat for a in answers], [a.text for a in answers], ids, mask)
        scores: list[float] = self.source(finished).tolist()
        for score, answer in zip(scores, answers):
            if not math.isfinite(score):
                raise UserError(f"--reward {self.name}: gave {score} for the answer {answer.text[:80]!r}")
        return scores


def open_scorer(spec: str, policy: Policy) -> Scorer:
    """The reward source that `--reward` names: a reward run or model, or a Python function `module:function`.

    A model whose tokenizer or chat template differs from the policy's reads the text in its own tokens.

    Raises:
        UserError: It cannot be loaded, or is a policy.
    """
    config = ModelConfig(path=spec, trust_remote_code=policy.trust_remote_code)
    limit = None
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # a function is found in the working folder, however we were started
        options: dict[str, Any] = {"name": "function", "function": spec}
    else:
        if model_kind(spec, policy.trust_remote_code) != "reward":
            raise UserError(f"--reward {spec}: not a reward model", remedy="Name a run of the reward stage.")
        from rlhf.models import load_config, sequence_limit

        folder = result_of(spec)
        limit = sequence_limit(config, load_config(config, folder))
        same = load_tokenizer(config, folder).fingerprints() == policy.chat.fingerprints()
        options = {"name": "model", "path": spec, "retokenize": not same}
    try:
        source = REWARDS.pick(options)(RewardContext(config, policy.chat, _on_device))
    except ValueError as error:
        raise UserError(f"--reward: {error}") from None
    return Scorer(spec, limit, policy.chat, source)


def _on_device(model: Any) -> Any:
    from rlhf import distributed

    return model.to(distributed.device()).eval()
