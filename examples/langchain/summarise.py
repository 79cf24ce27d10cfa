"""Summarise a text file.

  python examples/langchain/summarise.py --file_path doc.txt
  python examples/langchain/summarise.py --file_path doc.txt --chain_type map_reduce --chunk_size 1500
stuff: the whole text in one prompt, so it must fit the model's context. refine: passage after passage. map_reduce: a
summary of each passage, then one of all summaries.
"""

import sys
from collections.abc import Sequence

import openai
from common import build_parser, connect, read_passages
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

PROMPTS = {
    "zh": {
        "summary": "请概括下面这段文字的要点。\n\n{text}",
        "refine": "现有的摘要：{summary}\n\n下面是接着的一段文字：\n{text}\n\n请把它的要点并入摘要，写出新的摘要。",
    },
    "en": {
        "summary": "Sum up the main points of this text.\n\n{text}",
        "refine": "Summary so far: {summary}\n\nThe text goes on:\n{text}\n\nWrite a new summary that has its points.",
    },
}


def main(argv: Sequence[str] | None = None) -> str:
    """Print the summary and return it."""
    args = build_parser(__doc__).parse_args(argv)
    passages = read_passages(args)
    model = connect(args)
    chains = {
        name: ChatPromptTemplate.from_template(text) | model | StrOutputParser()
        for name, text in PROMPTS[args.language].items()
    }
    summary = CHAINS[args.chain_type](chains, passages)
    print(summary)
    return summary


def stuff(chains: dict[str, Runnable], passages: Sequence[Document]) -> str:
    """The whole text in one prompt; what neighbouring passages share comes twice."""
    return chains["summary"].invoke({"text": "\n".join(passage.page_content for passage in passages)})


def refine(chains: dict[str, Runnable], passages: Sequence[Document]) -> str:
    """A summary of the first passage, to which each of the others adds."""
    summary = stuff(chains, passages[:1])
    for passage in passages[1:]:
        summary = chains["refine"].invoke({"summary": summary, "text": passage.page_content})
    return summary


def map_reduce(chains: dict[str, Runnable], passages: Sequence[Document]) -> str:
    """A summary of each passage, at the same time, and one of all of these."""
    summaries = chains["summary"].batch([{"text": passage.page_content} for passage in passages])
    return chains["summary"].invoke({"text": "\n".join(summaries)}) if len(summaries) > 1 else summaries[0]


CHAINS = {"stuff": stuff, "refine": refine, "map_reduce": map_reduce}

if __name__ == "__main__":
    try:
        main()
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
