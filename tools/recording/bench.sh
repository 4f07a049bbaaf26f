#!/usr/bin/env bash
# On the air-gapped host: measure rows of `make bench`, one worker per GPU, while the time suffices; again for the rest.
#
#   tools/recording/bench.sh SECONDS OUT kd-step/ours:130 ...      row:seconds it is expected to take, all seeds together
#
# Each worker takes the next row that still fits: name the longest first. OUT/bench.tar.gz holds the raw figures so far
# and, once all workers are done, results/ with them: unpack it over the repository at home.
set -uo pipefail
begin=$SECONDS; budget=${1:?usage: bench.sh SECONDS OUT ROW:SECONDS ...}; out=${2:?}; shift 2
host=${HOST:-/tmp/host}; mkdir -p "$host/rows" "$host/work/bench" "$out"
export PYTHONPATH=$host/site:$PWD COURSE_WORK=$host/work HF_HUB_OFFLINE=1 CI=1 TQDM_DISABLE=1 OMP_WAIT_POLICY=PASSIVE
cards=${CARDS:-$(nvidia-smi --list-gpus | wc -l)}; cores=$(($(nproc) / cards))

left() { echo $((budget - (SECONDS - begin))); }
bench() { timeout $(($(left) - 5)) python3 -m benchmarks.bench --profile gpu --limit "$(left)" "$@"; }
pack() { flock "$host/rows" tar -czf "$out/bench.tar.gz" --exclude=baseline.pt -C "$host" work/bench -C "$PWD" results; }

work() { # on one card with its share of the cores; a row belongs to whoever makes its folder
    export CUDA_VISIBLE_DEVICES=$1; shift
    for item in "$@"; do
        name=${item%:*}; mine=$host/rows/${name//[\/ ,]/_}
        [ "$(left)" -ge "${item##*:}" ] && mkdir "$mine" 2>/dev/null || continue
        bench --only "$name" > "$mine/log" 2>&1
        echo "card $CUDA_VISIBLE_DEVICES, $name: status $?, $((SECONDS - begin)) s; $(grep -h "$name, seed" "$mine/log" | tail -c 300)"
        pack
    done
}

CUDA_VISIBLE_DEVICES=0 bench --only original > "$host/rows/original.log" 2>&1 || tail -c 1500 "$host/rows/original.log"
for card in $(seq 0 $((cards - 1))); do
    (taskset -pc $((card * cores))-$((card * cores + cores - 1)) $BASHPID > /dev/null; work "$card" "$@") &
done
wait
budget=$((budget + 60)) bench --only original --record > "$host/rows/original.log" 2>&1
tail -n 12 "$host/rows/original.log"
pack
