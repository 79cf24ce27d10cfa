#!/usr/bin/env bash
# Sourced by all launchers: how processes are started is decided here only.  DRY_RUN=1 prints the command.

# run SCRIPT FLAGS...: 单进程 / one process
run() {
  local command=("${PYTHON:-python}" "$@")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    exec "${command[@]}"
  fi
}

# launch SCRIPT FLAGS...: 训练，单进程用 python，多卡多机用 torchrun / training: one process by python, several by torchrun
launch() {
  if [[ ${NPROC:-1} == 1 && ${NNODES:-1} == 1 ]]; then
    run "$@"
  elif [[ ${NNODES:-1} == 1 ]]; then
    run -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes 1 --standalone "$@"
  else
    run -m torch.distributed.run --nproc_per_node "${NPROC:-1}" --nnodes "$NNODES" \
      --node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" "$@"
  fi
}
