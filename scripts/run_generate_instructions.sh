#!/usr/bin/env bash
# 用服务器上的模型生成指令数据 / Self-Instruct through a server.  SERVER=https://api.openai.com/v1#MODEL bash scripts/run_generate_instructions.sh [any generate_instructions.py flag]
# 必填 / required: SERVER 兼容 OpenAI 的服务器地址 (可加 #模型名) URL, or URL#MODEL, of an OpenAI-compatible server; 密钥 / key: OPENAI_API_KEY
# 可选 / optional: LANGUAGE_OF_TASKS=zh (en) SEEDS=examples/data/instructions/seed_tasks.json OUT=output/instructions MAX_TASKS=1000; DRY_RUN=0
# 写出 / writes: OUT: instructions.json，sft.py 可以直接读 which sft.py reads, 以及可续跑的记录 and the record to go on from
# 常用 / often used: --max_cost 最多花多少 at most so much, --price_in 每百万输入词元的价格 price of a million tokens read, --price_out 写出的 of those written, --num_connections 同时几个请求 requests at once
# 例 / example (不需要 make demo  without make demo): SERVER=http://127.0.0.1:8000/v1 bash scripts/run_generate_instructions.sh --max_tasks 50
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${SERVER:?set SERVER to the URL of an OpenAI-compatible server, or URL#MODEL}"
run "$HERE/generate_instructions.py" --server_url "$SERVER" --language "${LANGUAGE_OF_TASKS:-zh}" \
  --seed_tasks "${SEEDS:-$HERE/../examples/data/instructions/seed_tasks.json}" --output_dir "${OUT:-output/instructions}" \
  --max_tasks "${MAX_TASKS:-1000}" "$@"
