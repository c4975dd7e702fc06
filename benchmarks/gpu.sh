#!/usr/bin/env bash
# PPO at the size of OPT-1.3B on one GPU, in under 10 minutes; without a GPU a miniature, in under 1 minute.
#
#   bash benchmarks/gpu.sh                  prints the table and writes gpu.json to .gpu/, to $OUT if that is set,
#                                           or to the folder of --out; other options: see benchmarks/gpu.py
#   bash benchmarks/gpu.sh --tests          runs the tests that need a GPU instead
#   bash benchmarks/gpu.sh --pack [3.12]    gathers in .gpu/ what a GPU machine without a package index may lack, for
#                                           that Python: copy .gpu/ into the repository there (about 25 MB)
#
# The Python is $PYTHON, or the first of .venv, .gpu/venv and python3 whose torch sees a GPU. Missing packages are taken
# from .gpu/wheels, else from the package index into .gpu/venv. TRL 1.12.0, the last with PPO, is measured too if it is
# in .gpu/trl (or the folder of --trl), or can be downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=.gpu/wheels trl=.gpu/trl
packed="transformers trl peft accelerate datasets dill multiprocess pydantic pydantic_core annotated-types"
packed+=" typing_extensions typing-inspection orjson hjson"

fail() {
  echo "error: $1" >&2
  exit 1
}

pack() { # what our GPU machine's image lacks; it has torch, numpy, pyarrow, pandas, rich, typer
  local platforms=() python=${PYTHON:-python3}
  for name in _2_28 _2_27 _2_24 _2_17 2014 2010 1; do
    platforms+=(--platform "manylinux${name}_x86_64")
  done
  rm -rf "$wheels" "$trl" && mkdir -p "$wheels"
  # shellcheck disable=SC2086
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$1" \
    "${platforms[@]}" --constraint constraints.txt -d "$wheels" $packed
  "$python" -m pip wheel -q --no-deps --constraint constraints.txt -w "$wheels" deepspeed # there is no wheel of it
  "$python" -m pip install -q --no-deps --target "$trl" trl==1.12.0
  du -sh .gpu
}

sees_gpu() {
  "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null
}

lacks() { # packages of pyproject.toml for a PPO run that this Python lacks or has in a wrong version
  "$1" - << 'END'
import importlib.metadata, tomllib
try:
    from packaging.requirements import Requirement
except ImportError:
    raise SystemExit(print("packaging"))
needed = "torch transformers trl peft datasets accelerate deepspeed safetensors pyarrow orjson pydantic PyYAML typer rich"
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    wanted = Requirement(line)
    if wanted.name in needed.split():
        try:
            good = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            good = False
        if not good:
            print(wanted, end="  ")
END
}

make_venv() { # from $1, with the project's packages; with "keep", $1's own packages (its torch) stay visible
  echo "Installing into .gpu/venv the packages that $1 lacks" >&2
  [ "$1" = .gpu/venv/bin/python ] || "$1" -m venv --clear .gpu/venv || return 1
  if [ "${2:-}" = keep ] && [ "$1" != .gpu/venv/bin/python ]; then
    "$1" -c 'import site; print("\n".join(site.getsitepackages()))' \
      > "$(echo .gpu/venv/lib/python3*/site-packages)/outer.pth"
  fi
  .gpu/venv/bin/python -m pip install -q -e .
}

if [ "${1:-}" = --pack ]; then
  pack "${2:-3.12}"
  exit
fi

python=""
for candidate in ${PYTHON:-.venv/bin/python .gpu/venv/bin/python python3}; do
  if command -v "$candidate" > /dev/null && sees_gpu "$candidate"; then
    python=$candidate && break
  fi
done
if [ -z "$python" ]; then
  for candidate in ${PYTHON:-.venv/bin/python .gpu/venv/bin/python python3}; do
    command -v "$candidate" > /dev/null && python=$candidate && break
  done
  [ -n "$python" ] || fail "no Python found: set PYTHON"
  if nvidia-smi -L > /dev/null 2>&1; then
    make_venv "$python" || fail "no torch sees the GPU, and none can be installed"
    python=.gpu/venv/bin/python
    sees_gpu "$python" || fail "torch does not see the GPU: install a torch for its driver"
  fi
fi

if [ -n "$(lacks "$python")" ]; then
  if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  else
    make_venv "$python" keep && python=.gpu/venv/bin/python || true
  fi
fi
missing=$(lacks "$python")
[ -z "$missing" ] || fail "$python lacks: $missing
Without a package index: run 'bash benchmarks/gpu.sh --pack' on a machine that has one, and copy the folder .gpu here."

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "${1:-}" = --tests ]; then
  "$python" -m pytest -m gpu tests/test_gpu.py
  exit
fi

if [[ " $* " != *" --trl"* ]]; then
  if [ ! -d $trl/trl ] && sees_gpu "$python"; then
    "$python" -m pip install -q --no-deps --target $trl trl==1.12.0 || echo "TRL 1.12.0 cannot be downloaded" >&2
  fi
  [ ! -d $trl/trl ] || set -- --trl $trl "$@"
fi
"$python" benchmarks/gpu.py "$@"
