"""Names among the parameters of a model list that are no part of a connection."""

from __future__ import annotations

from typing import Final

from ..providers import connection

__all__ = ["IGNORED", "PARAMETERS", "UNSERVED"]

# OpenAI's parameters and the commonest of others: a name that is nearly one of these is misspelt.
PARAMETERS: Final = frozenset(
    [
        "audio",
        "best_of",
        "chat_template_kwargs",
        "dimensions",
        "echo",
        "enable_thinking",
        "encoding_format",
        "frequency_penalty",
        "function_call",
        "functions",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "include",
        "input_type",
        "instructions",
        "keep_alive",
        "language",
        "length_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "metadata",
        "min_p",
        "min_tokens",
        "modalities",
        "models",
        "n",
        "num_ctx",
        "num_predict",
        "parallel_tool_calls",
        "plugins",
        "prediction",
        "presence_penalty",
        "prompt",
        "prompt_cache_key",
        "provider",
        "random_seed",
        "reasoning",
        "reasoning_effort",
        "repeat_penalty",
        "repetition_penalty",
        "response_format",
        "route",
        "safe_prompt",
        "safety_identifier",
        "search_parameters",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream_options",
        "suffix",
        "temperature",
        "text",
        "thinking",
        "thinking_config",
        "timestamp_granularities",
        "tool_choice",
        "tools",
        "top_a",
        "top_k",
        "top_logprobs",
        "top_p",
        "transforms",
        "truncation",
        "user",
        "verbosity",
        "web_search_options",
    ]
)
# Said in model lists, and not known here. To leave one out in silence would be another deployment.
UNSERVED: Final = connection.UNSERVED | {"mock_response"}
# Of LiteLLM's proxy; they say nothing of a deployment.
IGNORED: Final = frozenset(["litellm_credential_name", "use_in_pass_through", "use_litellm_proxy"])
