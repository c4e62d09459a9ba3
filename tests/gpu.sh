#!/usr/bin/env bash
# The GPU suite, by `make test-gpu`: accuracy, repeatability, isolation, and NVIDIA's sanitizer on
# two shapes. PY is the interpreter; QUICK=1 leaves out the sanitizer. The whole suite also notes the
# outcome of every scenario in docs/results/<device>/reliability.json.
set -uo pipefail
PY=${PY:-python}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# XLA's own products are not under test: choosing the fastest of each takes most of the time.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0"
failed=0

step() {  # step SECONDS NAME COMMAND...
    local limit=$1 name=$2 begin=$SECONDS
    shift 2
    timeout "$limit" "$@"
    local code=$?
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    [ "$code" -eq 0 ] || failed=1
}

# Most of the time goes into compilation, on one core each: up to eight workers share the GPU.
many=$(($(nproc) < 16 ? 4 : 8))
"$PY" -c 'import xdist' 2>/dev/null || many=0
if [ -z "${QUICK:-}" ] && [ $many -gt 0 ] && [ $# -eq 0 ]; then
    step 470 "GPU suite" "$PY" -m tests.reliability.scoreboard --gpu --workers $many
else
    spread=() fast=()
    [ $many -eq 0 ] || spread=(-n $many -p no:benchmark)
    [ -z "${QUICK:-}" ] || fast=(--ignore tests/reliability/test_sanitizers.py)
    step 470 "GPU suite" "$PY" -m pytest -v -m gpu "${spread[@]}" "${fast[@]}" --durations=8 "$@"
fi
exit "$failed"
