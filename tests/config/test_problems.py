"""What is wrong with a file: all of it, where, and what was meant; never a secret."""

from __future__ import annotations

import pytest
import yaml

from llm_middleware import ConfigError
from llm_middleware.config import document
from llm_middleware.config.load import ConfigProblems, load_config
from tests.config.files import FILES, SECRETS, problems, written


def test_everything_is_told_at_once_with_its_line():
    """C122"""
    assert problems(FILES / "broken.yaml") == [
        ("model_list[0].litellm_params.rpm", 6, "expected a whole number, not str"),
        ("model_list[0].litellm_params.tpm", 7, "expected a whole number, not str"),
        (
            "model_list[0].litellm_params.temprature",
            8,
            "did you mean 'temperature'? A provider's own parameter goes into extra_body",
        ),
        (
            "model_list[1].litellm_params.model",
            11,
            "there is no provider 'anthropc'; did you mean 'anthropic'?",
        ),
        ("model_list[2].model_name", 12, "is missing"),
        ("model_list[2].litellm_params.api_key", 14, "the environment has no NOT_SET"),
        ("litellm_settings.num_retrys", 17, "there is no such setting; did you mean 'num_retries'?"),
        ("litellm_settings.request_timeout", 18, "expected seconds > 0, got -5"),
        (
            "litellm_settings.cache_params.hosst",
            22,
            "unknown Redis setting 'hosst'; did you mean 'host'?",
        ),
        (
            "litellm_settings.cache_params.port",
            24,
            "port (or REDIS_PORT in the environment): '***' is not a whole number",
        ),
        ("litellm_settings.cache_params.ttl", 25, "expected seconds >= 0 or None, got -1"),
        (
            "router_settings.routing_strategy",
            28,
            "unknown name 'simple-shufle'; did you mean 'simple-shuffle'?",
        ),
        ("router_settings.fallbacks", 29, "expected a list of {group: [groups]}, got 'claude'"),
        ("router_settings.cooldown_time", 30, "expected a number >= 0, got ['***']"),
        ("general_settings.master_key", 33, "expected text"),
        ("general_settings.master_kay", 34, "there is no such setting; did you mean 'master_key'?"),
        ("modle_list", 36, "there is no such section; did you mean 'model_list'?"),
    ]


def test_the_message_lists_them_all():
    with pytest.raises(ConfigProblems) as caught:
        load_config(FILES / "broken.yaml", SECRETS)
    lines = caught.value.message.splitlines()
    assert lines[0] == "17 problems in the configuration:"
    assert len(lines) == 18
    assert (
        lines[1]
        == f"  {FILES}/broken.yaml:6: model_list[0].litellm_params.rpm: expected a whole number, not str"
    )
    assert caught.value.param == "model_list[0].litellm_params.rpm"
    assert isinstance(caught.value, ConfigError)


def test_a_mapping_has_paths_and_no_lines():
    assert problems({"models": [], "router": {"num_retries": "x"}}) == [
        ("router.num_retries", None, "expected a number >= 0, got 'x'")
    ]


SECRET = "hunter2'\\hunter2"
PLACES = [
    {"model_list": [{"model_name": "m", "litellm_params": {"model": "openai/m", "api_key": [SECRET]}}]},
    {
        "model_list": [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/m", "api_key": "os.environ/S", "rpm": "os.environ/S"},
            }
        ]
    },
    {"model_list": [{"model_name": "m", "litellm_params": {"model": "os.environ/S", "tpm": "os.environ/S"}}]},
    {"model_list": [{"model_name": "m", "litellm_params": {"model": f"{SECRET}/m", "api_key": SECRET}}]},
    {"general_settings": {"master_key": [SECRET]}},
    {"general_settings": {"database_url": f"postgresql//u:{SECRET}@h", "master_key": SECRET}},
    {
        "litellm_settings": {
            "cache": True,
            "cache_params": {"type": "redis", "url": f"redis//:{SECRET}@h", "password": SECRET},
        }
    },
    {"litellm_settings": {"cache": True, "cache_params": {"type": "redis", "url": f"http://u:{SECRET}@h"}}},
    {
        "litellm_settings": {
            "cache": True,
            "cache_params": {"type": "redis", "host": "h", "password": SECRET, "ttl": SECRET},
        }
    },
    {"litellm_settings": {"cache": True, "cache_params": {"type": "os.environ/S"}}},
    {
        "litellm_settings": {
            "cache": True,
            "cache_params": {"type": "s3", "s3_bucket_name": 5, "s3_aws_secret_access_key": {"a": SECRET}},
        }
    },
    {"litellm_settings": {"cache": "os.environ/S"}},
    {
        "router_settings": {
            "redis_password": SECRET,
            "redis_port": SECRET,
            "fallbacks": {"redis_password": SECRET},
        }
    },
    {"router_settings": {"routing_strategy": "os.environ/S", "timeout": "os.environ/S"}},
    {"router_settings": {"routing_strategy_args": {"token": SECRET}}},
    {
        "keys": {
            "store": {"type": "sql", "url": f"sqlite:{SECRET}"},
            "share": "os.environ/S",
            "master_key": SECRET,
        }
    },
    {
        "environment_variables": {"S_KEY": [SECRET], "T_KEY": "os.environ/S"},
        "server": {"admin": "os.environ/T_KEY"},
    },
]


