"""Ask a model: one prompt, a file of them, or a conversation -> answers on the screen or in a predictions file.

  python scripts/inference_hf.py --base_model MERGED --with_prompt --interactive
  python scripts/inference_hf.py --base_model BASE --lora_model ADAPTER --with_prompt --data_file questions.txt
  python scripts/inference_hf.py --check MODEL --lora_model ADAPTER
Without --with_prompt texts are continued as they stand. An interrupted file run goes on when it is run again.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments, arg
from utils.core.command_line import describe_arguments, run, select_gpus
from utils.core.errors import InputError, raise_problems
from utils.core.files import hash_json, write_json
from utils.core.records import BadRecords, iter_document_batches, iter_records, list_data_files
from utils.evaluation.progress import Predictions, Question, answer_all

if TYPE_CHECKING:
    from tqdm import tqdm

    from utils.generation.engine import Completion, Engine, Request
    from utils.generation.loading import EnginePlan
    from utils.text.prompts import Message

logger = logging.getLogger("inference_hf")

SAMPLE_QUESTION = "为什么要减少污染，保护环境？"
# Settings that change where and how fast an answer is made, not which answer it is.
PLACE_SETTINGS = ("gpus", "only_cpu", "load_in_4bit", "load_in_8bit", "attn_implementation")


@dataclass
class TaskArguments:
    """What is asked, and where the answers go."""

    check: str | None = arg(
        help="Look at the folder of this model, and of --lora_model on it: print what is there and what would be "
        "refused, and leave with 1 if anything would; no weights are read."
    )
    prompt: str | None = arg(help="Ask this one question; its answer is printed as it is written.")
    data_file: str | None = arg(
        help="File or folder of questions: txt (one a line), or json, jsonl, parquet with instruction (and input), "
        "messages or conversations. Without it, --prompt and --interactive: one sample question."
    )
    interactive: bool = arg(
        False, help="A conversation on the screen; an empty line or /exit ends it, /clear resets it."
    )
    with_prompt: bool = arg(False, help="Put questions into the prompt template; off: continue the text as it stands.")
    continue_final_message: bool = arg(
        False, help="Go on with the answer at the end of a record, instead of leaving it off; Output has what follows."
    )
    predictions_file: str | None = arg(
        help='Where answers go: .json, a list of {"Input", "Output"}, or .jsonl; default with --data_file: '
        "predictions.json."
    )
    batch_size: int = arg(1, help="Questions answered at once; memory grows with it, answers do not change.")
    overwrite: bool = arg(
        False, help="Replace a predictions file that is finished or holds other answers; an unfinished one goes on."
    )
    language: Literal["auto", "zh", "en"] = arg(
        "auto", help="Of --interactive's own words: zh, en; auto: that of the shell (LANG)."
    )
    on_bad_record: Literal["error", "skip"] = arg(
        "error", help="A line or record that cannot be read or used: stop with file:line, or skip and count."
    )

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(f"--batch_size {self.batch_size}: need at least 1")
        if self.check is not None and (self.prompt or self.data_file or self.interactive or self.predictions_file):
            problems.append("--check asks the model nothing; leave --prompt, --data_file and --interactive out")
        if sum((self.prompt is not None, self.data_file is not None, self.interactive)) > 1:
            problems.append("--prompt, --data_file and --interactive exclude each other; pass one")
        if self.continue_final_message and not (self.data_file and self.with_prompt):
            problems.append("--continue_final_message is for answers in records; pass --data_file and --with_prompt")
        if self.interactive and self.predictions_file:
            problems.append("--interactive writes no --predictions_file; pass --data_file for one")
        if self.predictions_file and Path(self.predictions_file).suffix not in (".json", ".jsonl"):
            problems.append(f"--predictions_file {self.predictions_file}: need a name that ends in .json or .jsonl")
        raise_problems(problems)


def main(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    task: TaskArguments,
    speculation: SpeculationArguments | None = None,
) -> dict[str, Any]:
    """Answer; returns how many answers there are, and how fast they came.

    Raises: SystemExit if --check finds something that would be refused.
    """
    select_gpus(model_args)  # before torch is imported
    if task.check is not None:
        return check_folders(model_args, task.check)
    from utils.generation.loading import EnginePlan

    speculation = speculation or SpeculationArguments()
    speculation.check(settings)
    questions = [] if task.interactive else read_questions(task)
    plan = EnginePlan(model_args, task.with_prompt, speculation)
    if settings.guidance_scale > 1 and plan.template is None:
        raise InputError("--negative_prompt is a system prompt, which plain text has not; pass --with_prompt too")
    settings = plan.complete_settings(settings)
    prompts = [encode_question(question, plan) for question in questions]
    check_lengths(prompts, settings, plan.context)
    predictions = None
    if task.predictions_file or task.data_file:
        record = record_settings(plan.args, settings, task, prompts)
        if settings.samples:  # what drafts changes which answer is drawn, not its distribution
            record |= describe_arguments(speculation)
        predictions = Predictions(Path(task.predictions_file or "predictions.json"), questions, record, task.overwrite)
        if predictions.is_complete:
            return predictions.report_complete()

    engine = plan.load(max_batch_size=task.batch_size * settings.prompts_per_answer)
    try:
        if task.interactive:
            result = chat(engine, settings, model_args.system_prompt, asked_language(task))
        elif predictions is None:
            result = answer_one(engine, settings, questions[0], prompts[0])
        else:
            result = answer_file(engine, settings, questions, prompts, predictions)
        if speculation.drafts:
            result |= report_speculation(engine)
        return result
    finally:
        engine.close()


# ---------------------------------------------------------------- looking at folders


def check_folders(args: InferenceArguments, model: str) -> dict[str, Any]:
    """Print what lies in the folders, and what would be refused. Raises: SystemExit(1) if anything would."""
    from utils.generation.folder_check import FolderCheck

    if args.model_name_or_path:
        raise InputError(f"--check {model}: it names the model already; leave --base_model out")
    check = FolderCheck(dataclasses.replace(args, model_name_or_path=model))
    for line in check.found:
        print(line)
    for line in check.refused:
        print(f"refused: {line}")
    if check.refused:
        raise SystemExit(1)
    print("nothing would be refused")
    return {"found": check.found}


# ---------------------------------------------------------------- questions


def read_questions(task: TaskArguments) -> list[Question]:
    """The questions in order. Raises: InputError naming file and line of what cannot be asked."""
    if task.data_file is None:
        return [SAMPLE_QUESTION if task.prompt is None else task.prompt]
    from utils.generation.engine import goes_on

    questions: list[Question] = []
    bad_records, blank = BadRecords(task.on_bad_record), 0
    for path in list_data_files(task.data_file):
        if path.suffix.lower() == ".txt":
            before, skipped = len(questions), bad_records.skipped
            for texts in iter_document_batches(path, bad_records=bad_records):
                questions += [text.strip() for text in texts]
            with open(path, "rb") as file:
                lines = sum(1 for _ in file)
            blank += lines - (len(questions) - before) - (bad_records.skipped - skipped)
        else:
            for location, record in iter_records(path, bad_records):
                with bad_records.handled():
                    questions.append(read_question(record, location, task.continue_final_message))
    if not questions:
        raise InputError(f"--data_file {task.data_file}: no question in it")
    if task.continue_final_message and not any(goes_on(conversation_of(question)[0]) for question in questions):
        raise InputError(f"--continue_final_message: no record of {task.data_file} ends with an answer to go on with")
    logger.info("%d questions", len(questions))
    if blank:
        logger.info("%d blank lines left out", blank)
    if bad_records.skipped:
        logger.warning("%s", bad_records)
    return questions


def read_question(record: dict[str, Any], location: str, keep_answer: bool = False) -> Question:
    """What a record asks; an answer that stands at its end (a held-out set has them) is left off, unless it is kept
    to be gone on with. A call of a function always is."""
    from utils.text.conversations import is_empty, read_conversation

    conversation = read_conversation(record, location)
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] == "assistant":
        if keep_answer and not is_empty(messages[-1]) and not messages[-1].get("tool_calls"):
            break
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise InputError(f"{location}: the question is empty")
    if conversation.tools:
        return {"messages": messages, "tools": conversation.tools}
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def encode_question(question: Question, plan: EnginePlan) -> list[int]:
    """Token ids of the prompt; without a template, of the text to be continued."""
    if plan.template is None:
        if not isinstance(question, str):
            raise InputError(
                f"a conversation cannot be continued as plain text ({question!r:.80}); pass --with_prompt"
            )
        return plan.encode_text(question)
    from utils.text.prompts import with_system_prompt

    messages, tools = conversation_of(question)
    return plan.encode(with_system_prompt(messages, plan.args.system_prompt), tools)


def conversation_of(question: Question) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """A question's messages, and the functions that its answer may call."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}], None
    if isinstance(question, dict):
        return question["messages"], question["tools"]
    return question, None


