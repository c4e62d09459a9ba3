#!/usr/bin/env bash
# Runs commands side by side on the GPUs of one machine.
#
#     tests/bench/lanes.sh OUT SECONDS <tests/bench/bars.lanes
#
# A line is `GPUS NAME COMMAND`, GPUS such as 0 or 2,3. Lines of the same GPUS run one after the
# other, those of others beside them. Each writes OUT/NAME.log; the word OUT in a command becomes
# OUT's path. After SECONDS whatever still runs gets an interrupt, and nothing more is started.
# Exits with 1 where a command failed or was not started.
set -uo pipefail
out=$(realpath -m "$1") limit=$2
mkdir -p "$out"
end=$((SECONDS + limit))

lane() { # GPUS, its lines on stdin
    local name command left code begin failed=0
    while read -r name command; do
        left=$((end - SECONDS)) begin=$SECONDS code=0
        ((left > 5)) || { echo "== $name: no time left"; failed=1; continue; }
        CUDA_VISIBLE_DEVICES=$1 timeout -s INT -k 10 "$left" bash -c "${command//OUT/$out}" \
            >"$out/$name.log" 2>&1 </dev/null || code=$?
        echo "== $name: exit $code after $((SECONDS - begin)) s"
        ((code == 0)) || failed=1
    done
    return $failed
}

lanes=()
lines=$(grep -v '^ *\(#\|$\)' /dev/stdin)
for gpus in $(cut -d' ' -f1 <<<"$lines" | sort -u); do
    grep "^$gpus " <<<"$lines" | cut -d' ' -f2- | lane "$gpus" &
    lanes+=($!)
done
failed=0
for pid in "${lanes[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
