#!/usr/bin/env bash
# Everything that only a GPU can prove: build, GPU tests, benchmarks, memory checker.
# Needs no network: torch, triton, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis must be installed.
#
#   scripts/gpu_check.sh OUT
#
# OUT gets gpu_check.json (what ran, how it ended, every benchmark's rows) and gpu_check.log. Each part that has ended
# well is remembered in build/gpu_check, so that a run that was cut short goes on where it stopped; both files are
# rewritten after each part.
set -uo pipefail
out=${1:?"usage: scripts/gpu_check.sh OUT (a folder for the results)"}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check: PyTorch sees no CUDA device; this script is for a machine that has one" >&2
  exit 2
}

# What was measured on other code must not be taken for this code's.
work=build/gpu_check
revision=$(cat csrc/*.* csrc/*/* kernels/*.py mmfast/ops/*.py benchmarks/*.py tests/ops/*.py tests/shared/*.py | sha256sum | cut -c1-16)
[[ "$(cat $work/revision 2>/dev/null)" == "$revision" ]] || rm -rf $work
mkdir -p $work
echo "$revision" >$work/revision

part() { # name, seconds allowed, command...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  if grep -qs '"exit": 0,' "$work/$name.part"; then
    return
  fi
  echo "== $name"
  timeout "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  tail -n 4 "$work/$name.log"
  echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - start))}" >"$work/$name.part"
  "$python" scripts/gpu_report.py $work "$out"
}

part build 240 "$python" -m pip install --no-build-isolation --no-deps -e .
# One part a file: compiling the kernels' many forms takes most of the time, and what is done need not be done again.
for file in $(grep -lE 'mark\.gpu|op_cases' tests/ops/test_*.py); do
  part "$(basename "$file" .py)" 300 "$python" -m pytest -m gpu "$file"
done
for file in benchmarks/bench_*.py; do
  # bench_train makes three models of 7B.
  part "$(basename "$file" .py)" "$([[ $file == */bench_train.py ]] && echo 540 || echo 120)" "$python" "$file" --device cuda --out $work
done
if command -v compute-sanitizer >/dev/null; then
  part sanitizer 180 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -m gpu -k "sanitizer" -q
fi
"$python" scripts/gpu_report.py $work "$out" --table
