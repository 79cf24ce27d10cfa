"""Answer questions about a text file: the passages nearest to the question are found by their embeddings, then read.

  python examples/langchain/qa.py --file_path doc.txt
  python examples/langchain/qa.py --file_path doc.txt --question "李白是哪里人？" --chain_type stuff
stuff: all passages in one prompt. refine: one passage after another improves the answer. map_reduce: an answer from
each passage, then one from all of these.
"""

import sys
from collections.abc import Sequence

import openai
from common import api_key, build_parser, connect, read_passages
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

PROMPTS = {
    "zh": {
        "answer": "请只根据下面的资料回答问题；资料里没有答案，就说不知道。\n\n资料：\n{context}\n\n问题：{question}",
        "refine": "问题：{question}\n\n现有的回答：{answer}\n\n又找到一段资料：\n{context}\n\n"
        "请用这段资料补充或改正现有的回答；没有帮助就照写现有的回答。",
        "combine": "问题：{question}\n\n下面每一行是从一段资料得到的回答：\n{answers}\n\n请把它们合成一个回答。",
    },
    "en": {
        "answer": "Answer the question from this material only; if the answer is not in it, say that you do not know."
        "\n\nMaterial:\n{context}\n\nQuestion: {question}",
        "refine": "Question: {question}\n\nAnswer so far: {answer}\n\nMore material:\n{context}\n\n"
        "Complete or correct the answer with this material; if it does not help, write the same answer again.",
        "combine": "Question: {question}\n\nEach line is an answer from one piece of material:\n{answers}\n\n"
        "Make one answer of them.",
    },
}


def main(argv: Sequence[str] | None = None) -> str:
    """Answer --question, or what is typed until an empty line; returns the last answer."""
    parser = build_parser(__doc__)
    parser.add_argument("--question", help="Default: ask on the terminal.")
    parser.add_argument("--k", type=int, default=3, help="Passages that are read.")
    args = parser.parse_args(argv)
    passages = read_passages(args)
    model = connect(args)
    embeddings = OpenAIEmbeddings(
        base_url=args.base_url,
        api_key=api_key(),
        model=args.model,
        check_embedding_ctx_length=False,  # texts are sent as text, not as tokens of OpenAI's own models
    )
    store = InMemoryVectorStore.from_documents(passages, embeddings)
    chains = {name: build_chain(text, model) for name, text in PROMPTS[args.language].items()}
    answer = ""
    while question := args.question or input("\nQuestion: ").strip():
        found = store.similarity_search(question, k=args.k)
        answer = CHAINS[args.chain_type](chains, question, found)
        print(answer)
        if args.question:
            break
    return answer


def build_chain(prompt: str, model: Runnable) -> Runnable:
    """Prompt, model, text."""
    return ChatPromptTemplate.from_template(prompt) | model | StrOutputParser()


def stuff(chains: dict[str, Runnable], question: str, passages: Sequence[Document]) -> str:
    """All passages in one prompt."""
    context = "\n\n".join(passage.page_content for passage in passages)
    return chains["answer"].invoke({"context": context, "question": question})


def refine(chains: dict[str, Runnable], question: str, passages: Sequence[Document]) -> str:
    """An answer from the first passage, improved with each of the others."""
    answer = stuff(chains, question, passages[:1])
    for passage in passages[1:]:
        answer = chains["refine"].invoke({"context": passage.page_content, "question": question, "answer": answer})
    return answer


def map_reduce(chains: dict[str, Runnable], question: str, passages: Sequence[Document]) -> str:
    """An answer from each passage, at the same time, and one from all of them."""
    answers = chains["answer"].batch([{"context": p.page_content, "question": question} for p in passages])
    return chains["combine"].invoke({"answers": "\n".join(answers), "question": question})


CHAINS = {"stuff": stuff, "refine": refine, "map_reduce": map_reduce}

if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        sys.exit("\n[left]")
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
