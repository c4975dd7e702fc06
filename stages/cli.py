"""The command `rlhf`: a table of commands, each imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.commands.cli import COMMANDS as DATA_COMMANDS
from data_tools.commands.cli import HELP as DATA_HELP
from rlhf import __version__
from rlhf.cli.errors import exit_on_error
from rlhf.core.console import say
from rlhf.core.lazy_group import command_group
from rlhf.distributed.launch import end_with_parent

app = command_group(
    "rlhf",
    "RLHF from human rankings: instruction tuning, a reward model on K-way rankings, PPO.",
    {
        "sft": ("stages.start:sft", "Stage 1: instruction tuning on demonstrations."),
        "reward": ("stages.start:reward", "Stage 2: a reward model from rankings of K answers."),
        "dpo": ("stages.start:dpo", "In place of stages 2 and 3: a policy from rankings by DPO, without RL."),
        "ppo": ("stages.start:ppo", "Stage 3: PPO against the reward, with a KL penalty."),
        "specialist": ("stages.start:specialist", "Train a classifier, tagger or span extractor on labelled rows."),
        "pipeline": ("stages.pipeline:command", "Run the stages and the export in a row, optionally in rounds."),
        "plan": ("stages.memory:command", "Predict a run's peak GPU memory by phase, part and ZeRO stage."),
        "sample": ("stages.sample:command", "Print a model's answers to prompts."),
        "score": ("stages.score:command", "Print a reward model's scores of answers."),
        "evaluate": ("stages.evaluate:command", "Measure a model on held-out data."),
        "judge": ("stages.judge:command", "Measure how often a judge on a server agrees with human rankings."),
        "prompt-search": (
            "stages.prompt_search:command",
            "Search for an instruction that makes a model answer better.",
        ),
        "compare": ("stages.compare:command", "Compare prompting, tuning, DPO and PPO on your own tasks."),
        "runs": ("stages.runs:command", "List the runs below a folder with stage, state and result."),
        "doctor": ("stages.doctor:command", "Say what is wrong with a run, why, and what to do."),
        "report": ("stages.report:command", "Write one HTML page about runs, to read, print and send."),
        "guard": ("stages.guard:command", "Say whether a PPO run improves or games its reward."),
        "replay": ("stages.replay:command", "Open a recorded PPO update, and recompute it."),
        "export": ("stages.export:command", "Export a finished run in Hugging Face format."),
        "chat": ("stages.chat:command", "Chat with a model."),
        "check-model": (
            "stages.check_model:command",
            "Try all stages on a model, or a tiny copy of it.",
        ),
        "serve-sampler": ("stages.serve_sampler:command", "Serve a vLLM engine for the rollouts of PPO runs."),
        "demo": ("stages.demo:command", "Run all three stages in a miniature world, in minutes on a CPU."),
        "data": ("stages.cli:data_app", DATA_HELP),
    },
)
data_app = command_group(
    "data",
    DATA_HELP,
    {
        **DATA_COMMANDS,
        "propose": ("stages.propose:command", "Write K distinct answers to each prompt, for ranking."),
        "next": ("stages.next:command", "Choose the prompts and answers whose rankings are most informative."),
        "grow": ("stages.grow:command", "Grow new instructions from seed tasks with a teacher (Self-Instruct)."),
        "distill": ("stages.distill:command", "Write a teacher's answers to prompts as demonstrations or candidates."),
    },
)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        say(f"rlhf {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script `rlhf`; never returns."""
    end_with_parent()
    with exit_on_error():
        app(prog_name="rlhf")


if __name__ == "__main__":
    main()
