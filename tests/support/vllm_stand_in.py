"""A stand-in for vLLM: its HTTP server and its Python classes, as its documentation describes them.

The tokens come from a transformers engine. Fields that vLLM does not have are refused.
Sources: vLLM's docs, "OpenAI-Compatible Server"; its classes AsyncEngineArgs, SamplingParams and AsyncLLMEngine.
"""

import asyncio
import contextlib
import dataclasses
import enum
import json
import sys
import threading
import time
import types

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from utils.core.arguments import GenerationArguments
from utils.generation.engine import Request as Asked


def start(engine, prompt, settings, on_delta):
    """Begin an answer; `settings` in vLLM's names. Returns: generation.Answer."""
    assert settings["ignore_eos"] and set(settings["stop_token_ids"]) == set(engine.stop_ids)
    arguments = GenerationArguments(
        max_new_tokens=settings["max_tokens"],
        min_new_tokens=settings["min_tokens"],
        temperature=settings["temperature"],
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        min_p=settings["min_p"],
        repetition_penalty=settings["repetition_penalty"],
        presence_penalty=settings["presence_penalty"],
        frequency_penalty=settings["frequency_penalty"],
    )
    bias = {int(token): value for token, value in (settings.get("logit_bias") or {}).items()}
    asked = Asked(prompt, arguments, settings.get("seed"), logit_bias=bias, top_logprobs=settings.get("logprobs"))
    return engine.submit(asked, on_delta)


class Stream:
    """The deltas of an answer within an event loop; `gone` is set once nobody reads any more."""

    def __init__(self, engine, prompt, settings, gone):
        loop, self.queue, self.gone = asyncio.get_running_loop(), asyncio.Queue(), gone

        def put(delta):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.queue.put_nowait, delta)

        self.answer = start(engine, prompt, settings, put)

    async def deltas(self):
        try:
            while True:
                delta = await self.queue.get()
                yield delta
                if delta.finish_reason:
                    return
        finally:
            if self.answer.completion is None:
                self.gone.append(self.answer)
            self.answer.cancel()


# ---------------------------------------------------------------- the server


class CompletionRequest(BaseModel):
    """The fields of vLLM's request that are used here."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: list[int]
    stream: bool
    return_token_ids: bool
    return_tokens_as_token_ids: bool
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None


class Server:
    """A running stand-in. `asked`: bodies that came; `gone`: answers whose reader left; `models`: what it serves."""

    def __init__(self, engine, models=("base-model",), window=512, key=None):
        self.engine, self.models, self.window, self.key = engine, list(models), window, key
        self.asked, self.gone, self.failure = [], [], None
        app = FastAPI()
        app.get("/v1/models")(self.list_models)
        app.post("/detokenize")(self.detokenize)
        app.post("/v1/completions")(self.complete)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()

    async def list_models(self, request: Request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        base = self.models[0]
        data = [{"id": base, "object": "model", "parent": None, "root": base, "max_model_len": self.window}]
        data += [{"id": name, "object": "model", "parent": base, "root": name} for name in self.models[1:]]
        return {"object": "list", "data": data}

    async def detokenize(self, request: Request):
        body = await request.json()
        return {"prompt": self.engine.decode(body["tokens"])}

    async def complete(self, request: Request):
        try:
            body = CompletionRequest(**await request.json())
        except ValidationError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)
        self.asked.append(body)
        if body.model not in self.models:
            return JSONResponse({"error": {"message": f"The model `{body.model}` does not exist.", "code": 404}}, 404)
        if self.failure:
            return JSONResponse({"error": {"message": self.failure, "code": 500}}, 500)
        stream = Stream(self.engine, body.prompt, body.model_dump(), self.gone)
        return StreamingResponse(self.lines(stream, body), media_type="text/event-stream")

    async def lines(self, stream, body):
        async for delta in stream.deltas():
            choice = {"index": 0, "text": delta.text, "finish_reason": delta.finish_reason, "stop_reason": None}
            choice["token_ids"] = list(delta.token_ids)
            if body.logprobs is not None:
                tops = [dict([*token.top, (token.token_id, token.logprob)]) for token in delta.logprobs]
                choice["logprobs"] = {
                    "tokens": [f"token_id:{token}" for token in delta.token_ids],
                    "token_logprobs": [token.logprob for token in delta.logprobs],
                    "top_logprobs": [{f"token_id:{token}": value for token, value in top.items()} for top in tops],
                }
            yield f"data: {json.dumps({'id': 'cmpl-1', 'object': 'text_completion', 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"


# ---------------------------------------------------------------- the library


@dataclasses.dataclass
class AsyncEngineArgs:
    """The fields of vLLM's class that are used here."""

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    hf_overrides: dict | None = None
    quantization: str | None = None
    tensor_parallel_size: int = 1
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass
class SamplingParams:
    """The fields of vLLM's class that are used here."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_token_ids: list
    ignore_eos: bool
    detokenize: bool
    output_kind: RequestOutputKind
    seed: int | None = None
    logit_bias: dict | None = None
    logprobs: int | None = None

    def __post_init__(self):
        if self.logprobs is not None and self.logprobs > 20:
            raise ValueError("Requested sample logprobs is greater than max allowed: 20")


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


def install(monkeypatch, engine):
    """Put the stand-in where `import vllm` finds it. Returns: what is noted of its use."""
    notes = types.SimpleNamespace(arguments=None, asked=[], gone=[], shut=False)

    class AsyncLLMEngine:
        @classmethod
        def from_engine_args(cls, arguments):
            notes.arguments = arguments
            return cls()

        async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
            assert isinstance(request_id, str) and not sampling_params.detokenize
            assert sampling_params.output_kind is RequestOutputKind.DELTA
            notes.asked.append((prompt, sampling_params, lora_request))
            settings = dataclasses.asdict(sampling_params)
            async for delta in Stream(engine, prompt["prompt_token_ids"], settings, notes.gone).deltas():
                rows = [{**dict(token.top), token.token_id: token.logprob} for token in delta.logprobs]
                rows = [{key: types.SimpleNamespace(logprob=value) for key, value in row.items()} for row in rows]
                piece = types.SimpleNamespace(
                    token_ids=list(delta.token_ids), logprobs=rows, text="", finish_reason=delta.finish_reason
                )
                yield types.SimpleNamespace(outputs=[piece], num_cached_tokens=3, finished=bool(delta.finish_reason))

        def shutdown(self):
            notes.shut = True

    modules = {
        "vllm": {
            "AsyncEngineArgs": AsyncEngineArgs,
            "AsyncLLMEngine": AsyncLLMEngine,
            "SamplingParams": SamplingParams,
            "TokensPrompt": dict,
        },
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return notes
