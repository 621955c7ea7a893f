#!/bin/bash
# The second call on a borrowed GPU machine, in the project's root: vLLM beside the trainer.
BUDGET=${BUDGET:-300}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
receive base vllm

[ -e "$logs/look.log" ] || step look 40 bash -c look &
if [ ! -e "$logs/smoke_vllm.log" ]; then # on a machine that plan A has not seen
	step smoke_vllm 90 python3 "$kit/smoke_vllm.py"
	grep -E '^(ok|FAIL)' "$logs/smoke_vllm.log"
fi
wait

# An engine that sleeps beside a trainer, alone on the card; then the certificate of a small model with vLLM and, at the
# same time, a run of three steps that rolls out with it, hands over, and is certified after every hand-over.
export STREAM_TO=$OUT/tests_b.jsonl
step sleep 120 python3 -m pytest tests/gpu/test_sleep*.py -p no:cacheprovider -p benchmarks.gpu.stream \
	--timeout 115 -rfEs
[ ! -s "$STREAM_TO" ] || python3 -m benchmarks.gpu.stream "$STREAM_TO" | tee -a "$OUT/summary.txt"
step colocated 130 python3 "$kit/colocated.py" "$OUT/colocated.txt"
cat "$OUT/colocated.txt" 2>/dev/null

step parts_b "$(left)" python3 "$kit/parts.py" "$OUT" $(($(left) - 8)) handover=130 rollouts=130:quick
cat "$OUT/tables.txt" 2>/dev/null
note "the call ends"