def check_lengths(prompts: list[list[int]], settings: GenerationArguments, context: int | None) -> None:
    """Raises: InputError with every prompt (the first five) that the model's context has no room for."""
    from utils.generation.engine import check_room

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
    from utils.gguf.metadata import gguf_parts

    described = describe_arguments(model_args, settings)
    folders = [model_args.model_name_or_path, model_args.adapter_name_or_path]
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        if folder
        for file in (gguf_parts(Path(folder)) if Path(folder).is_file() else sorted(Path(folder).glob("*.*")))
        if file.suffix in (".safetensors", ".bin", ".gguf")
    ]
    return {
        **{name: value for name, value in described.items() if name not in PLACE_SETTINGS},
        "with_prompt": task.with_prompt,
        "num_questions": len(prompts),
        "sha256_of_prompts": hash_json(prompts),
        "sha256_of_weight_file_list": hash_json(weights),
    }


# ---------------------------------------------------------------- answering


def full_output(question: Question, completion: Completion, engine: Engine) -> str:
    """The answer; where a text is continued, the text with its continuation."""
    return completion.text if engine.template else f"{question}{completion.text}"


def ask(engine: Engine, settings: GenerationArguments, question: Question, prompt: list[int], seed: int) -> Request:
    """The request that a question is; the prompt was made of it."""
    from utils.generation.engine import Request, goes_on
    from utils.text.prompts import call_form

    if engine.template is None:
        return Request(prompt, settings, seed, strip=False)
    messages, tools = conversation_of(question)
    form = call_form(engine.template, engine.tokenizer) if tools else None
    return Request(
        prompt,
        settings,
        seed,
        strip=not goes_on(messages),
        negative_prompt=engine.encode_negative(messages, settings, tools),
        shown_tokens=engine.hidden_tokens(form.signs) if form else {},
    )


