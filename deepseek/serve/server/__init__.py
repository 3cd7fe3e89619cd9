"""The HTTP front end: OpenAI's routes over an ``EngineClient``.

    launch        the step process, the front end, their end            serving   uvicorn, drain
    app           the table of routes                                   guard     keys, headers, the log's line
    exchange      one request and its answer, from first byte to last   admission the bounded queue
    completions · chat · embeddings · tokens · service                  the routes
    shapes, schemas, openapi                                            what is taken, checked and described

What needs Starlette is imported by ``serve`` when it is called.
"""

from deepseek.serve.server.config import ServerConfig
from deepseek.serve.server.keys import KeyConfig, Keyring
from deepseek.serve.server.launch import serve

__all__ = ["KeyConfig", "Keyring", "ServerConfig", "serve"]
