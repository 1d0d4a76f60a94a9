#!/usr/bin/env bash
# Everything that only a GPU can prove: build, GPU tests, benchmarks, memory checker.
# Needs no network: torch, triton, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis must be installed.
#
#   scripts/gpu_check.sh OUT
#
# OUT gets gpu_check.json (what ran, how it ended, every benchmark's rows) and gpu_check.log; with OUT in
# benchmarks/results, `mmfast bench plot` makes the table in README.md of it. Each part that has ended well is remembered
# in build/gpu_check. After 480 s (GPU_CHECK_SECONDS) no part goes on; run it again, and it continues where it stopped.
# Both files are rewritten after each part.
set -uo pipefail
out=${1:?"usage: scripts/gpu_check.sh OUT (a folder for the results, as benchmarks/results/h200)"}
budget=${GPU_CHECK_SECONDS:-480}
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
  local name=$1 limit=$2 start=$SECONDS code left=$((budget - SECONDS))
  shift 2
  if grep -qs '"exit": 0,' "$work/$name.part"; then
    return
  fi
  if ((left < 5)); then
    echo "== $name: not begun, the $budget s are over; run this again"
    unfinished=3
    return
  fi
  limit=$((limit < left ? limit : left))
  echo "== $name"
  timeout "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  tail -n 4 "$work/$name.log"
  echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - start))}" >"$work/$name.part"
  "$python" scripts/gpu_report.py $work "$out"
}

unfinished=0
part build 240 "$python" -m pip install --no-build-isolation --no-deps -e .
# The tests of an op on this device are a gate of its benchmark, which runs them first; the other tests are parts here.
for file in $(grep -lE 'mark\.gpu|op_cases' tests/ops/test_*.py); do
  name=$(basename "$file" .py)
  [[ -f benchmarks/bench_${name#test_}.py ]] || part "$name" 120 "$python" -m pytest -q -m gpu "$file"
done
# Those of the table in README.md, in the order of what is least sure.
ops=(lora_linear linear_cross_entropy zero_init_attention resampler_attention spatio_temporal_pool gated_cross_attention
  mixture_adapter rms_norm rope swiglu gated_residual bias_scale_linear nf4 int8 perceiver_resampler q_former)
for op in "${ops[@]}"; do
  part "bench_$op" 90 "$python" -m mmfast bench "$op" --device cuda --quick --out $work
done
if command -v compute-sanitizer >/dev/null; then
  part sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -m gpu -k "sanitizer" -q
fi
# A step of a model of 7B, made six times: only what time is left.
part bench_train 300 "$python" -m mmfast bench train --device cuda --quick --out $work
"$python" scripts/gpu_report.py $work "$out" --table || exit
exit $unfinished
