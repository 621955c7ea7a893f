# What every job script ends with: `source .../slurm/launch.sh [key.path=value ...]`. From the batch host it
#
#   1. finds the project, loads modules, the virtual environment or the container's flags, and fabric.sh;
#   2. has one process on one node check everything that can be checked before ranks start (`papo check`);
#   3. hands over to `megatron_papo.cluster.supervise`, which starts one rank a GPU by srun, writes their logs by rank,
#      watches them, saves and queues the job again when Slurm says that its time is nearly up.
#
# What is missing ends the job in one line. The job script describes the environment by plain variables:
#
#   PAPO_CONFIG        the YAML file of settings
#   PAPO_ENVIRONMENT   venv, modules, container (pyxis) or apptainer
#   PAPO_VENV          folder of the virtual environment, from PAPO_HOME on (venv; with modules where it is not empty)
#   PAPO_MODULES       names of environment modules, loaded in this order (any environment)
#   PAPO_CONTAINER     image for srun --container-image, of pyxis (container), or for `apptainer exec` (apptainer)
#   PAPO_MOUNTS        more folders for it, HOST:CONTAINER or HOST:CONTAINER:ro, by commas; project and working folder
#                      are there anyway. Scripts made by submit_slurm.py list every folder that the settings name
#   PAPO_SECRETS       a file of lines NAME=value with keys and tokens for the ranks, that only its owner can read
#   PAPO_PYTHON        the interpreter of the ranks; by default the virtual environment's, else python3
#   PAPO_HOST_PYTHON   the interpreter of the batch host, when its python3 is too old and ranks run in a container
#   PAPO_HOME          the project's folder, which the job script has found
#   papo_setup         a function with shell lines of this cluster, called after modules and environment
#
# The batch host itself needs python3 (3.9 or later) and nothing installed, also when ranks run in a container.

# Slurm may ask for a save before there is anything to save: that would end a shell.
trap 'papo_asked=1' USR1

papo_refuse() { echo "papo: error: $*" >&2; exit 2; }

papo_modules() {
  [ -n "${PAPO_MODULES:-}" ] || return 0
  local init name names said
  if ! type module >/dev/null 2>&1; then # a batch shell is no login shell
    for init in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do [ ! -r "$init" ] || . "$init"; done
  fi
  type module >/dev/null 2>&1 || papo_refuse "cluster.modules: there is no command 'module' on $(hostname)"
  said=$(mktemp) || papo_refuse "TMPDIR: no temporary file can be made on $(hostname)"
  read -ra names <<<"$PAPO_MODULES" # not split as words of the shell, which would take a * for file names
  for name in "${names[@]}"; do # old versions print ERROR and return 0
    module load "$name" 2>"$said" && ! grep -q ERROR "$said" ||
      papo_refuse "cluster.modules: module load $name: $(tr '\n' ' ' <"$said")"
  done
  rm -f "$said"
}

