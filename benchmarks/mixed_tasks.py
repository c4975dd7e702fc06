"""Memory and speed of sampling for 1, 4, 16, 64 tasks at once: rows of all tasks in one batch over one base, against
one full copy of the model per task, and against switching PEFT adapters between batches of one task each.

    OMP_NUM_THREADS=1 python benchmarks/mixed_tasks.py --plot docs/images/mixed-tasks.svg

Each cell runs in a process of its own. All sides answer the same 64 prompts, greedily and to the same length, with the
tasks in turn; so with T tasks the sides that cannot mix have T batches of 64 / T prompts. Memory is the growth of the
process's resident memory from before the first model is loaded to its peak; time is CPU time of one thread. LoRA of
rank 8 on queries and values (the setting of its paper), or 20 virtual tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 24, 32
SIDES = ("mixed", "switched", "copies")


def make_base(folder: Path) -> None:
    """A random Llama of 26M parameters and a tokenizer."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def make_adapter(base: Path, folder: Path, kind: str, seed: int) -> None:
    """A random adapter."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if kind == "lora":
        config: Any = peft.LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)


def resident(field: str) -> float:
    """A field of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def cell(side: str, kind: str, tasks: int, folder: Path, repeats: int) -> dict[str, float]:
    """Load, sample once to warm up, then `repeats` times; report the median tokens/s and the memory."""
    import peft
    import torch
    import transformers

    from rlhf.inference.policy import open_policy
    from rlhf.inference.task_adapters import TaskAdapters
    from rlhf.models.load import quiet
    from rlhf.rollout.samplers import hf
    from rlhf.rollout.types import SamplingParams

    quiet()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 300, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    seeds, base = range(PROMPTS), folder / "base"
    params = SamplingParams(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=0.0, batch_size=PROMPTS)
    paths = [folder / kind / str(task) for task in range(tasks)]
    of_task = [[i for i in range(PROMPTS) if i % tasks == task] for task in range(tasks)]
    before = resident("VmRSS")
    if side == "mixed":
        mixed = TaskAdapters(open_policy(base), {str(task): path for task, path in enumerate(paths)})
        answer = lambda: mixed.sample(prompts, [i % tasks for i in range(PROMPTS)], seeds, params)  # noqa: E731
    elif side == "copies":
        chat = open_policy(base).chat
        models = []
        for path in paths:
            model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), path)
            models.append(model.merge_and_unload().eval())

        def answer() -> None:
            for model, rows in zip(models, of_task):
                hf(model, [prompts[i] for i in rows], [seeds[i] for i in rows], params, chat)
    else:
        policy = open_policy(base)
        model = peft.PeftModel.from_pretrained(policy.model, paths[0], adapter_name="0")
        for task, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(task))

        def answer() -> None:
            for task, rows in enumerate(of_task):
                model.set_adapter(str(task))
                if kind == "lora":
                    hf(model, [prompts[i] for i in rows], [seeds[i] for i in rows], params, policy.chat)
                else:  # virtual tokens are added by PEFT's own generate alone
                    ids = torch.tensor([prompts[i] for i in rows])
                    with torch.inference_mode():
                        model.generate(
                            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                        )  # fmt: skip

    answer()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        answer()
        times.append(time.process_time() - started)
    return {"tokens/s": PROMPTS * NEW_TOKENS / statistics.median(times), "MB": resident("VmHWM") - before}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s and memory against the number of tasks, for LoRA."""
    import matplotlib
    from matplotlib.figure import Figure
    from plot import BLUE, GREY, ORANGE, STYLE

    looks = {
        "mixed": (BLUE, "o", "all tasks in one batch"),
        "switched": (ORANGE, "s", "switching adapters"),
        "copies": (GREY, "^", "one copy per task"),
    }
    counts = sorted({row["tasks"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        for axes, what, label in zip(figure.subplots(1, 2), ("tokens/s", "MB"), ("tokens/s", "memory, MB")):
            for side, (colour, marker, name) in looks.items():
                mine = [row for row in rows if row["side"] == side and row["kind"] == "lora"]
                axes.plot(
                    [row["tasks"] for row in mine],
                    [row[what] for row in mine],
                    marker,
                    ls="-",
                    color=colour,
                    label=name,
                )
            axes.set(xscale="log", xlabel="tasks", ylabel=label)
            axes.set_xticks(counts, list(map(str, counts)))
            axes.minorticks_off()
            axes.set_ylim(0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--kinds", nargs="+", default=["lora", "prompt-tuning"], choices=["lora", "prompt-tuning"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--plot", type=Path, help="Write an SVG here.")
    parser.add_argument("--repeats", type=int, default=3, help="Timed repetitions of a cell.")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        side, kind, tasks, folder = args.cell
        print(json.dumps(cell(side, kind, int(tasks), Path(folder), args.repeats)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        for kind in args.kinds:
            for task in range(max(args.tasks)):
                make_adapter(folder / "base", folder / kind / str(task), kind, task)
            for tasks in args.tasks:
                for side in args.sides:
                    if kind == "prompt-tuning" and side == "copies":
                        continue  # virtual tokens cannot be merged into a copy
                    words = [
                        sys.executable,
                        __file__,
                        "--cell",
                        side,
                        kind,
                        str(tasks),
                        name,
                        "--repeats",
                        str(args.repeats),
                    ]
                    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                    row = {"kind": kind, "side": side, "tasks": tasks, **json.loads(out.splitlines()[-1])}
                    rows.append(row)
                    print(
                        f"{kind:14s} {side:9s} {tasks:3d} tasks {row['tokens/s']:8.0f} tokens/s {row['MB']:8.0f} MB",
                        flush=True,
                    )
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
