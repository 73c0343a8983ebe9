"""A Router's ``model_list``: what is read from it, what is refused, and which deployments a name means."""

from __future__ import annotations

import copy
import json
import random

import pytest

from llm_middleware import ConfigError
from llm_middleware.providers.registry import registry
from llm_middleware.routing.model_list import Groups, find, read_model_list


def entry(group="gpt", model="openai/gpt-4o", *, name="litellm_params", top=None, **params):
    return {"model_name": group, name: {"model": model, **params}, **(top or {})}


def read(*entries, environ=None, **more):
    return read_model_list(list(entries), environ=environ or {}, **more)


def one(*args, environ=None, **more):
    return read(entry(*args, **more), environ=environ)[0]


class TestReading:
    def test_everything_has_its_place(self):
        deployment = read(
            {
                "model_name": "gpt",
                "litellm_params": {
                    "model": "azure/my-gpt",
                    "api_key": "k",
                    "api_base": "https://r.openai.azure.com",
                    "api_version": "2024-10-21",
                    "extra_headers": {"x-a": "1"},
                    "max_retries": 2,
                    "timeout": 30,
                    "stream_timeout": "5",
                    "tags": ["free", "eu"],
                    "rpm": 10,
                    "weight": 3,
                    "temperature": 0.1,
                    "max_tokens": 100,
                    "own_parameter_of_theirs": {"a": 1},
                    "input_cost_per_token": 1e-6,
                    "max_parallel_requests": 4,
                },
                "tpm": 1000,
                "order": 2,
                "model_info": {"id": "d1", "base_model": "gpt-4o", "max_input_tokens": 128000, "team": "x"},
            }
        )[0]
        assert deployment.id == "d1"
        assert (deployment.group, deployment.provider, deployment.model) == ("gpt", "azure", "my-gpt")
        assert deployment.connection == {
            "api_key": "k",
            "api_base": "https://r.openai.azure.com",
            "api_version": "2024-10-21",
            "extra_headers": {"x-a": "1"},
            "max_retries": 2,
        }
        assert deployment.params == {
            "temperature": 0.1,
            "max_tokens": 100,
            "own_parameter_of_theirs": {"a": 1},
        }
        assert deployment.info == {
            "input_cost_per_token": 1e-6,
            "base_model": "gpt-4o",
            "max_input_tokens": 128000,
            "team": "x",
        }
        assert (deployment.rpm, deployment.tpm, deployment.max_parallel_requests) == (10, 1000, 4)
        assert (deployment.weight, deployment.order) == (3, 2)
        assert (deployment.timeout, deployment.stream_timeout) == (30.0, 5.0)
        assert deployment.tags == {"free", "eu"}

    def test_what_is_not_said_is_the_default(self):
        deployment = one()
        assert (deployment.rpm, deployment.tpm, deployment.weight, deployment.order) == (None, None, None, 0)
        assert (deployment.timeout, deployment.tags, deployment.params) == (None, frozenset(), {})

    def test_our_own_name_for_the_parameters(self):
        assert one(name="provider_params").model == "gpt-4o"
        both = {"model_name": "a", "litellm_params": {"model": "a"}, "provider_params": {"model": "a"}}
        with pytest.raises(ConfigError, match=r"^model_list\[0\]: needs litellm_params, once"):
            read(both)

    @pytest.mark.parametrize("name", ["rpm", "tpm", "weight", "order", "max_parallel_requests"])
    def test_limits_may_stand_in_any_place_and_the_outermost_counts(self, name):
        places = [{"top": {name: 3}}, {name: 4}, {"top": {"model_info": {name: 5}}}]
        assert [getattr(one(**place), name) for place in places] == [3, 4, 5]
        assert getattr(one(**{name: 4}, top={name: 3}), name) == 3
        assert getattr(one(**{name: 4}, top={name: None}), name) == 4

    def test_a_weight_that_is_set_is_told_from_none(self):
        assert one(weight=0).weight == 0
        assert one(weight=1).weight == 1
        assert one(weight=None).weight is None
        assert one(weight=0.25).weight == 0.25

    def test_providers(self):
        assert [
            (deployment.provider, deployment.model)
            for deployment in read(
                entry(model="groq/llama"),
                entry(model="claude-sonnet-4"),
                entry(model="gpt-4o"),
                entry(model="grok-4", api_base="https://api.x.ai/v1"),
                entry(model="org/model", base_url="http://gpu:8000/v1"),
                entry(model="org/model", custom_llm_provider="hosted_vllm"),
            )
        ] == [
            ("groq", "llama"),
            ("anthropic", "claude-sonnet-4"),
            ("openai", "gpt-4o"),
            ("xai", "grok-4"),
            ("openai_like", "org/model"),
            ("hosted_vllm", "org/model"),
        ]
        mine = registry({"house": {"base_url": "https://house.example"}})
        assert read(entry(model="house/m"), providers=mine)[0].provider == "house"

    def test_variables_of_the_environment(self):
        environ = {"KEY": "k", "BASE": "https://b.example", "RPM": "7"}
        deployment = one(
            api_key="os.environ/KEY", api_base="os.environ/BASE", rpm="os.environ/RPM", environ=environ
        )
        assert deployment.connection == {"api_key": "k", "api_base": "https://b.example"}
        assert deployment.rpm == 7
        with pytest.raises(ConfigError) as caught:
            one(extra_headers={"a": "os.environ/NONE"})
        assert caught.value.param == "model_list[0].litellm_params.extra_headers.a"

    def test_defaults_are_under_the_entries_own(self):
        deployment = read(
            entry(temperature=1), default_litellm_params={"temperature": 0, "timeout": 9, "api_key": "k"}
        )[0]
        assert deployment.params == {"temperature": 1}
        assert (deployment.timeout, deployment.connection) == (9.0, {"api_key": "k"})

    def test_r54_the_callers_objects_do_not_change(self):
        defaults = {"extra_headers": {"x": "1"}}
        entries = [
            entry(tags=["a"], extra_body={"a": {"b": 1}}, top={"model_info": {"id": "x", "rpm": 3}}),
            entry(model="os.environ/M"),
        ]
        before = copy.deepcopy((entries, defaults))
        for _ in range(2):
            deployments = read(*entries, default_litellm_params=defaults, environ={"M": "groq/a"})
            deployments[0].connection["extra_body"]["a"]["b"] = 2
            deployments[0].connection["extra_headers"]["x"] = "2"
        assert (entries, defaults) == before

    def test_a_function_may_give_the_key(self):
        def token():
            return "t"

        assert one(api_key=token).connection["api_key"] is token
        assert one(api_key=token).id == one(api_key="k").id


