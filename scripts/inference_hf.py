"""Ask a model: one prompt, a file of them, or a conversation -> answers on the screen or in a predictions file.

  python scripts/inference_hf.py --base_model MERGED --with_prompt --interactive
  python scripts/inference_hf.py --base_model BASE --lora_model ADAPTER --with_prompt --data_file questions.txt
Without --with_prompt texts are continued as they stand. An interrupted file run goes on when it is run again.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.arguments import (
    GenerationArguments,
    InferenceArguments,
    arg,
    describe_arguments,
    raise_problems,
    run,
    select_gpus,
)
from utils.files import (
    BadText,
    InputError,
    hash_json,
    iter_document_batches,
    iter_records,
    list_data_files,
)
from utils.predictions import Predictions, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.generation import Completion, Generator

logger = logging.getLogger("inference_hf")

SAMPLE_QUESTION = "为什么要减少污染，保护环境？"
# Settings that change where and how fast an answer is made, not which answer it is.
PLACE_SETTINGS = ("gpus", "only_cpu", "load_in_4bit", "load_in_8bit", "attn_implementation")


@dataclass
class TaskArguments:
    """What is asked, and where the answers go."""

    prompt: str | None = arg(help="Ask this one question; its answer is printed as it is written.")
    data_file: str | None = arg(
        help="File or folder of questions: txt (one a line), or json, jsonl, parquet with instruction (and input), "
        "messages or conversations. Without it, --prompt and --interactive: one sample question."
    )
    interactive: bool = arg(
        False, help="A conversation on the screen; an empty line or /exit ends it, /clear resets it."
    )
    with_prompt: bool = arg(False, help="Put questions into the prompt template; off: continue the text as it stands.")
    predictions_file: str | None = arg(
        help='Where answers go: .json, a list of {"Input", "Output"}, or .jsonl; default with --data_file: '
        "predictions.json."
    )
    batch_size: int = arg(1, help="Questions answered at once; memory grows with it, answers do not change.")
    overwrite: bool = arg(
        False, help="Replace a predictions file that is finished or holds other answers; an unfinished one goes on."
    )
    on_bad_text: Literal["error", "skip"] = arg("error", help="Invalid UTF-8: stop with file:line, or skip and count.")

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(f"--batch_size {self.batch_size}: need at least 1")
        if sum((self.prompt is not None, self.data_file is not None, self.interactive)) > 1:
            problems.append("--prompt, --data_file and --interactive exclude each other; pass one")
        if self.interactive and self.predictions_file:
            problems.append("--interactive writes no --predictions_file; pass --data_file for one")
        if self.predictions_file and Path(self.predictions_file).suffix not in (".json", ".jsonl"):
            problems.append(f"--predictions_file {self.predictions_file}: need a name that ends in .json or .jsonl")
        raise_problems(problems)


def main(model_args: InferenceArguments, settings: GenerationArguments, task: TaskArguments) -> dict[str, Any]:
    """Answer; returns how many answers there are, and how fast they came."""
    select_gpus(model_args)  # before torch is imported
    from utils.generation import Generator
    from utils.inference import check_inference_request, find_inference_files, load_for_inference
    from utils.tokenization import load_tokenizer

    questions = [] if task.interactive else read_questions(task)
    model_args = find_inference_files(model_args)
    assert model_args.tokenizer_name_or_path is not None
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    config = check_inference_request(model_args, tokenizer)
    template = choose_template(model_args, tokenizer) if task.with_prompt else None
    prompts = [encode_question(question, model_args, template, tokenizer) for question in questions]
    check_lengths(prompts, settings, getattr(config, "max_position_embeddings", None))
    predictions = None
    if task.predictions_file or task.data_file:
        record = record_settings(model_args, settings, task, prompts)
        predictions = Predictions(Path(task.predictions_file or "predictions.json"), questions, record, task.overwrite)
        if predictions.is_complete:
            return predictions.report_complete()

    start = time.perf_counter()
    generator = Generator(load_for_inference(model_args, config), tokenizer, template)
    logger.info(
        "model loaded in %.1f s: %.3g parameters, %s on %s",
        *(
            time.perf_counter() - start,
            generator.model.num_parameters(),
            generator.model.dtype,
            generator.model.device,
        ),
    )
    if task.interactive:
        return chat(generator, settings, model_args.system_prompt)
    if predictions is None:
        return answer_one(generator, settings, questions[0], prompts[0])
    return answer_all(generator, settings, task, questions, prompts, predictions)


# ---------------------------------------------------------------- questions


def read_questions(task: TaskArguments) -> list[Question]:
    """The questions in order. Raises: InputError naming file and line of what cannot be asked."""
    if task.data_file is None:
        return [SAMPLE_QUESTION if task.prompt is None else task.prompt]
    questions: list[Question] = []
    bad_text, blank = BadText(task.on_bad_text), 0
    for path in list_data_files(task.data_file):
        if path.suffix.lower() == ".txt":
            before, skipped = len(questions), bad_text.skipped
            for texts in iter_document_batches(path, bad_text=bad_text):
                questions += [text.strip() for text in texts]
            with open(path, "rb") as file:
                lines = sum(1 for _ in file)
            blank += lines - (len(questions) - before) - (bad_text.skipped - skipped)
        else:
            questions += [read_question(record, location) for location, record in iter_records(path, bad_text)]
    if not questions:
        raise InputError(f"--data_file {task.data_file}: no question in it")
    logger.info("%d questions", len(questions))
    if blank:
        logger.info("%d blank lines left out", blank)
    if bad_text.skipped:
        logger.warning("%d skipped: not valid UTF-8: %s", bad_text.skipped, ", ".join(bad_text.locations))
    return questions


def read_question(record: dict[str, Any], location: str) -> Question:
    """What a record asks; an answer that stands at its end (a held-out set has them) is left off."""
    from utils.prompts import read_conversation

    # read_conversation wants an answer, as training does.
    record = dict(record)
    if isinstance(record.get("messages"), list):
        record["messages"] = [*record["messages"], {"role": "assistant", "content": ""}]
    elif isinstance(record.get("conversations"), list):
        record["conversations"] = [*record["conversations"], {"from": "gpt", "value": ""}]
    elif "instruction" in record:
        record["output"] = ""
    messages = read_conversation(record, location)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise InputError(f"{location}: the question is empty")
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def choose_template(args: InferenceArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template named, else the tokenizer's own, which training saved beside the weights, else the default."""
    from utils.prompts import OWN_TEMPLATE, resolve_template, template_name

    name = template_name(args.prompt_template, tokenizer)
    logger.info("prompt template: %s", "the tokenizer's own" if name == OWN_TEMPLATE else name)
    return resolve_template(name, tokenizer)


