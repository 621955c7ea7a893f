#!/bin/bash
# PAPO_G for Qwen3-VL-32B by Slurm. From the project's folder:
#
#   sbatch slurm/papo_qwen3_vl_32b.sh model.path=/data/Qwen3-VL-32B-Instruct run.dir=/scratch/papo_g_qwen3_vl_32b
#
# Settings are written behind it (docs/configuration.md), Slurm's own flags before it (`sbatch --nodes=2 slurm/...`).
# `tools/submit_slurm.py examples/papo_g_qwen3_vl_32b.yaml` submits the same: checked first, followed, resumed.
#
# It needs
#   GPUs       32 of 80 GB on four nodes, NVLink within a node and InfiniBand or the like between them (67 GiB of each
#              are counted, about 3 more estimated; the arithmetic stands in examples/_qwen3_vl_32b.yaml)
#   host       62 GiB of memory a node for the reference policy, and what 384 prompts with their pictures take
#   disk       435 GiB a checkpoint, of which up to four stand at a time (checkpoint.keep_last, keep_best); 62 GiB
#              for the exported model; one folder that all nodes share
#   model      model.path: hf download Qwen/Qwen3-VL-32B-Instruct --local-dir /data/Qwen3-VL-32B-Instruct
#   data       PAPOGalaxy/PAPO_ViRL39K_train and PAPOGalaxy/PAPO_MMK12_test from the hub, or folders with their parquet
#              files: data.train=/data/PAPO_ViRL39K_train data.eval=/data/PAPO_MMK12_test
#   software   a virtual environment by `make gpu-venv` in the project's folder, modules, or a container (below)
#
#SBATCH --job-name=papo_g_qwen3_vl_32b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log

# sbatch runs a copy of this file: the project is where it was submitted from, or where the original lies.
for PAPO_HOME in "${PAPO_HOME:-}" "${SLURM_SUBMIT_DIR:-}" \
  "$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's|^ *Command=\([^ ]*\)/slurm/[^ /]*\.sh.*|\1|p')"; do
  [ ! -f "$PAPO_HOME/slurm/launch.sh" ] || break
done
[ -f "$PAPO_HOME/slurm/launch.sh" ] || { echo "papo: error: submit from the project's folder, by sbatch" >&2; exit 2; }

# The environment of the ranks; export one of these before sbatch to change it. launch.sh says what each means.
: "${PAPO_CONFIG:=$PAPO_HOME/examples/papo_g_qwen3_vl_32b.yaml}"
: "${PAPO_ENVIRONMENT:=venv}" # venv, modules or container
: "${PAPO_VENV=.venv}"
: "${PAPO_MODULES=}"
: "${PAPO_CONTAINER=}"
: "${PAPO_MOUNTS=}"

source "$PAPO_HOME/slurm/launch.sh" "$@"
