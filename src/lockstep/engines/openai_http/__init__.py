"""Any OpenAI-compatible server over HTTP.

engine.py  ──► replies.py   what a server may answer: types, bounds, and how large
   │      └──► exchange.py  one request and its whole answer: deadline, retries, size
   └─────────► options.py   where it is, and the key
"""

from lockstep.engines.openai_http.engine import OpenAIHttpEngine, connect

__all__ = ["OpenAIHttpEngine", "connect"]
