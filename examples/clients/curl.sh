#!/usr/bin/env bash
# 用 curl 调用服务器的每个接口 / Every interface of the server with curl.  bash examples/clients/curl.sh
# Env: BASE_URL=http://127.0.0.1:19327/v1 MODEL=(the first served) API_KEY=none
set -euo pipefail
BASE_URL=${BASE_URL:-http://127.0.0.1:19327/v1}
AUTH=(-H "Authorization: Bearer ${API_KEY:-none}")
JSON=(-H "Content-Type: application/json")

call() { # path, body
  echo "== $1"
  curl --silent --show-error --fail-with-body --no-buffer "${AUTH[@]}" "${JSON[@]}" "$BASE_URL/$1" -d "$2"
  echo
}

MODELS=$(curl --silent --show-error --fail-with-body "${AUTH[@]}" "$BASE_URL/models")
echo "== models"
echo "$MODELS"
MODEL=${MODEL:-$(grep -o '"id": *"[^"]*"' <<< "$MODELS" | head -1 | cut -d'"' -f4)}

call chat/completions '{
  "model": "'"$MODEL"'",
  "messages": [
    {"role": "system", "content": "你是一个乐于助人的助手。"},
    {"role": "user", "content": "为什么要减少污染，保护环境？"}
  ],
  "max_tokens": 64, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1
}'
call chat/completions '{
  "model": "'"$MODEL"'", "stream": true, "stream_options": {"include_usage": true},
  "messages": [{"role": "user", "content": "你好"}], "max_tokens": 16
}'
call completions '{"model": "'"$MODEL"'", "prompt": "从前有一座山，", "max_tokens": 32, "stop": ["。"]}'
call embeddings '{"model": "'"$MODEL"'", "input": ["今天天气真好", "人工智能"]}'