def encode_question(
    question: Question, args: InferenceArguments, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of the prompt; without a template, of the text to be continued."""
    from utils.generation import encode_raw
    from utils.prompts import encode_prompt

    if template is None:
        if not isinstance(question, str):
            raise InputError(
                f"a conversation cannot be continued as plain text ({question!r:.80}); pass --with_prompt"
            )
        return encode_raw(question, tokenizer)
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return encode_prompt(with_system_prompt(messages, args.system_prompt), template, tokenizer)


def with_system_prompt(messages: list[dict[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    """The messages, --system_prompt before them unless they have one of their own."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_lengths(prompts: list[list[int]], settings: GenerationArguments, context: int | None) -> None:
    """Raises: InputError with every prompt (the first five) that the model's context has no room for."""
    from utils.generation import check_room

    problems, short = [], 0
    for number, prompt in enumerate(prompts, 1):
        try:
            short += check_room(len(prompt), settings, context) < settings.max_new_tokens
        except InputError as error:
            problems.append(f"question {number}: {error}")
    raise_problems(problems[:5])
    if short:
        logger.warning(
            "%d of %d prompts leave room for fewer than %d new tokens in the context of %s",
            *(short, len(prompts), settings.max_new_tokens, context),
        )


def record_settings(
    model_args: InferenceArguments, settings: GenerationArguments, task: TaskArguments, prompts: list[list[int]]
) -> dict[str, Any]:
    """All that decides the answers; a run goes on only where this is the same."""
    described = describe_arguments(model_args, settings)
    folders = [model_args.model_name_or_path, model_args.adapter_name_or_path]
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        if folder
        for file in sorted(Path(folder).glob("*.*"))
        if file.suffix in (".safetensors", ".bin")
    ]
    return {
        **{name: value for name, value in described.items() if name not in PLACE_SETTINGS},
        "with_prompt": task.with_prompt,
        "num_questions": len(prompts),
        "sha256_of_prompts": hash_json(prompts),
        "sha256_of_weight_file_list": hash_json(weights),
    }


# ---------------------------------------------------------------- answering


def full_output(question: Question, completion: Completion, generator: Generator) -> str:
    """The answer; where a text is continued, the text with its continuation."""
    return completion.text if generator.template else f"{question}{completion.text}"


