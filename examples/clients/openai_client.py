"""The server through OpenAI's own Python client: models, chat, streams, log-probabilities, JSON, embeddings, errors.

python examples/clients/openai_client.py
OPENAI_API_KEY=secret python examples/clients/openai_client.py --base_url http://127.0.0.1:19327/v1
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence

import openai


def main(argv: Sequence[str] | None = None) -> None:
    """Call everything once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_url", default="http://127.0.0.1:19327/v1")
    parser.add_argument("--model", help="Default: the first one that the server names.")
    args = parser.parse_args(argv)
    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        names = [model.id for model in client.models.list()]
    except openai.APIConnectionError:
        sys.exit(f"error: no server answers at {args.base_url}; start scripts/openai_api_server.py")
    print("models:", ", ".join(names))
    model = args.model or names[0]
    chat(client, model)
    stream(client, model)
    answer_in_json(client, model)
    continue_text(client, model)
    embed(client, model)
    fail(client)


def chat(client: openai.OpenAI, model: str) -> None:
    """A conversation; settings that OpenAI does not have go into extra_body."""
    messages = [{"role": "system", "content": "你是一个乐于助人的助手。"}, {"role": "user", "content": "你好"}]
    reply = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=32,
        temperature=0.2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 40, "repetition_penalty": 1.1},
    )
    choice = reply.choices[0]
    print("answer:", choice.message.content, f"({choice.finish_reason}, {reply.usage.completion_tokens} tokens)")
    first = choice.logprobs.content[0]
    print(f"first token: {first.token!r}, probability {math.exp(first.logprob):.3f}")


def stream(client: openai.OpenAI, model: str) -> None:
    """An answer as it is written."""
    print("stream: ", end="")
    messages = [{"role": "user", "content": "写一首关于春天的诗"}]
    for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def answer_in_json(client: openai.OpenAI, model: str) -> None:
    """An answer that follows a JSON schema."""
    schema = {
        "type": "object",
        "properties": {"城市": {"enum": ["北京", "上海"]}, "晴": {"type": "boolean"}},
        "required": ["城市", "晴"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "北京今天晴吗？"}],
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}},
    )
    print("json:", json.loads(reply.choices[0].message.content))


def continue_text(client: openai.OpenAI, model: str) -> None:
    """A text continued as it stands, twice."""
    reply = client.completions.create(model=model, prompt="从前有一座山，", max_tokens=16, n=2, seed=1, stop=["。"])
    print("continued:", [choice.text for choice in reply.choices])


def embed(client: openai.OpenAI, model: str) -> None:
    """Vectors of length 1: their product is their cosine similarity."""
    one, other = (item.embedding for item in client.embeddings.create(model=model, input=["猫", "狗"]).data)
    print(f"embeddings: {len(one)} numbers, similarity {sum(a * b for a, b in zip(one, other, strict=True)):.3f}")


def fail(client: openai.OpenAI) -> None:
    """Errors are OpenAI's."""
    try:
        client.completions.create(model="no-such-model", prompt="x")
    except openai.NotFoundError as error:
        print("error:", error.message)


if __name__ == "__main__":
    main()
