"""A router over several replicas of ``deepseek serve``: one process per GPU, one address for clients.

    deepseek route http://10.0.0.4:8000 http://10.0.0.5:8000 --port 8080

``Router`` is the whole of it as an ASGI application; ``route`` runs that until it is told to stop.
"""

from deepseek.serve.router.application import Router, RouterConfig
from deepseek.serve.router.run import route

__all__ = ["Router", "RouterConfig", "route"]