def answer_all(
    generator: Generator,
    settings: GenerationArguments,
    task: TaskArguments,
    questions: list[Question],
    prompts: list[list[int]],
    predictions: Predictions,
) -> dict[str, Any]:
    """Answer what is left, a batch at a time, each answer written before the next batch begins."""
    from tqdm import tqdm

    resumed, new_tokens, cut, started = len(predictions.rows), 0, 0, time.perf_counter()
    with tqdm(total=len(prompts), initial=resumed, unit="answer", desc="answering") as bar:
        for first in range(resumed, len(prompts), task.batch_size):
            numbers = range(first, min(first + task.batch_size, len(prompts)))
            completions = generator.generate(
                [prompts[number] for number in numbers],
                settings,
                seeds=[settings.seed + number for number in numbers],  # the same in a run that goes on
                strip=generator.template is not None,
            )
            outputs = [full_output(questions[n], c, generator) for n, c in zip(numbers, completions, strict=True)]
            if first == resumed:
                bar.write(f"Input: {questions[first]}\nOutput: {outputs[0]}", file=sys.stderr)
            predictions.append(outputs)
            new_tokens += sum(len(completion.token_ids) for completion in completions)
            cut += sum(completion.finish_reason == "length" for completion in completions)
            bar.update(len(completions))
            bar.set_postfix_str(f"{new_tokens / (time.perf_counter() - started):.0f} tokens/s")
    seconds = time.perf_counter() - started
    metrics = {
        "answers": len(predictions.rows),
        "resumed": resumed,
        "cut_at_limit": cut,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(new_tokens / seconds, 1),
        "predictions_file": str(predictions.path),
    }
    predictions.finish(metrics)
    logger.info(
        "%d answers (%d from before, %d cut at the length limit), %d tokens in %.1f s: %.1f tokens/s\n"
        "  answers in %s, settings in %s",
        *(metrics["answers"], resumed, cut, new_tokens, seconds, metrics["tokens_per_second"]),
        *(predictions.path, predictions.settings_path),
    )
    return metrics


def answer_one(
    generator: Generator, settings: GenerationArguments, question: Question, prompt: list[int]
) -> dict[str, Any]:
    """Print one answer as it is written."""
    use_utf8()
    logger.info("question: %s", question)
    completion = print_answer(generator, settings, question, prompt, settings.seed)
    return {
        "answers": 1,
        "output": full_output(question, completion, generator),
        "new_tokens": len(completion.token_ids),
    }


def print_answer(
    generator: Generator, settings: GenerationArguments, question: Question, prompt: list[int], seed: int
) -> Completion:
    """Print an answer, piece by piece unless beams are searched; a text to be continued stands before it."""
    strip = generator.template is not None
    if not strip:
        print(question, end="", flush=True)
    if settings.num_beams > 1:
        completion = generator.generate([prompt], settings, [seed], strip)[0]
        print(completion.text)
        return completion
    stream = generator.stream(prompt, settings, seed, strip)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    assert stream.completion is not None
    return stream.completion


def chat(generator: Generator, settings: GenerationArguments, system_prompt: str | None) -> dict[str, Any]:
    """A conversation on the terminal until an empty line, /exit, end of input or Ctrl-C."""
    use_utf8()
    mode = "the conversation is remembered" if generator.template else "each text is continued; --with_prompt to chat"
    print(f"Type and press Enter ({mode}). Empty line or /exit: leave. /clear: forget what was said. Ctrl-C: leave.")
    history: list[dict[str, str]] = []
    turns = 0
    try:
        while (line := input("\nInput: ").strip()) not in ("", "/exit"):
            if line == "/clear":
                history = []
                print("The conversation was cleared.")
                continue
            print("Output: ", end="", flush=True)
            try:
                history = answer_turn(generator, settings, system_prompt, history, line, settings.seed + turns)
                turns += 1
            except InputError as error:
                print(f"\n[{error}]")
    except EOFError:
        print()
    except KeyboardInterrupt:
        print("\n[left]")
    return {"turns": turns}


def answer_turn(
    generator: Generator,
    settings: GenerationArguments,
    system_prompt: str | None,
    history: list[dict[str, str]],
    line: str,
    seed: int,
) -> list[dict[str, str]]:
    """Print the answer to one line; returns the conversation with it."""
    from utils.generation import encode_raw

    if generator.template is None:
        print_answer(generator, settings, line, encode_raw(line, generator.tokenizer), seed)
        return []
    messages = with_system_prompt([*history, {"role": "user", "content": line}], system_prompt)
    messages, dropped = generator.fit_history(messages, settings.max_new_tokens)
    if dropped:
        print(f"[the {dropped} oldest messages no longer fit the context of {generator.context} tokens] ", end="")
    completion = print_answer(generator, settings, line, generator.encode(messages), seed)
    if completion.finish_reason == "length":
        print(f"[cut after {len(completion.token_ids)} tokens; see --max_new_tokens]")
    return [*messages, {"role": "assistant", "content": completion.text}]


def use_utf8() -> None:
    """Read and write UTF-8 whatever the terminal's locale; input that is not becomes replacement characters."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "strict")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        GenerationArguments,
        TaskArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