@pytest.mark.parametrize("data", PLACES)
def test_no_message_holds_a_secret(data):
    with pytest.raises(ConfigProblems) as caught:
        load_config(data, {"S": SECRET})
    told = f"{caught.value.message}{caught.value.problems!r}{caught.value.body()!r}"
    assert "hunter2" not in told
    assert caught.value.problems[0].path


def test_no_repr_holds_a_secret():
    config = load_config(FILES / "proxy.yaml", SECRETS)
    for secret in ("eu-secret-from-the-file", "ca-secret", "router-secret", "sk-1234"):
        assert secret not in repr(config)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: *hunter2", 1, "not YAML: found undefined alias"),
        (
            "cache: true\nkeys:\n  master_key: %hunter2\n",
            3,
            "not YAML: found character that cannot start any token",
        ),
        ("keys:\n  master_key: sk-1\n bad: 1\n", 3, None),
        ("a: !hunter2 b", 1, "not plain YAML: tags are not read"),
        ("a: !!python/object/apply:os.system ['true']", 1, "not plain YAML: tags are not read"),
        ("a: 1\nb: !!python/name:os.system\n", 2, "not plain YAML: tags are not read"),
        ("a: !!binary aGk=", 1, "not plain YAML: tags are not read"),
        ("- a\n- b\n", None, "expected names and their settings, not a list"),
        ("just text", None, "expected names and their settings, not a str"),
        ("a: 1\n---\nb: 2\n", 2, None),
        ("? [a, b]\n: 1\n", 1, None),
        ("a: " + "9" * 5000, None, "not YAML: a number that cannot be read"),
        ("a: \x00", None, "not YAML: a character that may not stand there"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_without_its_text(tmp_path, text, line, message):
    [found] = problems(written(tmp_path, text))
    assert found[:2] == ("", line)
    assert "hunter2" not in found[2]
    if message is not None:
        assert found[2] == message


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "has too many values"),
        (merges(9), "has too many values"),
        ("a: &a [*a]", "is nested too deeply, or in itself"),
        ("a: &a {b: *a}", "is nested too deeply, or in itself"),
        ("a: " + "[" * 5000, "is nested too deeply"),
        ("a: " + "{b: " * 5000, "is nested too deeply"),
        ("a: [" + "1," * 300_000 + "]", "has too many values"),
        ("a: " + "x" * (1 << 20), "is longer than 1048576 bytes"),
    ],
)
def test_a_file_cannot_take_more_than_its_share(tmp_path, text, message):
    [(path, _, said)] = problems(written(tmp_path, text))
    assert (path, said) == ("", message)


def test_aliases_and_merges_are_read(tmp_path):
    config = load_config(
        written(
            tmp_path,
            """
models:
  - &first
    model_name: a
    litellm_params: &params {model: openai/a, api_key: k}
  - <<: *first
    model_name: b
    litellm_params: {<<: *params, model: openai/b}
""",
        ),
        {},
    )
    assert config.model_list == (
        {"model_name": "a", "litellm_params": {"model": "openai/a", "api_key": "k"}},
        {"model_name": "b", "litellm_params": {"model": "openai/b", "api_key": "k"}},
    )
    assert config.notes == ()


