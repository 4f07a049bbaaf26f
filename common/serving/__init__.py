"""An OpenAI-compatible service for one model: `python -m common.serving --model PATH`.

A request goes connections (time) → guard (host, key, size) → api (validation) → queueing (bounded) → engine → back as
text or as a stream.
`engine` computes in this process by continuous batching; `backend` passes requests on to a server such as vLLM.
"""

from common.serving.process import serve

__all__ = ["serve"]
