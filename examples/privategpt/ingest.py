"""Read a folder of documents into a local store: cut into passages, embedded by the server, kept in one file.

  python examples/privategpt/ingest.py --source_documents docs --store output/privategpt.sqlite
Files that have not changed are left alone, those that no longer exist are forgotten. Other folders can be added later.
It reads txt and md, and pdf where pypdf is installed.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import openai
from client import add_server_flags, connect, embed
from langchain_text_splitters import RecursiveCharacterTextSplitter
from store import Store

SEPARATORS = ["\n\n", "\n", "。", "！", "？", "；", ". ", "! ", "? ", "，", ", ", " ", ""]
SUFFIXES = (".txt", ".md", ".pdf")


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Bring the store up to date; returns counts of files: new, changed, unchanged, gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source_documents", required=True, help="Folder of documents, or one document.")
    parser.add_argument("--store", default="output/privategpt.sqlite", help="File of the store.")
    parser.add_argument("--chunk_size", type=int, default=500, help="Characters of a passage, at most.")
    parser.add_argument("--chunk_overlap", type=int, default=50, help="Characters that neighbours share.")
    add_server_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.chunk_overlap < args.chunk_size:
        sys.exit(f"error: --chunk_overlap {args.chunk_overlap}: need 0 or more, below --chunk_size {args.chunk_size}")
    files = find_documents(Path(args.source_documents))
    splitter = RecursiveCharacterTextSplitter(
        separators=SEPARATORS,
        keep_separator="end",
        chunk_size=args.chunk_size,
        chunk_overlap=args.chunk_overlap,
    )
    client, store = connect(args), Store(args.store)
    counts = update(store, files, splitter, client, args.model)
    store.close()
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"-> {args.store}")
    return counts


def find_documents(path: Path) -> list[Path]:
    """The documents in a folder and below, in order."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        sys.exit(f"error: --source_documents {path}: no {', '.join(SUFFIXES)} file there")
    return [file.resolve() for file in found]


def read_document(path: Path) -> str:
    """The text of a document."""
    try:
        if path.suffix.lower() == ".pdf":
            import pypdf

            return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
        return path.read_text(encoding="utf-8")
    except ImportError:
        sys.exit(f"error: {path}: PDF files need pypdf: pip install pypdf")
    except UnicodeDecodeError as error:
        sys.exit(f"error: {path} is not UTF-8: {error}")


def update(
    store: Store, files: Sequence[Path], splitter: RecursiveCharacterTextSplitter, client: openai.OpenAI, model: str
) -> dict[str, int]:
    """Add what is new, replace what has changed, forget what is gone."""
    counts = {"new": 0, "changed": 0, "unchanged": 0, "gone": 0}
    known = store.files()
    for file in files:
        state = (hashlib.sha256(file.read_bytes()).hexdigest(), model)
        before = known.pop(str(file), None)
        if before == state:
            counts["unchanged"] += 1
            continue
        texts = splitter.split_text(read_document(file))
        store.replace(str(file), *state, texts, embed(client, model, texts))
        counts["new" if before is None else "changed"] += 1
        print(f"{file}: {len(texts)} passages")
    for file in known:
        if not Path(file).exists():
            store.remove(file)
            counts["gone"] += 1
    return counts


if __name__ == "__main__":
    try:
        main()
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
