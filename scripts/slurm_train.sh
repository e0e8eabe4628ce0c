#!/usr/bin/env bash
# Trains on several machines under Slurm, one process per GPU:
#
#     sbatch --nodes 2 --gpus-per-node 8 scripts/slurm_train.sh recipe.yaml [key=value ...]
#
# All machines must see the recipe, the model and the data under the same paths; only the first process writes the run
# directory. Submitting the same command again continues a run that the time limit or a broken machine ended: without
# a checkpoint --resume starts at step 0, and a finished run ends at once.
#
# Environment: TORCHRUN, the torchrun beside which linchain is installed; MASTER_PORT (29400).

#SBATCH --job-name=linchain
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
# Two minutes before the time limit every torchrun gets SIGTERM, and the processes finish their step and save.
#SBATCH --signal=TERM@120

set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun per machine. What failed is told, not tried again.
exec srun --kill-on-bad-exit=1 "${TORCHRUN:-torchrun}" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_machine:${MASTER_PORT:-29400}" \
    --module linchain_cli train "$@" --resume
