"""The server, for ingest.py and ask.py."""

import argparse
import os
import sys
from collections.abc import Sequence

import openai

BATCH = 32  # texts that are embedded by one request


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """--base_url and --model."""
    parser.add_argument("--base_url", default="http://127.0.0.1:19327/v1", help="The server, on this machine.")
    parser.add_argument("--model", help="Default: the first one that the server names.")


def connect(args: argparse.Namespace) -> openai.OpenAI:
    """The client; fills in args.model. The key is OPENAI_API_KEY; servers without keys take anything."""
    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        args.model = args.model or client.models.list().data[0].id
    except openai.APIConnectionError:
        sys.exit(
            f"error: no server answers at {args.base_url}; start scripts/openai_api_server.py, or pass --base_url"
        )
    return client


def embed(client: openai.OpenAI, model: str, texts: Sequence[str]) -> list[list[float]]:
    """A vector of each text."""
    vectors: list[list[float]] = []
    for first in range(0, len(texts), BATCH):
        reply = client.embeddings.create(model=model, input=list(texts[first : first + BATCH]))
        vectors += [item.embedding for item in reply.data]
    return vectors
