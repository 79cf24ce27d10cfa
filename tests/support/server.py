"""The server as a process of its own."""

import contextlib
import threading
import time

import openai
import uvicorn

from utils.serving.app import create_app
from utils.serving.arguments import ServingArguments

GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


class Live:
    """A server on a free port, in a thread of its own."""

    def __init__(self, engine, api_keys=(), **settings):
        self.engine = engine
        self.app = create_app(engine, ServingArguments(served_model_name=["tiny"], **settings), api_keys=api_keys)
        config = uvicorn.Config(self.app, port=0, log_config=None, access_log=False, lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def queue(self):
        return self.app.state.service.queue

    def client(self, key="none", **options):
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=60, **options)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(engine, **settings):
    live = Live(engine, **settings)
    try:
        yield live
    finally:
        live.stop()