WRONG = [
    ({"rpm": "many"}, "litellm_params.rpm"),
    ({"rpm": 10**400}, "litellm_params.rpm"),
    ({"weight": 10**400}, "litellm_params.weight"),
    ({"aws_web_identity_token": "oidc/file/x"}, "litellm_params.aws_web_identity_token"),
    ({"rpm": 0}, "litellm_params.rpm"),
    ({"rpm": 1.5}, "litellm_params.rpm"),
    ({"tpm": True}, "litellm_params.tpm"),
    ({"weight": -1}, "litellm_params.weight"),
    ({"weight": float("nan")}, "litellm_params.weight"),
    ({"timeout": 0}, "litellm_params.timeout"),
    ({"timeout": "soon"}, "litellm_params.timeout"),
    ({"tags": "free"}, "litellm_params.tags"),
    ({"tags": ["a", 5]}, "litellm_params.tags[1]"),
    ({"api_key": 5}, "litellm_params.api_key"),
    ({"api_base": ["x"]}, "litellm_params.api_base"),
    ({"extra_headers": {"a": 5}}, "litellm_params.extra_headers.a"),
    ({"extra_body": "x"}, "litellm_params.extra_body"),
    ({"drop_params": "maybe"}, "litellm_params.drop_params"),
    ({"api_bse": "x"}, "litellm_params.api_bse"),
    ({"temprature": 1}, "litellm_params.temprature"),
    ({"rmp": 1}, "litellm_params.rmp"),
    ({"tenant_id": "x"}, "litellm_params.tenant_id"),
    ({"input_cost_per_token": "cheap"}, "litellm_params.input_cost_per_token"),
    ({"model": None}, "litellm_params.model"),
    ({"model": ""}, "litellm_params.model"),
    ({"model": "gorq/llama"}, "litellm_params.model"),
    ({"model": "openai/"}, "litellm_params.model"),
    ({"model": "openai/gpt-*"}, "litellm_params.model"),
    ({"custom_llm_provider": "opnai"}, "litellm_params.custom_llm_provider"),
    ({"top": {"rpm": "x"}}, "rpm"),
    ({"top": {"modelinfo": {}}}, "modelinfo"),
    ({"top": {"model_info": "x"}}, "model_info"),
    ({"top": {"model_info": {"rpm": "x"}}}, "model_info.rpm"),
    ({"top": {"model_info": {"max_input_tokens": "x"}}}, "model_info.max_input_tokens"),
    ({"top": {"model_info": {"output_cost_per_token": -1}}}, "model_info.output_cost_per_token"),
    ({"top": {"model_name": 5}}, "model_name"),
    ({"top": {"litellm_params": "x"}}, "litellm_params"),
]


