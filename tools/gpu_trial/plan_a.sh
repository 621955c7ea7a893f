#!/bin/bash
# The first call on a borrowed GPU machine, in the project's root: Megatron-Core and Transformer Engine.
BUDGET=${BUDGET:-420}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
receive base

# Does what came along compute at all? Nothing else says more about the rest.
step look 40 bash -c look &
[ ! -d "$GPU_PACKS/site-vllm" ] || step smoke_vllm 90 python3 "$kit/smoke_vllm.py" &
te=
if [ ! -d "$GPU_PACKS/site-te" ]; then te=without_te; else
	step smoke_te 60 python3 "$kit/smoke_te.py" || te=without_te
fi
wait
grep -hE '^(ok|FAIL)' "$logs"/smoke_*.log 2>/dev/null
[ -z "$te" ] || note "Transformer Engine is not here or does not compute: the rest goes without it"
use_packs $te

# Correctness, then figures, the most wanted first; each part says which of its rows it could not make. Quick checks
# leave out the tests of vLLM's sleep, which plan B has.
fp8=fp8=140
[ -z "$te" ] || fp8=
step parts "$(left)" python3 "$kit/parts.py" "$OUT" $(($(left) - 8)) checks=150:quick update=130 $fp8 head=40:quick \
	attention=60:quick memory=90
cat "$OUT/tables.txt" 2>/dev/null
note "the call ends"
