"""The known providers: for each prefix of a model's name, where it is served and what is special there.

Rows have the form that a user's own rows have; `registry.Provider` says what each field means. Any of it may
be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["ALIASES", "ROWS"]

_MAX_TOKENS: Final = {"max_completion_tokens": "max_tokens"}


def _row(
    base: str | None, keys: str = "", base_env: str = "", *, also: str = "", **more: object
) -> Mapping[str, object]:
    """``keys``, ``base_env`` and ``also`` (the kinds besides chat): names, separated by spaces."""
    return {
        "base_url": base,
        "api_key_env": keys.split(),
        "api_base_env": base_env.split(),
        "kinds": ["chat", *also.split()],
        **more,
    }


ROWS: Final[Mapping[str, Mapping[str, object]]] = {
    "abliteration": _row("https://api.abliteration.ai/v1", "ABLITERATION_API_KEY"),
    "ai21_chat": _row("https://api.ai21.com/studio/v1", "AI21_API_KEY", "AI21_API_BASE"),
    "aihubmix": _row("https://aihubmix.com/v1", "AIHUBMIX_API_KEY", "AIHUBMIX_API_BASE"),
    "aiml": _row("https://api.aimlapi.com/v1", "AIML_API_KEY", "AIML_API_BASE", also="embedding"),
    "apertis": _row("https://api.stima.tech/v1", "STIMA_API_KEY", also="text embedding", renames=_MAX_TOKENS),
    "assemblyai": _row("https://llm-gateway.assemblyai.com/v1", "ASSEMBLYAI_API_KEY"),
    "azure_ai": _row(
        None, "AZURE_AI_API_KEY", "AZURE_AI_API_BASE", also="embedding", auth="azure_ai", adapter="azure_ai"
    ),
    "baseten": _row("https://inference.baseten.co/v1", "BASETEN_API_KEY", renames=_MAX_TOKENS),
    "cerebras": _row(
        "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", "CEREBRAS_API_BASE", renames=_MAX_TOKENS
    ),
    "charity_engine": _row(
        "https://api.charityengine.services/remotejobs/v2/inference",
        "CHARITY_ENGINE_API_KEY",
        renames=_MAX_TOKENS,
    ),
    "chutes": _row("https://llm.chutes.ai/v1", "CHUTES_API_KEY", also="text embedding", renames=_MAX_TOKENS),
    "clarifai": _row("https://api.clarifai.com/v2/ext/openai/v1", "CLARIFAI_API_KEY"),
    "cloudflare": _row(
        "https://api.cloudflare.com/client/v4/accounts/{CLOUDFLARE_ACCOUNT_ID}/ai/v1",
        "CLOUDFLARE_API_KEY",
        "CLOUDFLARE_API_BASE",
    ),
    "codestral": _row("https://codestral.mistral.ai/v1", "CODESTRAL_API_KEY", "CODESTRAL_API_BASE"),
    "cognition": _row("https://api.cognition.ai/v1", "COGNITION_API_KEY", "COGNITION_API_BASE"),
    "cometapi": _row(
        "https://api.cometapi.com/v1", "COMETAPI_KEY COMETAPI_API_KEY", "COMETAPI_API_BASE", also="embedding"
    ),
    "compactifai": _row("https://api.compactif.ai/v1", "COMPACTIFAI_API_KEY"),
    "cortecs": _row("https://api.cortecs.ai/v1", "CORTECS_API_KEY", "CORTECS_API_BASE"),
    "crusoe": _row(
        "https://managed-inference-api-proxy.crusoecloud.com/v1",
        "CRUSOE_API_KEY",
        "CRUSOE_API_BASE",
        renames=_MAX_TOKENS,
    ),
    "darkbloom": _row("https://api.darkbloom.dev/v1", "DARKBLOOM_API_KEY", "DARKBLOOM_API_BASE"),
    "dashscope": _row(
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "DASHSCOPE_API_KEY",
        "DASHSCOPE_API_BASE",
        also="text",
    ),
    "databricks": _row(None, "DATABRICKS_API_KEY", "DATABRICKS_API_BASE", renames=_MAX_TOKENS),
    "deepinfra": _row(
        "https://api.deepinfra.com/v1/openai",
        "DEEPINFRA_API_KEY",
        "DEEPINFRA_API_BASE",
        also="transcription",
        renames=_MAX_TOKENS,
    ),
    "deepseek": _row(
        "https://api.deepseek.com/beta",
        "DEEPSEEK_API_KEY",
        "DEEPSEEK_API_BASE",
        bases=["https://api.deepseek.com/v1", "https://api.deepseek.com"],
        renames=_MAX_TOKENS,
    ),
    "docker_model_runner": _row(
        "http://localhost:22088/engines/llama.cpp",
        "DOCKER_MODEL_RUNNER_API_KEY",
        "DOCKER_MODEL_RUNNER_API_BASE",
        suffix="/v1",
    ),
    "edenai": _row("https://api.edenai.run/v3", "EDENAI_API_KEY", "EDENAI_API_BASE", also="embedding"),
    "empiriolabs": _row("https://api.empiriolabs.ai/v1", "EMPIRIOLABS_API_KEY", "EMPIRIOLABS_API_BASE"),
    "empower": _row("https://app.empower.dev/api/v1", "EMPOWER_API_KEY", "EMPOWER_API_BASE"),
    "featherless_ai": _row(
        "https://api.featherless.ai/v1",
        "FEATHERLESS_AI_API_KEY FEATHERLESS_API_KEY",
        "FEATHERLESS_AI_API_BASE FEATHERLESS_API_BASE",
        also="text",
        renames=_MAX_TOKENS,
    ),
    "fireworks_ai": _row(
        "https://api.fireworks.ai/inference/v1",
        "FIREWORKS_API_KEY FIREWORKS_AI_API_KEY FIREWORKSAI_API_KEY FIREWORKS_AI_TOKEN",
        "FIREWORKS_API_BASE",
        also="text transcription",
        renames=_MAX_TOKENS,
    ),
    "friendliai": _row(
        "https://api.friendli.ai/serverless/v1", "FRIENDLIAI_API_KEY FRIENDLI_TOKEN", "FRIENDLI_API_BASE"
    ),
    "galadriel": _row("https://api.galadriel.com/v1", "GALADRIEL_API_KEY", "GALADRIEL_API_BASE"),
    "gigachat": _row(
        "https://gigachat.devices.sberbank.ru/api/v1",
        "GIGACHAT_API_KEY",
        "GIGACHAT_API_BASE",
        also="embedding",
    ),
    "github": _row("https://models.inference.ai.azure.com", "GITHUB_API_KEY", "GITHUB_API_BASE"),
    "gmi": _row("https://api.gmi-serving.com/v1", "GMI_API_KEY"),
    "gradient_ai": _row(
        "https://inference.do-ai.run", "GRADIENT_AI_API_KEY", "GRADIENT_AI_AGENT_ENDPOINT", suffix="/v1"
    ),
    "groq": _row("https://api.groq.com/openai/v1", "GROQ_API_KEY", "GROQ_API_BASE", also="transcription"),
    "helicone": _row("https://ai-gateway.helicone.ai", "HELICONE_API_KEY"),
    "heroku": _row(None, "HEROKU_API_KEY", "HEROKU_API_BASE", suffix="/v1"),
    "hosted_vllm": _row(
        None, "HOSTED_VLLM_API_KEY", "HOSTED_VLLM_API_BASE", also="text embedding transcription"
    ),
    "huggingface": _row(
        "https://router.huggingface.co/v1",
        "HF_TOKEN HUGGINGFACE_API_KEY",
        "HUGGINGFACE_API_BASE",
        also="embedding",
        renames=_MAX_TOKENS,
    ),
    "hyperbolic": _row(
        "https://api.hyperbolic.xyz/v1", "HYPERBOLIC_API_KEY", "HYPERBOLIC_API_BASE", also="text"
    ),
    "inception": _row("https://api.inceptionlabs.ai/v1", "INCEPTION_API_KEY", "INCEPTION_API_BASE"),
    "jina_ai": _row(
        "https://api.jina.ai/v1",
        "JINA_AI_API_KEY JINA_API_KEY JINA_AI_TOKEN",
        "JINA_AI_API_BASE",
        also="embedding",
    ),
    "lambda_ai": _row("https://api.lambda.ai/v1", "LAMBDA_API_KEY", "LAMBDA_API_BASE", also="text"),
    "lemonade": _row("http://localhost:8000/api/v1", "LEMONADE_API_KEY", "LEMONADE_API_BASE"),
    "libertai": _row("https://api.libertai.io/v1", "LIBERTAI_API_KEY", "LIBERTAI_API_BASE"),
    "litellm_proxy": _row(None, "LITELLM_PROXY_API_KEY", "LITELLM_PROXY_API_BASE", also="embedding"),
    "llamafile": _row(
        "http://127.0.0.1:8080/v1",
        "LLAMAFILE_API_KEY",
        "LLAMAFILE_API_BASE",
        also="text",
        renames=_MAX_TOKENS,
    ),
    "llamagate": _row("https://api.llamagate.dev/v1", "LLAMAGATE_API_KEY", renames=_MAX_TOKENS),
    "lm_studio": _row(None, "LM_STUDIO_API_KEY", "LM_STUDIO_API_BASE"),
    "meta": _row("https://api.meta.ai/v1", "META_API_KEY", "META_API_BASE"),
    "meta_llama": _row("https://api.llama.com/compat/v1", "LLAMA_API_KEY", "LLAMA_API_BASE", also="text"),
    "minimax": _row(
        "https://api.minimax.io/v1",
        "MINIMAX_API_KEY",
        "MINIMAX_API_BASE",
        bases=["https://api.minimaxi.com/v1"],
    ),
    # LiteLLM's MISTRAL_AZURE_API_KEY is not read: it is a key of Azure's, and this is not its host.
    "mistral": _row(
        "https://api.mistral.ai/v1",
        "MISTRAL_API_KEY",
        "MISTRAL_API_BASE",
        also="embedding",
        suffix="/v1",
        renames={**_MAX_TOKENS, "seed": "random_seed"},
    ),
    "modelscope": _row(
        "https://api-inference.modelscope.cn/v1", "MODELSCOPE_API_KEY", "MODELSCOPE_API_BASE", also="text"
    ),
    "moonshot": _row(
        "https://api.moonshot.ai/v1",
        "MOONSHOT_API_KEY",
        "MOONSHOT_API_BASE",
        also="text",
        renames=_MAX_TOKENS,
    ),
    "morph": _row("https://api.morphllm.com/v1", "MORPH_API_KEY", "MORPH_API_BASE"),
    "nadir": _row("https://api.getnadir.com/v1", "NADIR_API_KEY", "NADIR_API_BASE"),
    "nano-gpt": _row("https://nano-gpt.com/api/v1", "NANOGPT_API_KEY", also="text", renames=_MAX_TOKENS),
    "nebius": _row(
        "https://api.studio.nebius.ai/v1",
        "NEBIUS_API_KEY",
        "NEBIUS_API_BASE",
        also="text embedding",
        bases=["https://api.tokenfactory.nebius.com/v1"],
        renames=_MAX_TOKENS,
    ),
    "neosantara": _row("https://api.neosantara.xyz/v1", "NEOSANTARA_API_KEY", "NEOSANTARA_API_BASE"),
    "novita": _row("https://api.novita.ai/v3/openai", "NOVITA_API_KEY", "NOVITA_API_BASE"),
    "nscale": _row("https://inference.api.nscale.com/v1", "NSCALE_API_KEY", "NSCALE_API_BASE"),
    "nvidia_nim": _row(
        "https://integrate.api.nvidia.com/v1",
        "NVIDIA_NIM_API_KEY",
        "NVIDIA_NIM_API_BASE",
        renames=_MAX_TOKENS,
    ),
    "ollama": _row(
        "http://localhost:11434",
        "OLLAMA_API_KEY",
        "OLLAMA_API_BASE",
        also="embedding",
        suffix="/v1",
        renames=_MAX_TOKENS,
    ),
    "openai": _row(
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL OPENAI_API_BASE",
        also="text embedding transcription responses",
        bases=["https://eu.api.openai.com/v1", "https://us.api.openai.com/v1"],
    ),
    "openrouter": _row(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "OPENROUTER_API_BASE", also="embedding"
    ),
    "ovhcloud": _row(
        "https://oai.endpoints.kepler.ai.cloud.ovh.net/v1",
        "OVHCLOUD_API_KEY",
        "OVHCLOUD_API_BASE",
        also="transcription",
    ),
    "parasail": _row(
        "https://api.parasail.io/v1", "PARASAIL_API_KEY", "PARASAIL_API_BASE", force={"store": False}
    ),
    "perplexity": _row(
        "https://api.perplexity.ai",
        "PERPLEXITYAI_API_KEY PERPLEXITY_API_KEY",
        "PERPLEXITY_API_BASE",
        renames=_MAX_TOKENS,
    ),
    "pinstripes": _row("https://pinstripes.io/v1", "PINSTRIPES_API_KEY", "PINSTRIPES_API_BASE"),
    "poe": _row("https://api.poe.com/v1", "POE_API_KEY", also="text embedding", renames=_MAX_TOKENS),
    "prism": _row("https://api.prisminference.com/v1", "PRISM_API_KEY", "PRISM_API_BASE"),
    "publicai": _row(
        "https://api.publicai.co/v1",
        "PUBLICAI_API_KEY",
        "PUBLICAI_API_BASE",
        also="text",
        text_content=True,
        renames=_MAX_TOKENS,
    ),
    "qwen_ai_platform": _row(
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "QWEN_AI_PLATFORM_API_KEY DASHSCOPE_API_KEY",
        "QWEN_AI_PLATFORM_API_BASE",
        also="text embedding",
    ),
    "qwencloud": _row(
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        "QWENCLOUD_API_KEY DASHSCOPE_API_KEY",
        "QWENCLOUD_API_BASE",
        also="text embedding",
    ),
    "reka": _row("https://api.reka.ai/v1", "REKA_API_KEY", "REKA_API_BASE"),
    "sail": _row("https://api.sailresearch.com/v1", "SAIL_API_KEY", "SAIL_API_BASE"),
    "sambanova": _row(
        "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY", "SAMBANOVA_API_BASE", renames=_MAX_TOKENS
    ),
    "sarvam": _row(
        "https://api.sarvam.ai/v1", "SARVAM_API_KEY", auth="api-subscription-key", renames=_MAX_TOKENS
    ),
    "scaleway": _row("https://api.scaleway.ai/v1", "SCW_SECRET_KEY"),
    "scx-ai": _row("https://api.scx.ai/v1", "SCX_API_KEY", "SCX_API_BASE", maximum={"temperature": 1.99}),
    "synthetic": _row(
        "https://api.synthetic.new/openai/v1", "SYNTHETIC_API_KEY", also="text embedding", renames=_MAX_TOKENS
    ),
    "tencent": _row("https://tokenhub-intl.tencentcloudmaas.com/v1", "TENCENT_API_KEY", "TENCENT_API_BASE"),
    "tensormesh": _row(
        "https://serverless.tensormesh.ai/v1",
        "TENSORMESH_INFERENCE_API_KEY",
        "TENSORMESH_SERVERLESS_BASE_URL",
        also="text",
    ),
    "together_ai": _row(
        "https://api.together.ai/v1",
        "TOGETHER_API_KEY TOGETHER_AI_API_KEY TOGETHERAI_API_KEY TOGETHER_AI_TOKEN",
        "TOGETHER_AI_API_BASE",
        also="text",
        bases=["https://api.together.xyz/v1"],
        renames=_MAX_TOKENS,
    ),
    "v0": _row("https://api.v0.dev/v1", "V0_API_KEY", "V0_API_BASE", also="text"),
    "veniceai": _row("https://api.venice.ai/api/v1", "VENICE_AI_API_KEY"),
    "vercel_ai_gateway": _row(
        "https://ai-gateway.vercel.sh/v1",
        "VERCEL_AI_GATEWAY_API_KEY VERCEL_OIDC_TOKEN",
        "VERCEL_AI_GATEWAY_API_BASE",
    ),
    "volcengine": _row(
        "https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE_API_KEY", "VOLCENGINE_API_BASE"
    ),
    "wandb": _row("https://api.inference.wandb.ai/v1", "WANDB_API_KEY", "WANDB_API_BASE", also="text"),
    "xai": _row("https://api.x.ai/v1", "XAI_API_KEY", "XAI_API_BASE"),
    "xiaomi_mimo": _row("https://api.xiaomimimo.com/v1", "XIAOMI_MIMO_API_KEY", renames=_MAX_TOKENS),
    "xinference": _row(
        "http://127.0.0.1:9997/v1", "XINFERENCE_API_KEY", "XINFERENCE_API_BASE", also="embedding"
    ),
    "zai": _row("https://api.z.ai/api/paas/v4", "ZAI_API_KEY", "ZAI_API_BASE", renames=_MAX_TOKENS),
    # Those below have an API of their own. What is not native here goes by their OpenAI-compatible endpoint.
    "anthropic": _row(
        "https://api.anthropic.com",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL ANTHROPIC_API_BASE",
        auth="x-api-key",
        adapter="anthropic",
    ),
    "azure": _row(
        None,
        "AZURE_API_KEY AZURE_OPENAI_API_KEY",
        "AZURE_API_BASE AZURE_OPENAI_ENDPOINT",
        also="text embedding transcription responses",
        auth="api-key",
        adapter="azure",
    ),
    "bedrock": _row(
        "https://bedrock-runtime.{aws_region_name}.amazonaws.com",
        "AWS_BEARER_TOKEN_BEDROCK",
        "AWS_BEDROCK_RUNTIME_ENDPOINT",
        adapter="bedrock",
    ),
    "bedrock_mantle": _row(
        "https://bedrock-mantle.{aws_region_name}.api.aws/v1", "AWS_BEARER_TOKEN_BEDROCK", also="responses"
    ),
    "cohere": _row(
        "https://api.cohere.ai/compatibility/v1",
        "COHERE_API_KEY CO_API_KEY",
        "COHERE_API_BASE",
        also="embedding",
        bases=["https://api.cohere.com/compatibility/v1"],
        renames=_MAX_TOKENS,
    ),
    "gemini": _row(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        "GEMINI_API_KEY GOOGLE_API_KEY",
        "GEMINI_API_BASE",
        also="embedding",
    ),
    "vertex_ai": _row(
        "https://{vertex_location}-aiplatform.googleapis.com/v1"
        "/projects/{vertex_project}/locations/{vertex_location}/endpoints/openapi",
        "",
        "VERTEXAI_API_BASE",
    ),
    # Any other server that speaks OpenAI's API. It has no key of its own in the environment.
    "openai_like": _row(None, also="text embedding transcription responses"),
}

# Other prefixes that model lists have for the same provider.
ALIASES: Final[Mapping[str, str]] = {
    "azure_text": "azure",
    "bedrock_converse": "bedrock",
    "cohere_chat": "cohere",
    "custom_openai": "openai_like",
    "ollama_chat": "ollama",
    "text-completion-codestral": "codestral",
    "text-completion-openai": "openai",
    "vertex_ai_beta": "vertex_ai",
}
