"""Anthropic's Messages API behind OpenAI's chat completions.

`build` makes the request, `answer` and `events` translate what comes back, `failure` what comes instead.
None of them does I/O. Only ``chat`` is served: Anthropic has no embeddings and no text completions.

* System and developer messages go to ``system``, wherever they stand. Turns of the same role become one, so
  that all results of parallel tool calls are in one turn.
* ``max_tokens`` is the model's ``max_output_tokens`` where the caller sets none, since Anthropic needs one;
  where that is not known it is 4096, and a thinking budget comes on top.
* ``temperature`` above 1 becomes 1, as on Anthropic's own OpenAI-compatible endpoint.
* ``reasoning_effort`` becomes adaptive thinking with that effort, and a budget on Claude 4.5 and before.
* A ``json_schema`` becomes a native structured output. ``json_object`` has no counterpart.
* What has no counterpart is a `BadRequestError`, or left out under ``drop_params``. What is no name of
  OpenAI's (``top_k``, ``thinking``, ``cache_control`` ...) is sent as it is.

Sources: https://platform.claude.com/docs/en/api/messages and its pages on streaming, tool use, thinking and
errors. Names that OpenAI does not have (``reasoning_content``, ``thinking_blocks``) are LiteLLM's.
"""

from __future__ import annotations

from .anthropic_answer import answer
from .anthropic_request import build
from .anthropic_stream import events
from .failures import failure

__all__ = ["answer", "build", "events", "failure"]
