# Sourced in the project's root by plan_a.sh and plan_b.sh: the time and the results of one call, and the packs.
#
# A GPU machine that is borrowed for minutes has no network. What the project needs there beside the machine's own
# Python travels in packs, folders of compressed modules beside this file's folder, which unpack.py turns into folders on
# PYTHONPATH. Nothing is installed.
#
#   BUDGET     seconds of this call for everything, its unpacking included
#   OUT        where results go that travel back: 8 files at most
#   GPU_PACKS  where packs are unpacked and logs and caches lie; what is there of an earlier call is used again

set -uo pipefail
SECONDS=0
BUDGET=${BUDGET:-300}
OUT=${OUT:?}
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GPU_PACKS=${GPU_PACKS:-/opt/gpu_packs}
logs=$GPU_PACKS/logs
mkdir -p "$logs" "$OUT"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$GPU_PACKS/cache/inductor TRITON_CACHE_DIR=$GPU_PACKS/cache/triton
export VLLM_CACHE_ROOT=$GPU_PACKS/cache/vllm VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_USE_FLASHINFER_SAMPLER=0 # no pack has FlashInfer, and vLLM's sampler takes it for installed
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
# Whether there is a GPU is asked in many processes that fork others afterwards. Asked by CUDA itself, that alone makes
# CUDA unusable in those; asked by NVML it does not. The servers of the tests and of the GPU check set it for themselves.
export PYTORCH_NVML_BASED_CUDA_CHECK=1

# The modules of the packs that are unpacked, but those named behind `without_`.
use_packs() {
	local pack
	PYTHONPATH=$PWD
	for pack in base te vllm; do
		[ ! -d "$GPU_PACKS/site-$pack" ] || [ "${1:-}" = "without_$pack" ] || PYTHONPATH+=:$GPU_PACKS/site-$pack
	done
	export PYTHONPATH
}

# Transformer Engine finds its libraries by name where torch has not loaded them first.
use_libraries() {
	local nvidia
	nvidia=$(python3 -c 'import importlib.util as u; print(list(u.find_spec("nvidia").submodule_search_locations)[0])' \
		2>/dev/null) || return 0
	[ -e "$CUDA_HOME/include/cuda_runtime.h" ] || export NVTE_CUDA_INCLUDE_DIR=$nvidia/cu13/include
	export LD_LIBRARY_PATH=$nvidia/cudnn/lib:$nvidia/nccl/lib:$nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

left() { echo $((BUDGET - SECONDS)); }

note() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary.txt"; }

# step NAME LIMIT COMMAND...: within LIMIT seconds and what is left; its output goes to a log. Says how it went and
# returns its exit code, 9 where it was not begun because less than a third of LIMIT, or nothing, is left.
step() {
	local name=$1 limit=$2 began=$SECONDS now code
	shift 2
	now=$(left)
	if [ "$now" -lt 1 ] || [ "$now" -lt $((limit / 3)) ]; then
		note "$name: no time left"
		return 9
	fi
	[ "$now" -gt "$limit" ] || limit=$now
	timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
	code=$?
	case $code in
		0) note "$name: ok, $((SECONDS - began)) s" ;;
		124 | 137) note "$name: CUT OFF after $((SECONDS - began)) s" ;;
		*) note "$name: FAILED with $code, $((SECONDS - began)) s" ;;
	esac
	keep_logs
	return $code
}

# All logs in one file, each by its last 300 KB. Steps that run side by side may both write it.
keep_logs() {
	local log new
	new=$(mktemp "$GPU_PACKS/logs.XXXXXX")
	for log in $(ls -tr "$logs"); do
		printf '\n======== %s\n' "$log"
		tail -c 300000 "$logs/$log"
	done >"$new"
	chmod 644 "$new"
	mv "$new" "$OUT/logs.txt"
}

# receive NEEDED...: unpacks what came with this call or an earlier one; ends the call where one of NEEDED is not whole.
receive() {
	local pack
	note "the call begins, with $BUDGET s"
	python3 "$kit/unpack.py" 2>&1 | tee -a "$OUT/summary.txt"
	use_packs
	use_libraries
	for pack in "$@"; do
		[ -d "$GPU_PACKS/site-$pack" ] || { note "$pack is not whole: the call ends"; exit 3; }
	done
	note "received; modules from ${PYTHONPATH#*:}"
}

# What the machine is.
look() {
	nvidia-smi
	python3 - <<'PYTHON'
import importlib.metadata, os, shutil, torch
print(torch.__version__, torch.version.cuda, os.cpu_count(), shutil.which("nvcc"), shutil.which("strip"))
if torch.cuda.is_available():
    print(torch.backends.cudnn.version(), torch.cuda.nccl.version())
    print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())
found = {each.name: each.version for each in importlib.metadata.distributions()}
print(*(f"{name}=={found[name]}" for name in sorted(found, key=str.lower)))
PYTHON
	python3 -m megatron_papo doctor
	df -h / /dev/shm /tmp
	free -g
}
export -f look
