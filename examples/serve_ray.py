"""The server's replicas on Ray Serve: one process per GPU, placed, scaled and restarted by Ray on any of its machines.

    pip install "ray[serve]" "deepseek-framework[serve]"
    ray start --head
    DEEPSEEK_API_KEYS=me=sk-0123456789abcdef python examples/serve_ray.py runs/mine

Each Ray replica holds the whole ASGI application of `deepseek serve`, so routes, keys, streams and limits are the same
behind Ray's proxy; Ray chooses the replica with fewer requests of two. Requests above a replica's bounded queue get its
own 429. The model must be readable under the same path on every machine.

Needs a Ray of which `serve.ingress` takes a builder function (since May 2025). Ray's documentation:
https://docs.ray.io/en/latest/serve/http-guide.html and https://docs.ray.io/en/latest/serve/api/doc/ray.serve.ingress.html
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

MODEL = "DEEPSEEK_MODEL"
KEYS = "DEEPSEEK_API_KEYS"


def client() -> Any:
    """The engine in a step process of its own; Ray has shown it one GPU only."""
    from deepseek.serve.client import ProcessClient
    from deepseek.serve.engine import EngineConfig

    return ProcessClient(os.environ[MODEL], EngineConfig())


def build() -> Any:
    """`deepseek serve` as an ASGI application, made by Ray in every replica. Its lifespan loads the model."""
    from deepseek.serve.server.app import application
    from deepseek.serve.server.config import ServerConfig
    from deepseek.serve.server.front import Front
    from deepseek.serve.server.keys import Keyring
    from deepseek.serve.server.launch import load_texts

    engine = client()
    app = application(Front(engine, load_texts, ServerConfig(), Keyring.load(None, os.environ)))
    serving = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with engine, serving(app):
            yield

    app.router.lifespan_context = lifespan
    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run, a checkpoint, a Hugging Face directory or a GGUF file")
    parser.add_argument("--most", type=int, default=8, help="replicas at most")
    parser.add_argument("--gpus", type=float, default=1, help="per replica; 0 on machines without")
    parser.add_argument("--host", default="127.0.0.1", help="of Ray's proxy; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    if KEYS not in os.environ:
        parser.error(
            f"every program on this machine reaches Ray's proxy, others with --host: set {KEYS}=NAME=KEY"
        )

    from ray import serve

    environment = {MODEL: str(Path(asked.model).resolve()), KEYS: os.environ[KEYS]}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="deepseek",
        ray_actor_options={"num_gpus": asked.gpus, "num_cpus": 2, "runtime_env": {"env_vars": environment}},
        max_ongoing_requests=512,  # more than a replica takes (64 running, 256 waiting), so that its 429 is heard
        graceful_shutdown_timeout_s=90,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": asked.most,
            "target_ongoing_requests": 48,
            "downscale_delay_s": 600,
        },
    )
    serve.start(http_options={"host": asked.host, "port": asked.port})
    serve.run(deployment.bind(), name="deepseek", route_prefix="/", blocking=True)


if __name__ == "__main__":
    main()