def test_what_is_given_twice_is_told(tmp_path):
    config = load_config(written(tmp_path, "router:\n  num_retries: 1\n  num_retries: 4\n"), {})
    assert config.router == {"num_retries": 4}
    assert config.notes == ("router.num_retries is given twice (lines 2 and 3): the last counts",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing.yaml", "there is no such file"),
        (lambda path: path, "cannot be read: Is a directory"),
        (lambda path: "\0", "cannot be read: not a path"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem(tmp_path, make, message):
    assert problems(make(tmp_path)) == [("", None, message)]


def test_a_file_that_is_not_text_is_a_problem(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    assert problems(path) == [("", 2, "is not UTF-8")]


def test_two_deployments_with_one_id_are_a_problem():
    entry = {"model_name": "m", "litellm_params": {"model": "openai/m"}, "model_info": {"id": "one"}}
    broken = {"model_name": "m"}
    assert problems({"models": [entry, broken, entry]}) == [
        ("models[1].litellm_params", None, "needs litellm_params, once"),
        ("models[2].model_info.id", None, "another deployment has this id"),
    ]


def test_a_credential_that_is_not_there_is_a_problem():
    params = {"model": "openai/m", "litellm_credential_name": "azur"}
    data = {
        "credential_list": [
            {"credential_name": "azure", "credential_values": {"api_key": "k"}},
            {"credential_name": "b"},
        ],
        "model_list": [{"model_name": "m", "litellm_params": params}],
    }
    assert problems(data) == [
        ("credential_list[1]", None, "needs a credential_name and credential_values"),
        (
            "model_list[0].litellm_params.litellm_credential_name",
            None,
            "there is no such credential; did you mean 'azure'?",
        ),
    ]


@pytest.mark.parametrize("text", ["a: *hunter2", "a: !hunter2 b", "a: %hunter2", "a: [*hunter2-hunter2]"])
def test_the_parser_written_in_python_shows_no_text_either(tmp_path, monkeypatch, text):
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    document._loader.cache_clear()
    try:
        [(path, line, message)] = problems(written(tmp_path, text))
    finally:
        document._loader.cache_clear()
    assert (path, line) == ("", 1)
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("password", "timeout", "said"),
    [
        ("abc", "abc", "'***'"),  # short ones only in quotes: the message itself has letters too
        ("seconds", "x", "'x'"),
        ("long-password", ["xlong-passwordx"], "['x***x']"),
        ("other", "sk-proj-1234567", "'***'"),
    ],
)
def test_a_secret_is_masked_wherever_it_was_put(password, timeout, said):
    data = {"router_settings": {"redis_password": password, "redis_host": "h", "timeout": timeout}}
    [(path, _, message)] = problems(data)
    assert path == "router_settings.timeout"
    assert message.endswith(f"> 0, got {said}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("enable_pre_call_checks", "perhaps", "true or false, not str"),
        ("cache_responses", 1, "true or false, not int"),
        ("model_group_alias", [1], "names and their values, not list"),
        ("caching_groups", "a", "a list, not str"),
    ],
)
def test_settings_of_a_router_have_types(name, value, expected):
    assert problems({"router_settings": {name: value}}) == [
        (f"router_settings.{name}", None, f"expected {expected}")
    ]


def test_a_deployment_that_could_never_answer_is_a_problem():
    azure = {"model": "azure/m", "api_base": "https://r.openai.azure.com", "api_key": "k"}
    models = [{"model_name": "m", "litellm_params": azure}]
    assert problems({"model_list": models}, {}) == [
        (
            "model_list[0].litellm_params.api_version",
            None,
            "azure needs an api_version, or an api_base that ends in /openai/v1",
        )
    ]
    version = {"AZURE_API_VERSION": "2024-10-21"}
    assert problems({"model_list": models, "environment_variables": version}, {}) == []
    settings = {"default_litellm_params": {"api_version": "2024-10-21", "rpm": "many"}}
    assert problems({"model_list": models, "router_settings": settings}, {}) == [
        ("router_settings.default_litellm_params.rpm", None, "expected a whole number, not str")
    ]