def answer_file(
    engine: Engine,
    settings: GenerationArguments,
    questions: list[Question],
    prompts: list[list[int]],
    predictions: Predictions,
) -> dict[str, Any]:
    """Answer what is left; returns how many answers there are, and how fast they came."""
    resumed, new_tokens, cut, started = len(predictions.rows), 0, 0, time.perf_counter()

    def submit(engine: Engine, _: Predictions, number: int) -> Callable[[], Completion]:
        # The seeds are the same in a run that goes on.
        request = ask(engine, settings, questions[number], prompts[number], settings.seed + number)
        if settings.num_beams > 1:
            return lambda: engine.generate([request])[0]
        return engine.submit(request).wait

    def write(bar: tqdm[Any], completion: Completion) -> str:
        nonlocal new_tokens, cut
        question = questions[len(predictions.rows)]
        output = full_output(question, completion, engine)
        if len(predictions.rows) == resumed:
            bar.write(f"Input: {question}\nOutput: {output}", file=sys.stderr)
        new_tokens += len(completion.token_ids)
        cut += completion.finish_reason == "length"
        bar.set_postfix_str(f"{new_tokens / (time.perf_counter() - started):.0f} tokens/s")
        return output

    def measure(_: Predictions) -> dict[str, Any]:
        seconds = time.perf_counter() - started
        return {
            "answers": len(predictions.rows),
            "resumed": resumed,
            "cut_at_limit": cut,
            "new_tokens": new_tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(new_tokens / seconds, 1),
            "predictions_file": str(predictions.path),
        }

    answer_all(lambda: nullcontext(engine), submit, predictions, write=write, measure=measure)
    metrics = predictions.metrics
    assert metrics is not None
    logger.info(
        "%d answers (%d from before, %d cut at the length limit), %d tokens in %.1f s: %.1f tokens/s\n"
        "  answers in %s, settings in %s",
        *(metrics["answers"], resumed, cut, new_tokens, metrics["seconds"], metrics["tokens_per_second"]),
        *(predictions.path, predictions.settings_path),
    )
    return metrics


