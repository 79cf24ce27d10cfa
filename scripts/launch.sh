#!/usr/bin/env bash
# Sourced by all launchers: how processes are started is decided here only.  DRY_RUN=1 prints the command.
# PLAN=1: 不训练，估算显存 / instead of training, plan_memory.py says what the command will need.

# --help: 打印启动脚本开头的说明 / print the head of the launcher that sourced this, in both languages.
for word in "$@"; do
  if [[ $word == --help || $word == -h ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
    # shellcheck disable=SC2016  # the launcher's own $HERE is looked for
    script=$(sed -n 's/.*\$HERE\/\([a-z0-9_]*\.py\).*/\1/p' "${BASH_SOURCE[1]}" | tail -n 1)
    echo "全部参数 / every flag: python scripts/${script:-plan_memory.py} --help;  报错 / errors: docs/faq.md, docs/faq_EN.md"
    exit
  fi
done

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
  if [[ ${PLAN:-0} == 1 ]]; then
    run "$HERE/plan_memory.py" "$(basename "$1" .py)" "${@:2}" --processes $((${NPROC:-1} * ${NNODES:-1}))
  elif [[ ${NPROC:-1} == 1 && ${NNODES:-1} == 1 ]]; then
    run "$@"
  elif [[ ${NNODES:-1} == 1 ]]; then
    run -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes 1 --standalone "$@"
  else
    run -m torch.distributed.run --nproc_per_node "${NPROC:-1}" --nnodes "$NNODES" \
      --node_rank "${NODE_RANK:?}" --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" "$@"
  fi
}
