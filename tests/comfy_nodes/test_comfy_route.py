"""Routing rules, published names, and what is said where a file is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_nodes.logic.errors import PackError
from comfy_nodes.logic.experts import EXPERTS, NAMES, find_arms, find_expert, installed_expert
from comfy_nodes.logic.route import DEFAULT_RULES, read_rules, route
from flowopd_eval.models import FAMILIES
from flowopd_eval.prompts import GENEVAL_COLOURS, GENEVAL_RELATIONS, official_geneval

PLAIN = st.lists(st.sampled_from("a an the cat dog sky old boat sings over hills with light rain".split()), min_size=1)
WORD = st.text("abcdefgh XYZ.'!", min_size=1, max_size=12).filter(str.strip)


def test_the_published_names_are_the_toolkits() -> None:
    members = FAMILIES["flow-opd"].members
    assert {name: f"hub:{expert.repository}" for name, expert in EXPERTS.items()} == {
        name: member.adapter for name, member in members.items() if name not in ("base", "merge")
    }


@given(PLAIN, PLAIN, WORD, st.sampled_from(['"{}"', "“{}”"]))
def test_quoted_text_goes_to_ocr_whatever_stands_around_it(before, after, word, quotes) -> None:
    assert route(" ".join([*before, "two red dogs", quotes.format(word), *after])).expert == "ocr"


@given(PLAIN, PLAIN, st.sampled_from([*GENEVAL_COLOURS, *GENEVAL_RELATIONS, "two", "Three", "7", "24"]))
def test_counts_colours_and_positions_go_to_geneval(before, after, word) -> None:
    assert route(" ".join([*before, word, *after])).expert == "geneval"


@given(PLAIN)
def test_everything_else_goes_to_the_student(words) -> None:
    assert route(" ".join(words)).expert == "student"


@pytest.mark.parametrize(
    "text", ["", "it's the dog's day", '""', '" "', "in 1920 style", "a redwood", "1.5 m", "no. 2.5x"]
)
def test_what_only_looks_like_a_rules_word_is_none(text: str) -> None:
    assert route(text).expert == "student"


def test_official_prompts_that_name_more_than_objects_go_to_geneval() -> None:
    routed = {p.task: set() for p in official_geneval()}
    for prompt in official_geneval():
        routed[prompt.task].add(route(prompt.prompt).expert)
    assert all(routed[task] == {"geneval"} for task in ("counting", "colors", "position", "color_attr"))
    assert "student" in routed["single_object"]


def test_rules_can_be_edited_and_the_first_that_holds_decides() -> None:
    rules = "# mine\n\nwords portrait|close up -> pickscore\n/\\bneon,? sign/, quoted text -> ocr\notherwise -> base"
    assert route("a Close up of two dogs", rules).expert == "pickscore"
    assert route("a portraitist", rules).expert == "base"
    routed = route("a NEON, sign", rules)
    assert routed.expert == "ocr"
    assert "line 4" in routed.reason
    assert "NEON, sign" in routed.reason
    assert route('portrait "x"', rules).expert == "pickscore"
    assert [expert for _, _, expert in read_rules(DEFAULT_RULES)] == ["ocr", "geneval", "student"]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("quoted text ocr", "Line 1 .*CONDITIONS -> EXPERT"),
        ("otherwise -> student\ncolor -> geneval", "condition in line 2 .*'color'.*colour"),
        ("otherwise -> sudent", "expert in line 1 .*'sudent'.*student"),
        ("/(/ -> ocr", "no regular expression"),
        (" -> ocr", "CONDITIONS -> EXPERT"),
        ("# nothing", "no rules"),
        ("quoted text -> ocr", "No rule holds"),
    ],
)
def test_rules_that_cannot_be_read_name_their_line(rules: str, said: str) -> None:
    with pytest.raises(PackError, match=said):
        route("a dog", rules)


FOLDER = EXPERTS["geneval"].folder


@pytest.mark.parametrize(
    "file",
    [
        f"{FOLDER}/adapter_model.safetensors",
        f"flow-opd\\{FOLDER}\\adapter_model.safetensors",
        f"{FOLDER}/pytorch_lora_weights.safetensors",
        f"sd35/{FOLDER.lower()}.safetensors",
    ],
)
def test_an_expert_is_found_by_its_repositorys_name(file: str) -> None:
    others = ["Flow-OPD/adapter_model.safetensors", f"not-{FOLDER}.safetensors", f"{FOLDER}/optimizer.safetensors"]
    assert installed_expert("geneval", [*others, file]) == file
    assert find_expert("geneval", [*others, file], "/loras") == file
    assert installed_expert("geneval", others) is None


def test_a_folder_of_all_experts_is_not_taken_for_the_student() -> None:
    assert installed_expert("student", [f"Flow-OPD/{FOLDER}/adapter_model.safetensors"]) is None


def test_a_missing_expert_is_named_with_its_files_address_and_place() -> None:
    with pytest.raises(PackError) as error:
        find_expert("ocr", [], "/models/loras")
    for part in ("adapter_model.safetensors", "adapter_config.json", "huggingface.co/jieliu/SD3.5M-FlowGRPO-Text"):
        assert part in str(error.value)
    assert "/models/loras/SD3.5M-FlowGRPO-Text/" in str(error.value)


def test_all_missing_arms_are_named_at_once_and_files_stand_beside_names() -> None:
    with pytest.raises(PackError) as error:
        find_arms("base\nocr\ndeqa", [], "/loras")
    assert "SD3.5M-FlowGRPO-Text/" in str(error.value)
    assert "SD3.5M-FlowGRPO-Deqa-Mix/" in str(error.value)
    arms = find_arms("base\n# no\n\nmine/x.safetensors\nstudent", ["mine\\x.safetensors", "Flow-OPD.safetensors"], "/l")
    assert [(arm.label, arm.file) for arm in arms] == [
        ("base", None),
        ("mine/x.safetensors", "mine\\x.safetensors"),
        ("student", "Flow-OPD.safetensors"),
    ]


@pytest.mark.parametrize(("text", "said"), [("", "No model"), ("base\nbase", "twice"), ("bse", "'bse'.*student")])
def test_arms_that_are_no_comparison_are_refused(text: str, said: str) -> None:
    with pytest.raises(PackError, match=said):
        find_arms(text, [], "/loras")


def test_an_expert_by_name_is_no_file() -> None:
    assert find_expert("base", [], "/loras") is None
    with pytest.raises(PackError, match=", ".join(NAMES)):
        find_expert("x.safetensors", ["x.safetensors"], "/loras")
