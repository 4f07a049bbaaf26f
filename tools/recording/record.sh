#!/usr/bin/env bash
# On the air-gapped host: record notebooks one after the other while the time suffices; call it again for the rest.
#
#   tools/recording/record.sh SECONDS OUT 3.1-01:60 A-A1:120 ...      notebook:seconds it is expected to take
#
# After each one, OUT/recorded.tar.gz holds all notebooks recorded so far, the figures of all of them and the executed
# copies, which know every cell's seconds, so that a host that is taken away loses at most the one under way. Bring it
# home with tools/recording/merge.py.
set -uo pipefail
begin=$SECONDS; budget=${1:?usage: record.sh SECONDS OUT NOTEBOOK:SECONDS ...}; out=${2:?}; shift 2
host=${HOST:-/tmp/host}; mkdir -p "$host/recorded" "$out"
export PYTHONPATH=$host/site:$PWD COURSE_WORK=$host/work HF_HUB_OFFLINE=1 CI=1 TQDM_DISABLE=1 OMP_WAIT_POLICY=PASSIVE
for item in "$@"; do
    name=${item%%:*}; left=$((budget - (SECONDS - begin)))
    [ -e "$host/recorded/$name.done" ] && continue
    if [ $left -lt "${item##*:}" ]; then echo "$name: $left s are too few"; break; fi
    lab=${name%-*}; notebook=${name#*-}; folder=Lab-$lab; [ "$lab" = A ] && folder=Advanced
    timeout $((left - 5)) python3 -m tools.run --record --gpu-memory 15 --lab "$lab" --notebook "$notebook" \
        > "$host/recorded/$name.log" 2>&1
    status=$?; echo "$name: status $status, $((SECONDS - begin)) s"
    if [ $status = 0 ]; then
        cp --parents 03-Model_Compression/"$folder"*/"$notebook"*.ipynb "$host/recorded/"
        touch "$host/recorded/$name.done"
    else
        tail -c 1500 "$host/recorded/$name.log"
    fi
    tar -czf "$out/recorded.tar.gz" -C "$host" recorded work/results work/runs
done
