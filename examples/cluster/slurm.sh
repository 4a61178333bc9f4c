#!/bin/bash
# Two machines of eight GPUs under Slurm:  sbatch examples/cluster/slurm.sh run.yaml
#SBATCH --job-name=lorikit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue

# Slurm sends SIGTERM two minutes before the time is up; the run saves and ends with 75, and goes on when it is queued again.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m lorikit train "$1"
