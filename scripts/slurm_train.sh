#!/usr/bin/env bash
# Trains on several machines under Slurm, one process per GPU:
#
#     sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 scripts/slurm_train.sh recipe.yaml [key=value ...]
#
# All machines must see the recipe, the model and the data under the same paths; only the first process writes the run
# directory. Submitting the same command again continues what the time limit or a broken machine ended: training from
# its newest checkpoint (without one at step 0), or the evaluation behind it from its last batch. A run that has all
# of it ends at once. Without --cpus-per-task a machine's task gets all CPUs that the job has there.
#
# Environment: TORCHRUN, the torchrun beside which linchain is installed; MASTER_PORT (29400).

#SBATCH --job-name=linchain
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
# Two minutes before the time limit every torchrun gets SIGTERM, and the processes finish their step and save.
#SBATCH --signal=TERM@120

set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

processes=${SLURM_GPUS_ON_NODE:-1}
# srun does not take the job's --cpus-per-task over, and gives a task one CPU when it is told nothing.
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$processes}}
threads=$((cpus / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" # torchrun would set 1
# Seconds that torchrun leaves the processes to save after SIGTERM, of the two minutes above; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-105}"

# One torchrun per machine. What failed is told, not tried again.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" "${TORCHRUN:-torchrun}" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_machine:${MASTER_PORT:-29400}" \
    --module linchain_cli train "$@" --resume
