#!/bin/bash
# Two machines of eight GPUs under Slurm:  sbatch examples/cluster/slurm.sh run.yaml
#SBATCH --job-name=lorikit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue

# Slurm sends SIGTERM two minutes before the time is up, and the run saves. The same command, submitted again, goes on; --requeue
# does that after a preemption or a lost node, not at the time limit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m lorikit train "$1"