def report_speculation(engine: Engine) -> dict[str, float]:
    """Log what came of the drafts; returns the figures."""
    from utils.generation.speculation import describe_speculation

    statistics = engine.statistics()
    logger.info("%s", describe_speculation(statistics))
    return {name: statistics[name] for name in ("drafted", "accepted", "passes", "speed_up") if name in statistics}


def answer_one(engine: Engine, settings: GenerationArguments, question: Question, prompt: list[int]) -> dict[str, Any]:
    """Print one answer as it is written; a text to be continued stands before it."""
    use_utf8()
    logger.info("question: %s", question)
    if engine.template is None:
        print(question, end="", flush=True)
    completion = print_answer(engine, ask(engine, settings, question, prompt, settings.seed))
    return {
        "answers": 1,
        "output": full_output(question, completion, engine),
        "new_tokens": len(completion.token_ids),
    }


def print_answer(engine: Engine, request: Request) -> Completion:
    """Print an answer, piece by piece unless beams are searched."""
    if request.settings.num_beams > 1:
        completion = engine.generate([request])[0]
        print(completion.text)
        return completion
    answer = engine.submit(request)
    for delta in answer:
        print(delta.text, end="", flush=True)
    print()
    assert answer.completion is not None
    return answer.completion


# ---------------------------------------------------------------- the chat


def asked_language(task: TaskArguments) -> str:
    """That of --language, or of the shell."""
    from utils.core.language import shell_language

    return shell_language() if task.language == "auto" else task.language


def chat(
    engine: Engine, settings: GenerationArguments, system_prompt: str | None, language: str = "en"
) -> dict[str, Any]:
    """A conversation on the terminal until an empty line, /exit, end of input or Ctrl-C."""
    use_utf8()
    terminal = TerminalChat(system_prompt, language)
    print(terminal.say("start", mode=terminal.say("remembers" if engine.template else "continues")))
    answers = 0  # also of what was taken back or cleared: no two of a run draw with the same seed
    try:
        while (line := input(f"\n{terminal.say('input')}").strip()) not in ("", "/exit"):
            try:
                if line == "/continue":
                    terminal.go_on(engine, settings, settings.seed + answers)
                    answers += 1
                    continue
                question = terminal.command(line) if line.startswith("/") else line
                if question is not None:
                    terminal.answer(engine, settings, question, settings.seed + answers)
                    answers += 1
            except InputError as error:
                print(f"\n[{error}]")
    except EOFError:
        print()
    except KeyboardInterrupt:
        print(f"\n[{terminal.say('left')}]")
    return {"turns": answers}


