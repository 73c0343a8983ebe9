"""Where the files of these tests are, and what their ``os.environ/NAME`` stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_middleware.config.load import Config, ConfigProblems, load_config

FILES = Path(__file__).parent.parent / "configs"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKID-of-the-environment",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-of-the-environment",
    "AZURE_KEY_CA": "ca-secret",
    "KEYS_DATABASE": "postgres://keys:database-password@db.example/keys",
    "MASTER_KEY": "sk-master",
    "NODE_2": "node-2.example",
    "OPENAI_API_KEY": "sk-openai",
    "REDIS_SECRET": "redis-secret",
    "ROUTER_REDIS": "router.example",
    "ROUTER_REDIS_PASSWORD": "router-secret",
}
MODEL = {"model_name": "gpt-4o", "litellm_params": {"model": "openai/gpt-4o", "api_key": "sk-openai"}}


def load(name: str, environ: Mapping[str, str] = SECRETS) -> Config:
    return load_config(FILES / name, environ)


def written(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(source: object, environ: Mapping[str, str] = SECRETS) -> list[tuple[str, int | None, str]]:
    """Path, line and message of everything that is wrong with ``source``; empty where nothing is."""
    try:
        load_config(source, environ)  # type: ignore[arg-type]  # it may be wrong on purpose
    except ConfigProblems as exc:
        return [(each.path, each.line, each.message) for each in exc.problems]
    return []
