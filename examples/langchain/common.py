"""What qa.py and summarise.py share: flags, the server, a file cut into passages."""

import argparse
import os
import sys

import openai
from langchain_core.documents import Document
from langchain_openai import ChatOpenAI
from langchain_text_splitters import RecursiveCharacterTextSplitter

# Paragraphs are kept whole where they fit, else sentences; Chinese text has no spaces to cut at.
SEPARATORS = ["\n\n", "\n", "。", "！", "？", "；", ". ", "! ", "? ", "，", ", ", " ", ""]


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--file_path", required=True, help="Text file (UTF-8).")
    parser.add_argument("--chain_type", choices=("stuff", "refine", "map_reduce"), default="refine")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="Language of the prompts.")
    parser.add_argument("--base_url", default="http://127.0.0.1:19327/v1", help="An OpenAI-compatible server.")
    parser.add_argument("--model", help="Default: the first one that the server names.")
    parser.add_argument("--chunk_size", type=int, default=600, help="Characters of a passage, at most.")
    parser.add_argument("--chunk_overlap", type=int, default=100, help="Characters that neighbours share.")
    parser.add_argument("--max_tokens", type=int, default=400, help="Longest answer, in tokens.")
    parser.add_argument("--temperature", type=float, default=0.2)
    return parser


def api_key() -> str:
    """The server's key, from OPENAI_API_KEY; servers without keys take anything."""
    return os.environ.get("OPENAI_API_KEY", "none")


def connect(args: argparse.Namespace) -> ChatOpenAI:
    """The chat model; fills in args.model."""
    try:
        args.model = args.model or openai.OpenAI(base_url=args.base_url, api_key=api_key()).models.list().data[0].id
    except openai.APIConnectionError:
        sys.exit(
            f"error: no server answers at {args.base_url}; start scripts/openai_api_server.py, or pass --base_url"
        )
    return ChatOpenAI(
        base_url=args.base_url,
        api_key=api_key(),
        model=args.model,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )


def read_passages(args: argparse.Namespace) -> list[Document]:
    """The file in passages."""
    try:
        with open(args.file_path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {args.file_path}: {error}")
    if not text.strip():
        sys.exit(f"error: {args.file_path} is empty")
    if not 0 <= args.chunk_overlap < args.chunk_size:
        sys.exit(f"error: --chunk_overlap {args.chunk_overlap}: need 0 or more, below --chunk_size {args.chunk_size}")
    splitter = RecursiveCharacterTextSplitter(
        separators=SEPARATORS, keep_separator="end", chunk_size=args.chunk_size, chunk_overlap=args.chunk_overlap
    )
    return splitter.create_documents([text])
