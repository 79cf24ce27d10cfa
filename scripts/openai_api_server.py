"""Serve a model over HTTP as OpenAI's API does: chat, completions and embeddings for any OpenAI client.

  python scripts/openai_api_server.py --base_model MERGED
  API_KEYS=secret python scripts/openai_api_server.py --base_model BASE --lora_model ADAPTER --host 0.0.0.0
Ctrl-C or SIGTERM lets running answers end. Settings of answers are defaults that requests may change.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib.util
import logging
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments
from utils.core.command_line import run, select_gpus
from utils.core.errors import InputError
from utils.core.machine import check_port
from utils.serving.arguments import KEYS_VARIABLE, ServingArguments, load_api_keys

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("openai_api_server")

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def main(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    serving_args: ServingArguments,
    speculation: SpeculationArguments | None = None,
) -> dict[str, Any]:
    """Serve until a signal comes; returns the engine's totals."""
    check_packages()
    select_gpus(model_args)  # before torch is imported
    from utils.generation.loading import EnginePlan
    from utils.serving.app import create_app

    if settings.num_beams > 1:
        raise InputError(f"--num_beams {settings.num_beams}: beam search cannot join a running batch; leave it out")
    if settings.guidance_scale > 1 and serving_args.max_batch_size < 2:
        raise InputError("--guidance_scale needs two places an answer; pass --max_batch_size 2 or more")
    speculation = speculation or SpeculationArguments()
    speculation.check(settings)
    api_keys = load_api_keys(serving_args.api_key_file)
    check_port(serving_args.host, serving_args.port)
    plan = EnginePlan(model_args, speculation=speculation)
    settings = plan.complete_settings(settings)
    adapters = find_adapters(serving_args)
    serving_args = name_models(serving_args, plan.args)
    engine = plan.load(serving_args.max_batch_size, serving_args.max_context, adapters)
    try:
        app = create_app(engine, serving_args, settings, system_prompt=model_args.system_prompt, api_keys=api_keys)
        announce(serving_args, list(app.state.service.models), bool(api_keys))
        serve(app, serving_args)
        return {"statistics": engine.statistics()}
    finally:
        engine.close()


def check_packages() -> None:
    """Raises: InputError if what only the server needs is not installed."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"the server needs {', '.join(absent)}: pip install -r requirements-serve.txt")


def find_adapters(args: ServingArguments) -> dict[str, str]:
    """Folders of --lora_models by name. Raises: InputError if one is no adapter."""
    from utils.lora.config import load_adapter_config
    from utils.weights.config import local_folder

    adapters = {name: str(local_folder(folder, "adapter")) for name, folder in args.adapters.items()}
    for folder in adapters.values():
        load_adapter_config(Path(folder))
    return adapters


def name_models(args: ServingArguments, model_args: InferenceArguments) -> ServingArguments:
    """The arguments with a name for the model: that of the adapter's folder, else of its own."""
    if args.served_model_name:
        return args
    folder = model_args.adapter_name_or_path or model_args.model_name_or_path
    assert folder is not None
    return dataclasses.replace(args, served_model_name=[Path(folder).resolve().name])


def announce(args: ServingArguments, models: list[str], has_keys: bool) -> None:
    """Say what is served, and warn where everyone may use it."""
    logger.info("models: %s", ", ".join(models))
    if not has_keys and args.host not in THIS_MACHINE:
        logger.warning(
            "whoever reaches %s may use this server: set %s or --api_key_file, or --host 127.0.0.1",
            *(args.host, KEYS_VARIABLE),
        )


def serve(app: FastAPI, args: ServingArguments) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then let running ones end."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn's own would raise the signal again afterwards, and the engine would not be closed.
            self.should_exit, self.force_exit = True, self.should_exit  # the second signal does not wait
            asyncio.get_running_loop().call_soon_threadsafe(app.state.service.close)

    log_requests()
    gc.collect()
    gc.freeze()  # the model and its libraries need no looking through while answers are written
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_config=None,
        access_log=False,  # the application writes its own
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=args.shutdown_grace,  # type: ignore[arg-type]  # fractions work
    )
    Server(config).run()


def log_requests() -> None:
    """One line of JSON a request on standard output; everything else goes to standard error."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("access")
    access.handlers, access.propagate = [handler], False


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        GenerationArguments,
        ServingArguments,
        SpeculationArguments,
        documented=("base_model", "lora_model", "tokenizer_path", "alpha", "use_ntk", "use_flash_attention_2"),
        description=__doc__,
    )