class TerminalChat:
    """The web demo's conversation, led by lines that are typed."""

    def __init__(self, system_prompt: str | None, language: str = "en") -> None:
        from utils.web.chat import Conversation

        self.system_prompt, self.language = system_prompt, language
        self.conversation = Conversation()

    def say(self, name: str, **values: object) -> str:
        """A text in the chat's language."""
        from utils.web.texts import TERMINAL_TEXTS, translate

        return translate(name, self.language, TERMINAL_TEXTS, **values)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one, and what was said."""
        from utils.text.prompts import with_system_prompt

        return with_system_prompt(self.conversation.messages(), self.system_prompt)

    def command(self, line: str) -> str | None:
        """Do what a line that begins with / says; returns the question to be asked now, if there is one.

        Raises: InputError for what cannot be done; nothing has changed then.
        """
        name, _, text = line.partition(" ")
        text = text.strip()
        if name in ("/reset", "/clear"):
            self.conversation.clear()
            print(self.say("cleared"))
        elif name == "/system":
            self.system_prompt = text
            self.conversation.clear()
            print(self.say("new_prompt" if text else "no_prompt"))
        elif name in ("/undo", "/retry", "/edit"):
            if not self.conversation.turns:
                raise InputError("nothing has been asked yet")
            if name == "/edit" and not text:
                raise InputError("/edit needs the question that is to stand there")
            question = self.conversation.undo()
            if name != "/undo":
                return text if name == "/edit" else question
            print(self.say("taken_back"))
        elif name == "/history":
            for message in self.messages:
                print(f"{message['role']}: {message['content']}")
        elif name in ("/save", "/load"):
            if not text:
                raise InputError(f"{name} needs a file name")
            path = Path(text).expanduser()
            try:
                self.save(path) if name == "/save" else self.load(path)
            except (OSError, ValueError) as error:  # a name may hold what no file's can
                raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        elif name == "/help":
            print(self.say("help"))
        else:
            raise InputError(f"{name} is no command; /help lists them (a question cannot begin with /)")
        return None

    def save(self, path: Path) -> None:
        """Write the conversation as {"messages"}; an existing file of another kind is not replaced."""
        if path.suffix != ".json":
            raise InputError("need a name that ends in .json")
        if path.exists():
            raise InputError("is there already; choose another name")
        write_json(path, {"messages": self.messages})
        print(self.say("saved", count=len(self.messages), path=path))

    def load(self, path: Path) -> None:
        """Read what `save` or the web demo wrote, or one conversation of training data."""
        from utils.web.saved_chats import load_chat

        saved = load_chat(path.read_bytes())
        self.conversation.replace(saved.turns)
        self.system_prompt = self.system_prompt if saved.system_prompt is None else saved.system_prompt
        print(self.say("loaded", count=len(self.conversation.messages()), path=path))

    def answer(self, engine: Engine, settings: GenerationArguments, question: str, seed: int) -> None:
        """Print the answer to a question, and remember both; without a template nothing is remembered."""
        from utils.web.chat import Reply

        print(self.say("output"), end="", flush=True)
        if engine.template is None:
            print(question, end="", flush=True)
            print_answer(engine, ask(engine, settings, question, engine.encode_text(question), seed))
            return
        self.conversation.ask(question)
        try:
            request, dropped = self.plan(engine, settings, seed)
            completion = print_answer(engine, request)
        except InputError:
            self.conversation.take_back()
            raise
        if completion.finish_reason == "length":
            print(f"[{self.say('cut', count=len(completion.token_ids))}]")
        self.conversation.turns[-1].replies = [Reply(completion.text, completion.finish_reason)]
        del self.conversation.turns[: dropped // 2]  # what was left out is forgotten: two messages a turn

    def plan(self, engine: Engine, settings: GenerationArguments, seed: int) -> tuple[Request, int]:
        """The request for what comes next; says and returns how many of the oldest messages it leaves out."""
        from utils.web.chat import plan_request

        request, dropped = plan_request(engine, self.conversation.messages(), settings, seed, self.system_prompt)
        if dropped:
            print(f"[{self.say('dropped', count=dropped, context=engine.context)}] ", end="")
        return request, dropped

    def go_on(self, engine: Engine, settings: GenerationArguments, seed: int) -> None:
        """Print and remember what follows the last answer."""
        if not (self.conversation.turns and self.conversation.turns[-1].replies):
            raise InputError("there is no answer to go on with")
        request, dropped = self.plan(engine, settings, seed)
        reply = self.conversation.turns[-1].replies[0]
        print(f"{self.say('output')}{reply.text}", end="", flush=True)
        completion = print_answer(engine, request)
        reply.text, reply.finish_reason = reply.text + completion.text, completion.finish_reason
        del self.conversation.turns[: dropped // 2]


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
        SpeculationArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