class TestErrors:
    @pytest.mark.parametrize(("wrong", "where"), WRONG, ids=lambda value: str(value)[:40])
    def test_the_place_is_named(self, wrong, where):
        with pytest.raises(ConfigError) as caught:
            read(entry(), entry(), entry(**wrong))
        assert caught.value.param == f"model_list[2].{where}"
        assert str(caught.value).startswith(f"model_list[2].{where}: ")

    @pytest.mark.parametrize("entries", [5, "x", {"model_name": "x"}, None])
    def test_a_list_is_a_list(self, entries):
        with pytest.raises(ConfigError, match=r"^model_list: expected a list"):
            read_model_list(entries)
        with pytest.raises(ConfigError, match=r"^model_list\[0\]: expected a mapping"):
            read_model_list(["x"])

    def test_a_hint_and_no_value(self):
        with pytest.raises(ConfigError, match="did you mean 'api_key'") as caught:
            one(api_kye="hidden-key")
        assert "hidden" not in str(caught.value)

    @pytest.mark.parametrize(
        "name", ["top_k", "min_p", "enable_thinking", "num_beams", "repeat_penalty", "seed"]
    )
    def test_a_providers_own_parameter_is_one_of_requests(self, name):
        assert one(**{name: 5}).params == {name: 5}


class TestIds:
    def test_r17_another_key_is_the_same_deployment(self):
        first = one(api_key="first", api_base="https://a.example", extra_headers={"x-key": "first"})
        second = one(api_key="second", api_base="https://a.example", extra_headers={"x-key": "second"})
        assert first.id == second.id
        assert len(first.id) == 16
        assert "first" not in repr(first)

    def test_r17_so_are_other_limits_and_times(self):
        plain = one().id
        assert one(rpm=5, tpm=5, weight=2, order=1, timeout=5, max_retries=1).id == plain
        assert one(top={"rpm": 5, "model_info": {"team": "x"}}).id == plain

    def test_r17_an_id_is_the_same_tomorrow(self):
        assert one(api_base="https://a.example", temperature=0).id == "89a550c5690cd961"

    @pytest.mark.parametrize(
        "other",
        [
            {"group": "gpt2"},
            {"model": "openai/gpt-4"},
            {"api_base": "https://b.example"},
            {"temperature": 1},
            {"tags": ["a"]},
            {"organization": "o"},
        ],
    )
    def test_another_place_is_another_deployment(self, other):
        assert one(**other).id != one().id

    def test_r16_identical_entries_are_two_deployments(self):
        same = entry(api_key="k")
        ids = [deployment.id for deployment in read(same, same, entry(api_key="other"), entry("b"))]
        assert ids[1:3] == [f"{ids[0]}-2", f"{ids[0]}-3"]
        assert len(set(ids)) == 4

    def test_an_id_of_the_users_wins(self):
        plain = one().id
        deployments = read(entry(), entry(top={"model_info": {"id": f"{plain}-2"}}), entry())
        assert [deployment.id for deployment in deployments] == [plain, f"{plain}-2", f"{plain}-3"]
        deployments = read(entry(), entry(), entry(top={"model_info": {"id": f"{plain}-2"}}))
        assert [deployment.id for deployment in deployments] == [plain, f"{plain}-3", f"{plain}-2"]
        assert one(top={"model_info": {"id": 7}}).id == "7"
        with pytest.raises(ConfigError, match=r"^model_list\[1\].model_info.id: another deployment"):
            read(*[entry(top={"model_info": {"id": "a"}})] * 2)

    def test_what_has_no_text_of_its_own_does_not_disturb(self):
        assert one(response_format=object()).id == one(response_format=object()).id
        assert one(logit_bias={1: 2, "a": {"b": (1, None)}}).id != one().id


