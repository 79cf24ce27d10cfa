#!/usr/bin/env bash
# launch SCRIPT FLAGS...: 单进程用 python，多卡多机用 torchrun / one process by python, several by torchrun.  DRY_RUN=1 prints the command.
# Sourced by the training launchers; how processes are started is decided here only.
launch() {
  local command=("${PYTHON:-python}")
  if [[ ${NPROC:-1} != 1 || ${NNODES:-1} != 1 ]]; then
    command+=(-m torch.distributed.run --nproc_per_node "${NPROC:-1}" --nnodes "${NNODES:-1}")
    if [[ ${NNODES:-1} == 1 ]]; then
      command+=(--standalone)
    else
      command+=(--node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}")
    fi
  fi
  command+=("$@")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    exec "${command[@]}"
  fi
}
