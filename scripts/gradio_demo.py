"""A web page to chat with a model, or with two side by side.

  python scripts/gradio_demo.py --base_model MERGED
  python scripts/gradio_demo.py --base_model BASE --lora_model ADAPTER --compare_model OTHER
The page is served to this machine only (http://127.0.0.1:7860); see --host, --auth and --share for others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments, arg
from utils.core.command_line import run, select_gpus
from utils.core.errors import InputError
from utils.core.machine import check_port
from utils.web.access import WebArguments, launch, read_accounts

if TYPE_CHECKING:
    from utils.generation.engine import Engine
    from utils.web.page import ChatPage


@dataclass
class DemoArguments(WebArguments):
    """Where the page is served, to whom, and what it compares."""

    compare_model: str | None = arg(help="Second model: every question goes to both, side by side.")
    compare_lora: str | None = arg(help="Adapter of the second model; without --compare_model on the same base.")
    max_memory: int | None = arg(
        help="Most tokens of a prompt, system prompt and history included; the oldest exchanges are left out. "
        "Default: what the model's context has beside the answer."
    )

    def __post_init__(self) -> None:
        WebArguments.__post_init__(self)
        if self.max_memory is not None and self.max_memory < 1:
            raise InputError(f"--max_memory {self.max_memory}: need at least 1")


def main(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    demo: DemoArguments,
    speculation: SpeculationArguments | None = None,
) -> None:
    """Serve the page until Ctrl-C."""
    page = start(model_args, settings, demo, speculation)
    try:
        page.blocks.block_thread()
    finally:
        stop(page)


def start(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    demo: DemoArguments,
    speculation: SpeculationArguments | None = None,
) -> ChatPage:
    """Load the models and serve the page; returns while it is being served (for notebooks, and tests)."""
    accounts = read_accounts(demo)
    check_port(demo.host, demo.port)
    select_gpus(model_args)  # before torch is imported
    from utils.generation.loading import EnginePlan
    from utils.web.chat import model_card
    from utils.web.page import ChatPage

    plans = [EnginePlan(model_args, speculation=speculation)]
    if demo.compare_model or demo.compare_lora:
        plans.append(EnginePlan(compared_model(model_args, demo)))
    engines: list[Engine] = []
    try:
        engines += [plan.load(max_batch_size=demo.max_batch_size) for plan in plans]
        page = ChatPage(
            engines,
            [model_card(engine, plan.args) for engine, plan in zip(engines, plans, strict=True)],
            plans[0].complete_settings(settings),
            model_args.system_prompt,
            title=demo.title,
            language=demo.language,
            max_memory=demo.max_memory,
            max_answers=demo.max_batch_size,
        )
        launch(page.blocks, demo, accounts)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return page


def stop(page: ChatPage) -> None:
    """End the page and its engines."""
    page.blocks.close(verbose=False)
    for engine in page.engines:
        engine.close()


def compared_model(model_args: InferenceArguments, demo: DemoArguments) -> InferenceArguments:
    """The second model, which has its own tokenizer, and its own template unless the base is the same."""
    return replace(
        model_args,
        model_name_or_path=demo.compare_model or model_args.model_name_or_path,
        adapter_name_or_path=demo.compare_lora,
        tokenizer_name_or_path=None,
        prompt_template=None if demo.compare_model else model_args.prompt_template,
    )


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        GenerationArguments,
        DemoArguments,
        SpeculationArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
