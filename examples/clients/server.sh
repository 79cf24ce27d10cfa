#!/usr/bin/env bash
# llama.cpp 自己的服务器，以及一个 curl 例子 / llama.cpp's own server, and a call of it with curl.
#   bash examples/clients/server.sh MODEL.gguf [llama-server flags]
#   bash examples/clients/server.sh --ask "为什么要减少污染，保护环境？"
# Env: LLAMA_SERVER=llama-server HOST=127.0.0.1 PORT=8080 CONTEXT=4096 PARALLEL=4
set -euo pipefail
: "${1:?pass a GGUF file, or --ask and a question}"
HOST=${HOST:-127.0.0.1} PORT=${PORT:-8080}
if [[ $1 == --ask ]]; then
  : "${2:?pass the question too}"
  QUESTION=${2//\\/\\\\}
  QUESTION=${QUESTION//\"/\\\"}
  exec curl --silent --show-error --fail-with-body "http://$HOST:$PORT/v1/chat/completions" \
    -H "Content-Type: application/json" \
    -d '{"messages": [{"role": "user", "content": "'"$QUESTION"'"}], "max_tokens": 128, "temperature": 0.2}'
fi
MODEL=$1
shift
LLAMA_SERVER=${LLAMA_SERVER:-llama-server}
command -v "$LLAMA_SERVER" > /dev/null || {
  echo "$LLAMA_SERVER not found: install llama.cpp, or set LLAMA_SERVER" >&2
  exit 2
}
# --ctx-size is what all requests share.
exec "$LLAMA_SERVER" --model "$MODEL" --host "$HOST" --port "$PORT" --jinja --ctx-size "${CONTEXT:-4096}" \
  --parallel "${PARALLEL:-4}" --kv-unified "$@"
