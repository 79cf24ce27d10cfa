#!/usr/bin/env bash
# 下载模型或数据集 / Download a model or a data set.  REPO=Qwen/Qwen2.5-0.5B bash scripts/run_download.sh [any download.py flag]
# 必填 / required: REPO 网站上的 所有者/名字 owner/name on the hub
# 可选 / optional: HUB=huggingface (modelscope) KIND=model (dataset) OUT=output/models/NAME REVISION 分支、标签或提交 branch, tag or commit; DRY_RUN=0
#   环境变量 / environment: HF_ENDPOINT 镜像 mirror, HF_TOKEN, MODELSCOPE_API_TOKEN.  中断后重新运行即可继续 / run it again to go on after an interruption
# 写出 / writes: OUT: 整个模型或数据集，校验过 the whole model or data set, checked
# 常用 / often used: --include 只要哪些文件 which files alone, --exclude 不要哪些 which not, --dry_run 只列出 list only, --overwrite 替换 replace
# 例 / example (不需要 make demo  without make demo): REPO=Qwen/Qwen2.5-0.5B-Instruct bash scripts/run_download.sh --dry_run
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${REPO:?set REPO to OWNER/NAME as the hub has it}"
run "$HERE/download.py" --repo_id "$REPO" --hub "${HUB:-huggingface}" --kind "${KIND:-model}" ${OUT:+--output_dir "$OUT"} \
  ${REVISION:+--revision "$REVISION"} "$@"
