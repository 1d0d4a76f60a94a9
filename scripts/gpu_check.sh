#!/usr/bin/env bash
# Everything that only a GPU can prove: build, GPU tests, benchmarks, memory checker.
# Needs no network: torch, triton, pybind11, scikit-build-core, cmake, ninja and pytest must be installed.
#
#   scripts/gpu_check.sh OUT
#
# OUT gets build.log, tests.xml, tests.log, one JSON a benchmark, sanitizer.log and summary.json. Each part's
# end is recorded, so that a run that was cut short goes on where it stopped when OUT is given again.
set -uo pipefail
out=${1:?"usage: scripts/gpu_check.sh OUT (a folder for the results)"}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check: PyTorch sees no CUDA device; this script is for a machine that has one" >&2
  exit 2
}

part() { # name, seconds allowed, command...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  if [[ -f "$out/$name.done" ]]; then
    return
  fi
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 4 "$out/$name.log"
  echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - start))}" >"$out/$name.part"
  [[ $code -eq 0 ]] && touch "$out/$name.done"
}

part build 240 "$python" -m pip install --no-build-isolation --no-deps -e .
part tests 240 "$python" -m pytest -m gpu --junitxml="$out/tests.xml"
for file in benchmarks/bench_*.py; do
  name=$(basename "$file" .py)
  # Scripts find the harness beside them, which a safe path would forbid.
  part "$name" 150 env -u PYTHONSAFEPATH "$python" "$file" --device cuda --out "$out"
done
if command -v compute-sanitizer >/dev/null; then
  part sanitizer 180 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -m gpu -k "sanitizer" -q
fi

"$python" - "$out" <<'PY'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
parts = [json.loads(path.read_text()) for path in sorted(out.glob("*.part"))]
import torch, triton

properties = torch.cuda.get_device_properties(0)
summary = {
    "device": properties.name, "torch": torch.__version__, "triton": triton.__version__,
    "cuda": torch.version.cuda, "parts": parts,
}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(f"\n{properties.name}, torch {torch.__version__}, triton {triton.__version__}")
for part in parts:
    print(f"  {part['part']:<36} {'ok' if part['exit'] == 0 else 'FAILED (%d)' % part['exit']:<12} {part['seconds']} s")
sys.exit(any(part["exit"] for part in parts))
PY