class TestNames:
    def test_a_group_is_found_by_its_name_in_order(self):
        deployments = read(entry("a", api_key="1"), entry("b"), entry("a", api_key="2"))
        assert find(deployments, "a") == [deployments[0], deployments[2]]
        assert find(deployments, "c") == []
        assert find(deployments, "A") == []

    def test_aliases(self):
        deployments = read(entry("a"), entry("b"))
        aliases = {"x": "a", "b": "a", "y": {"model": "b", "hidden": True}, "z": "nothing"}
        names = [[one.group for one in find(deployments, name, aliases)] for name in "abxyz"]
        assert names == [["a"], ["a"], ["a"], ["b"], []]
        with pytest.raises(ConfigError, match=r"^model_group_alias.x: expected text"):
            find(deployments, "a", {"x": 5})

    @pytest.mark.parametrize(
        ("group", "name", "fits"),
        [
            ("openai/gpt-4*-mini", "openai/gpt-4o-mini", True),
            ("openai/gpt-4*-mini", "openai/gpt-4-mini", True),
            ("openai/gpt-4*-mini", "openai/gpt-4o-mini-2024-x", False),
            ("openai/gpt-4*-mini", "x-openai/gpt-4o-mini", False),
            ("openai/gpt-4.1*", "openai/gpt-4x1-foo", False),
            ("openai/gpt-4.1*", "openai/gpt-4.1-foo", True),
            ("a+b*", "aab", False),
            ("a+b*", "a+bc", True),
            ("[ab]*", "a", False),
            ("m-*", "m-x\ny", True),
            ("m-*", "\nm-x", False),
        ],
    )
    def test_r65_a_pattern_fits_the_whole_name_and_means_itself(self, group, name, fits):
        assert bool(find(read(entry(group, "openai/fixed")), name)) is fits

    def test_r65_the_most_specific_counts(self):
        groups = ["*", "openai/*", "openai/gpt-*", "openai/gpt-4*", "openai/*-mini", "openai/gpt-4o"]
        entries = [entry(group, "openai/fixed") for group in groups]
        random.Random(1).shuffle(entries)
        deployments = read(*entries)
        found = {
            name: [deployment.group for deployment in find(deployments, name)]
            for name in ("openai/gpt-4o", "openai/gpt-4x", "openai/gpt-3", "openai/o3-mini", "openai/x", "y")
        }
        assert found == {
            "openai/gpt-4o": ["openai/gpt-4o"],
            "openai/gpt-4x": ["openai/gpt-4*"],
            "openai/gpt-3": ["openai/gpt-*"],
            "openai/o3-mini": ["openai/*-mini"],
            "openai/x": ["openai/*"],
            "y": ["*"],
        }

    @pytest.mark.parametrize(
        ("group", "model", "name", "expected"),
        [
            ("openai/*", "openai/*", "openai/gpt-4o", ("openai", "gpt-4o")),
            ("openai/*", "openai/*", "openai/ft:a/b", ("openai", "ft:a/b")),
            ("my-*", "groq/llama-*-it", "my-70b", ("groq", "llama-70b-it")),
            ("*/*", "openrouter/*/*", "a/b", ("openrouter", "a/b")),
            ("*-x-*", "openai/*", "a-x-b", ("openai", "a")),
            ("gpt-*", "openai/gpt-4o", "gpt-any", ("openai", "gpt-4o")),
            ("*", "*", "groq/llama", ("groq", "llama")),
            ("*", "*", "gpt-4o", ("openai", "gpt-4o")),
        ],
    )
    def test_r65_what_stood_for_the_star_stands_in_the_model(self, group, model, name, expected):
        (found,) = find(read(entry(group, model)), name)
        assert (found.provider, found.model) == expected
        assert (found.group, found.id) == (group, one(group, model).id)

    def test_r65_a_star_that_stands_for_nothing_is_no_model(self):
        assert find(read(entry("openai/*", "openai/*")), "openai/") == []
        assert find(read(entry("*", "*")), "nobody/llama") == []
        assert find(read(entry("*", "*")), "groq/") == []

    def test_a_key_is_not_for_any_provider_that_a_caller_names(self):
        with pytest.raises(ConfigError, match="a key needs a provider or an api_base"):
            one("*", "*", api_key="k")
        assert find(read(entry("*", "*", api_key="k", api_base="http://gpu:1/v1")), "a/b")[0].model == "a/b"

    def test_groups_are_asked_again_and_again(self):
        groups = Groups(read(entry("a"), entry("b-*", "openai/*")), {"c": "a"})
        assert [name in groups for name in ("a", "b-1", "c", "d")] == [True, True, True, False]
        groups.find("a").clear()
        assert len(groups.find("a")) == 1

    def test_500_deployments_are_read_in_one_go(self):
        deployments = read(*[entry(f"g{place % 10}", api_key=str(place)) for place in range(500)])
        assert len({deployment.id for deployment in deployments}) == 500
        assert len(find(deployments, "g3")) == 50


def test_a_list_from_a_file_is_the_same_list():
    entries = [entry(rpm=5, tags=["a"], top={"model_info": {"id": "x"}})]
    assert read(*json.loads(json.dumps(entries)))[0].tags == read(*entries)[0].tags == {"a"}
