#!/usr/bin/env bash
# The GPU suite, by `make test-gpu`: accuracy, repeatability, isolation, and NVIDIA's sanitizer on
# two shapes. PY is the interpreter; QUICK=1 leaves out the sanitizer.
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
workers=()
"$PY" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 16 ? 4 : 8))" -p no:benchmark)
fast=()
[ -z "${QUICK:-}" ] || fast=(--ignore tests/reliability/test_sanitizers.py)
step 450 "pytest -m gpu" "$PY" -m pytest -v -m gpu "${workers[@]}" "${fast[@]}" --durations=8 "$@"
exit "$failed"