papo_venv() {
  case $PAPO_VENV in /*) ;; *) PAPO_VENV=$PAPO_HOME/$PAPO_VENV ;; esac
  [ -x "$PAPO_VENV/bin/python" ] ||
    papo_refuse "cluster.venv: no virtual environment in $PAPO_VENV; 'make gpu-venv' in $PAPO_HOME makes one"
  export VIRTUAL_ENV=$PAPO_VENV PATH=$PAPO_VENV/bin:$PATH
  : "${PAPO_PYTHON:=$PAPO_VENV/bin/python}"
}

papo_image() { # what both kinds of container need; leaves their mounts in $papo_mounts
  [ -n "${PAPO_CONTAINER:-}" ] || papo_refuse "cluster.container: names no image"
  case $PAPO_HOME$PWD in *[,:]*) papo_refuse "cluster.container: $PAPO_HOME, $PWD: mounts are told apart by , and :" ;; esac
  case $PAPO_CONTAINER in
    /* | ./*) [ -e "$PAPO_CONTAINER" ] || papo_refuse "cluster.container: $PAPO_CONTAINER: no such image" ;;
  esac
  papo_mounts=$PAPO_HOME:$PAPO_HOME,$PWD:$PWD${PAPO_MOUNTS:+,$PAPO_MOUNTS}
}

papo_container() { # adds to papo_srun
  srun --help 2>/dev/null | grep -q -- --container-image ||
    papo_refuse "cluster.environment=container: srun knows no --container-image; pyxis is not installed on this cluster"
  papo_srun+=("--container-image=$PAPO_CONTAINER" "--container-workdir=$PWD" --no-container-mount-home
    "--container-mounts=$papo_mounts"
    "--container-env=PYTHONPATH") # an image's own value would hide the project's
}

papo_apptainer() { # leaves the words before the ranks' interpreter in papo_within
  local program
  program=$(command -v apptainer || command -v singularity) ||
    papo_refuse "cluster.environment=apptainer: neither apptainer nor singularity is in PATH on $(hostname)"
  papo_within=("$program" exec --nv --no-home --pwd "$PWD" --bind "$papo_mounts" --env "PYTHONPATH=$PYTHONPATH"
    "$PAPO_CONTAINER")
}

papo_check() { # settings and facts; leaves the resolved settings in $papo_settings and the run's folder in $papo_run
  local said
  papo_settings=$(mktemp) && said=$(mktemp) || papo_refuse "TMPDIR: no temporary file can be made on $(hostname)"
  if ! srun "${papo_srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    "${papo_within[@]}" "$PAPO_PYTHON" -m megatron_papo check "$PAPO_CONFIG" "$@" --json >"$papo_settings" 2>"$said"; then
    grep '^papo: ' "$said" >&2 || cat "$said" >&2 # srun's own line on the exit status adds nothing to ours
    exit 2
  fi
  cat "$said" >&2
  papo_run=$("$papo_host_python" -c 'import json, os, sys
sys.stdout.buffer.write(os.fsencode(json.load(sys.stdin)["run"]["dir"]))' <"$papo_settings") && [ -n "$papo_run" ] ||
    papo_refuse "run.dir: not understood on $(hostname)"
  mkdir -p -- "$papo_run/cluster" && mv -- "$papo_settings" "$papo_run/cluster/settings.json" && rm -f "$said" ||
    papo_refuse "run.dir: $papo_run: cannot be written to from $(hostname)"
  papo_settings=$papo_run/cluster/settings.json
}

[ -n "${SLURM_JOB_ID:-}" ] || papo_refuse "not within a Slurm job: sbatch $0"
[ -f "$PAPO_CONFIG" ] || papo_refuse "$PAPO_CONFIG: no such config file"
papo_srun=(--export=ALL) # after sbatch --export=NONE a step would have no PATH
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || papo_srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun does not inherit it
export PYTHONPATH=$PAPO_HOME${PYTHONPATH:+:$PYTHONPATH}

papo_within=()
papo_modules
case ${PAPO_ENVIRONMENT:=venv} in
  venv) : "${PAPO_VENV:=.venv}"; papo_venv ;;
  modules) [ -z "${PAPO_VENV:-}" ] || papo_venv ;;
  container) papo_image; papo_container ;;
  apptainer) papo_image; papo_apptainer ;;
  *) papo_refuse "cluster.environment: $PAPO_ENVIRONMENT is none of venv, modules, container, apptainer" ;;
esac
: "${PAPO_PYTHON:=python3}"
. "$PAPO_HOME/slurm/fabric.sh"
! type papo_setup >/dev/null 2>&1 || papo_setup

papo_host_python=$(command -v "${PAPO_HOST_PYTHON:-python3}") ||
  papo_refuse "there is no ${PAPO_HOST_PYTHON:-python3} on $(hostname)"
"$papo_host_python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
  papo_refuse "$papo_host_python on $(hostname) is older than 3.9; PAPO_HOST_PYTHON names another"

if [ -n "${PAPO_SECRETS:-}" ]; then # from a pipe: no value is an argument of a process
  papo_secrets=$("$papo_host_python" -m megatron_papo.cluster.secrets_file "$PAPO_SECRETS") || exit 2
  eval "$papo_secrets"
  unset papo_secrets
fi

# What Slurm really gave: --nodes and --gpus-per-node behind sbatch win over the settings.
papo_tasks=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
papo_gpus=${SLURM_GPUS_PER_NODE:-} # may name a kind: h100:8
papo_gpus=${papo_gpus##*:}
if [ -z "$papo_gpus" ]; then # by --gres; with --exclusive Slurm gives all GPUs of a node, asked for or not
  if [ "${SLURM_GPUS_ON_NODE:-0}" = "$papo_tasks" ]; then papo_gpus=$papo_tasks; else papo_gpus=0; fi
fi
papo_facts=("cluster.nodes=$SLURM_JOB_NUM_NODES" "cluster.ranks_per_node=$papo_tasks" "cluster.gpus_per_node=$papo_gpus")

papo_check "$@" "${papo_facts[@]}"
# for `submit_slurm.py list`; where a cluster forbids it, the list does not know this run's folder
papo_job=$SLURM_JOB_ID
# one task of an array has the array's number, which would mean all tasks
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || papo_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
scontrol update "JobId=$papo_job" "Comment=papo:$(realpath -- "$papo_run")" 2>/dev/null || true
if "$papo_host_python" -m megatron_papo.cluster.finished "$papo_settings"; then exit 0; fi

trap '' USR1 # until the supervisor listens
exec "$papo_host_python" -m megatron_papo.cluster.supervise --settings "$papo_settings" ${papo_asked:+--save-asked} \
  --ranks $((papo_tasks * SLURM_JOB_NUM_NODES)) "${papo_srun[@]/#/--srun=}" -- \
  "${papo_within[@]}" "$PAPO_PYTHON" -m megatron_papo train "$PAPO_CONFIG" "$@" "${papo_facts[@]}"
