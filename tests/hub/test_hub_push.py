"""Publishing an adapter through the real client: what arrives, what does not, and what happens when it goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from loopback_hub import Stored
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file

from flowopd_eval.adapters import Adapter, Factors, fresh_adapter, read_adapter, write_adapter
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.hub.licences import licence_files, licence_texts
from flowopd_eval.hub.repository import Repository, refuse_secrets, without_addresses, without_paths, without_places
from flowopd_eval.hub.results import _check_backbone
from flowopd_eval.hub.subject import AGAIN, MERGED, STARTED, Upstream, read_subject, skeleton
from flowopd_eval.hub.there import There, explained
from flowopd_eval.models import FAMILIES, fetch_base, folder_sha256

WEIGHTS = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"]
OTHERS = ["flow_opd.json", "recipe.json", "provenance.json", "LICENSE", "README.md", "pushed.json"]
RESULTS = ["metrics.json", "samples.jsonl", "samples.png"]
SD35 = "stabilityai/stable-diffusion-3.5-medium"


def of(hub, name, kind="models") -> Stored:
    return hub.repositories[f"{kind}/{name}"]


# ------------------------------------------------------------------------------------------------------- what arrives


def test_a_push_creates_a_private_repository_of_what_it_has_shown(machine, hub, trained, finished, adapter_sha256):
    answer = machine("push", trained / "adapter", "me/first", "--run", finished)
    assert answer.code == 0, answer.err
    repo = of(hub, "me/first")
    assert repo.private
    assert len(repo.revisions) == 2  # the Hub's own first commit, and one of ours
    mine = [name for name in repo.files if name != ".gitattributes"]
    pictures = [name for name in mine if name.startswith("samples/")]
    assert len(pictures) == 24
    assert sorted(mine) == sorted(WEIGHTS + OTHERS + RESULTS + pictures)
    shown, _, after = answer.out.partition("in all, 36 files")
    assert all(name in shown for name in mine)
    assert f"/me/first/tree/{repo.head}" in after
    puts = [line for line in hub.log if line.startswith("PUT")]
    assert len(puts) == len({repo.files[n] for n in mine if n.endswith((".safetensors", ".png"))})
    assert read_from(repo, machine.folder / "read").sha256 == adapter_sha256


def read_from(repo, folder) -> Adapter:
    folder.mkdir()
    for name in WEIGHTS:
        (folder / name).write_bytes(repo.files[name])
    peft, diffusers = read_adapter(folder), read_adapter(folder / WEIGHTS[0])
    assert peft.sha256 == diffusers.sha256
    return peft


def test_neither_token_nor_strangers_nor_home_leave_the_machine(machine, hub, pushed):
    token = machine.token
    assert token not in "".join(hub.log)
    for content in (*of(hub, pushed).files.values(), *hub.bodies, *hub.objects.values()):
        for secret in (token, "opensesame", "/home/someone", "runs/private", str(machine.folder)):
            assert secret.encode() not in content
    recipe = json.loads(of(hub, pushed).files["recipe.json"])
    assert (recipe["cache"], recipe["tasks"][0]["prompts"]) == ("embeddings", "mine.jsonl")
    assert (recipe["out"], recipe["log"]) == ("first", "log")


def test_one_model_has_one_name(hub, pushed):
    (summary,) = json.loads(of(hub, pushed).files["metrics.json"])["metrics"].values()
    assert summary["model"] == summary["generator"]["model"] == f"tiny:base+{pushed}"


def test_the_same_again_is_no_commit_and_sends_no_file(machine, hub, trained, finished, pushed, tmp_path):
    head, before = of(hub, pushed).head, len(hub.log)
    answer = machine("push", trained / "adapter", pushed, "--run", finished)
    assert answer.code == 0, answer.err
    assert "No file has changed" in answer.out
    assert of(hub, pushed).head == head
    before = len(hub.log)
    look = tmp_path / "look"
    answer = machine("push", trained / "adapter", pushed, "--run", finished, "--dry-run", "--save", look)
    assert answer.code == 0, answer.err
    assert f"the card is {look / 'README.md'}" in answer.out
    saved = {path.relative_to(look).as_posix(): path.read_bytes() for path in look.rglob("*") if path.is_file()}
    there = {name: content for name, content in of(hub, pushed).files.items() if name != ".gitattributes"}
    assert saved == there
    again = machine("push", trained / "adapter", pushed, "--run", finished, "--save", look)
    assert again.code == 2
    assert "is not empty" in again.err
    assert not [line for line in hub.log[before:] if line.startswith("PUT") or "/commit/" in line]


def test_what_a_push_wrote_and_the_next_does_not_is_removed_as_shown_and_nothing_else(machine, hub, trained, pushed):
    repo = of(hub, pushed)
    stale = [name for name in repo.files if name.startswith("samples")] + ["metrics.json"]
    repo.files.update({"mine.txt": b"by hand", "samples/mine.png": b"by hand"})
    head = repo.head
    dry = machine("push", trained / "adapter", pushed, "--dry-run")
    assert dry.code == 0, dry.err
    assert repo.head == head
    answer = machine("push", trained / "adapter", pushed)
    assert answer.code == 0, answer.err
    for shown in (dry.out, answer.out):
        gone = [line.split()[-1] for line in shown.splitlines() if line.split()[:1] == ["removed"]]
        assert sorted(gone) == sorted(stale)
    assert sorted(repo.files) == sorted([".gitattributes", "mine.txt", "samples/mine.png", *WEIGHTS, *OTHERS])
    for said in (dry.err, answer.err):
        assert "no --run: the card loses its scores of shapes_quality; give --run RUN to keep" in " ".join(said.split())
    assert b"None were published" in repo.files["README.md"]
    assert b"metrics" not in repo.files["README.md"]
    # the same weights keep the settings they were scored with
    assert json.loads(repo.files["flow_opd.json"])["record"]["steps"] == 2
    assert "Drawn with 2 steps, guidance 1" in answer.out
    assert "same pytorch_lora_weights.safetensors" in " ".join(answer.out.split())
    assert "changed README.md" in " ".join(answer.out.split())
    machine.token = ""
    unseen = machine("push", trained / "adapter", pushed, "--dry-run")
    assert unseen.code == 0, unseen.err
    assert f"What lies at {pushed} is not known, nor what would be removed there" in " ".join(unseen.err.split())


def test_a_card_that_was_edited_is_not_overwritten(machine, hub, trained, pushed):
    repo = of(hub, pushed)
    written = repo.files["README.md"]
    repo.files["README.md"] = written + b"Thanks to all."
    repo.head, repo.revisions["e" * 40] = "e" * 40, repo.files
    for words in ([], ["--dry-run"]):
        answer = machine("push", trained / "adapter", pushed, *words)
        assert answer.code == 2
        assert f"README.md of {pushed} was written or edited by hand" in answer.err
        assert "delete README.md there" in answer.err
    assert repo.head == "e" * 40
    del repo.files["README.md"]
    repo.head, repo.revisions["f" * 40] = "f" * 40, repo.files
    assert machine("push", trained / "adapter", pushed).code == 0
    assert b"None were published" in repo.files["README.md"]


def test_a_card_of_somebodys_own_is_not_overwritten_by_the_first_push(machine, hub, trained):
    hub.repositories["models/me/own"] = Stored({"9" * 40: {"README.md": b"---\nlicense: mit\n---\n"}}, "9" * 40, True)
    answer = machine("push", trained / "adapter", "me/own")
    assert (answer.code, "was written or edited by hand" in answer.err) == (2, True), answer.err
    assert hub.writes() == []


def test_a_damaged_list_of_an_earlier_push_is_told(machine, hub, trained):
    files = {"pushed.json": b'{"files": 1}'}
    hub.repositories["models/me/list"] = Stored({"8" * 40: files}, "8" * 40, True)
    answer = machine("push", trained / "adapter", "me/list")
    assert (answer.code, "pushed.json of me/list is damaged" in answer.err) == (2, True), answer.err
    assert hub.writes() == []


def test_what_is_pushed_again_keeps_its_sampling_record(machine, hub, gentle, pushed, tmp_path):
    """The adapter was scored with 2 steps and guidance 1; the family's record has 20 and 4.5."""
    record = json.loads(of(hub, pushed).files["flow_opd.json"])
    assert (record["record"]["steps"], record["record"]["guidance"]) == (2, 1.0)
    write_adapter(gentle, tmp_path)
    (tmp_path / "flow_opd.json").write_text(json.dumps(record))
    head = of(hub, pushed).head
    for source, origin in (
        (f"hub:{pushed}", f"flow_opd.json of hub:{pushed}@{head}"),
        (tmp_path, "flow_opd.json beside the adapter"),
        (tmp_path / WEIGHTS[1], "flow_opd.json beside the adapter"),
    ):
        answer = machine("push", source, "me/twice")
        assert answer.code == 0, answer.err
        assert json.loads(of(hub, "me/twice").files["flow_opd.json"]) == record
        assert f"Drawn with 2 steps, guidance 1, shift 3, 64x64, text length 0, float32: from {origin}." in answer.out


@pytest.mark.parametrize(
    ("files", "guidance", "origin"),
    [
        ({}, 4.5, "usual, as no flow_opd.json lies with the adapter, and it has no recipe"),
        ({"recipe.json": {"stage": "nft", "guidance": 2.5}}, 2.5, "the recipe's guidance"),
        ({"flow_opd.json": {"record": {"steps": 3}, "experts": []}}, 4.5, "usual"),  # of a saved pipeline
    ],
)
def test_where_the_record_was_found_is_said(gentle, tmp_path, files, guidance, origin):
    write_adapter(gentle, tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    subject = read_subject(str(tmp_path))
    assert (subject.record.guidance, origin in subject.record_from) == (guidance, True)


def test_a_dry_run_shows_everything_and_sends_nothing(machine, hub, trained, finished):
    machine.token = ""
    answer = machine("push", trained / "adapter", "me/dry", "--run", finished, "--dry-run")
    assert answer.code == 0, answer.err
    assert "README.md" in answer.out
    assert "nothing was sent" in answer.out
    assert hub.writes() == []


@pytest.fixture
def offline(machine):
    place = "import os, huggingface_hub.constants as c; c.HF_HUB_OFFLINE = bool({0!r}); os.environ['{1}'] = {0!r}"
    yield lambda variable: machine.python(place.format("1", variable))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        machine.python(place.format("", variable))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_is_named(machine, hub, trained, offline, variable):
    offline(variable)
    answer = machine("push", trained / "adapter", "me/off")
    assert answer.code == 2
    assert f"Offline mode is on, and nothing was sent: unset {variable}" in answer.err
    assert "same command again" not in answer.err
    dry = machine("push", trained / "adapter", "me/off", "--dry-run")
    assert dry.code == 0, dry.err
    assert "What lies at me/off is not known" in dry.err
    assert hub.log == []


def test_only_public_makes_public(machine, hub, trained):
    adapter = trained / "adapter"
    assert machine("push", adapter, "me/open").code == 0
    assert of(hub, "me/open").private
    head = of(hub, "me/open").head
    dry = machine("push", adapter, "me/open", "--public", "--dry-run")
    assert "private until now, public from this push on" in dry.out
    assert of(hub, "me/open").private
    opened = machine("push", adapter, "me/open", "--public")
    assert opened.code == 0, opened.err
    assert not of(hub, "me/open").private
    assert "No file has changed" in opened.out
    assert "me/open was private, and is public now" in opened.out
    for words in ([], ["--dry-run"]):
        answer = machine("push", adapter, "me/open", *words)
        assert answer.code == 2
        assert "me/open is public" in answer.err
    assert of(hub, "me/open").head == head
    new = machine("push", adapter, "me/new", "--public")
    assert (new.code, "was private" in new.out) == (0, False)
    assert not of(hub, "me/new").private


# --------------------------------------------------------------------------------------------------- when it goes wrong


def test_a_connection_that_is_cut_is_taken_up_again_by_the_client(machine, hub, trained):
    hub.cuts = 1
    answer = machine("push", trained / "adapter", "me/cut")
    assert answer.code == 0, answer.err
    assert len([line for line in hub.log if line.startswith("PUT")]) == 3


def test_a_broken_upload_commits_nothing_and_the_next_sends_the_rest(machine, hub, trained, finished):
    words = ("push", trained / "adapter", "me/broken", "--run", finished)
    hub.spared, hub.cuts = 5, 10_000
    answer = machine(*words)
    assert answer.code == 1
    assert "give the same command again" in answer.err
    assert "Traceback" not in answer.err
    assert list(of(hub, "me/broken").files) == [".gitattributes"]
    arrived, before = set(hub.objects), len(hub.log)
    assert len(arrived) == 5
    hub.cuts = 0
    assert machine(*words).code == 0
    sent = {line.rsplit("/", 1)[-1] for line in hub.log[before:] if line.startswith("PUT")}
    assert sent == set(hub.objects) - arrived
    assert len(sent) > 5
    assert "README.md" in of(hub, "me/broken").files


@pytest.mark.parametrize(
    ("token", "name", "code", "why"),
    [
        ("", "me/a", 2, "There is no Hub token here"),
        ("hf_wrong", "me/a", 2, "The token from HF_TOKEN is not known to the Hub: correct HF_TOKEN, or unset"),
        (None, "others/a", 2, "may not write to others/a"),
        (None, "nobody/a", 2, "The Hub has no nobody/a"),
        (None, "a", 2, "Expected a repository as OWNER/NAME, but got 'a'"),
        (None, "me/../a", 2, "Expected a repository as OWNER/NAME"),
        (None, "me/a--b", 2, "Expected a repository as OWNER/NAME, but got 'me/a--b': Cannot have -- or .."),
        (None, "me/a.git", 2, "Expected a repository as OWNER/NAME, but got 'me/a.git'"),
        (None, "me/a/b", 2, "Expected a repository as OWNER/NAME, but got 'me/a/b'"),
    ],
)
def test_what_the_hub_refuses_is_said_with_its_remedy(machine, hub, trained, token, name, code, why):
    machine.token = machine.token if token is None else token
    answer = machine("push", trained / "adapter", name)
    assert (answer.code, why in answer.err) == (code, True), answer.err
    assert "Traceback" not in answer.err
    assert not token or token not in answer.err
    assert not hub.repositories


@pytest.mark.parametrize(
    ("role", "name", "why"),
    [
        ("read", "me/a", "token from HF_TOKEN may only read"),
        ("write", "others/a", "not write to others/a: it is of me, us"),
    ],
)
def test_a_token_that_cannot_write_is_told_before_the_list(machine, hub, trained, role, name, why):
    hub.role = role
    answer = machine("push", trained / "adapter", name)
    assert (answer.code, why in answer.err, answer.out) == (2, True, ""), answer.err
    assert hub.writes() == []


def test_other_weights_at_the_same_place_get_no_record_of_the_earlier_ones(gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    record = {"steps": 4, "guidance": 1.0, "shift": 3.0, "width": 64, "height": 64, "text_length": 0}
    settings = {"adapter_of": "tiny:base", "record": record}
    same = There("a" * 40, settings=settings, adapter_sha256=gentle.sha256)
    assert read_subject(str(tmp_path), same).record.steps == 4
    (tmp_path / "merge.json").write_text(json.dumps({"recipe": {"teachers": {}}}))
    other = read_subject(str(tmp_path), There("a" * 40, settings=settings, adapter_sha256="0"))
    assert other.record.steps == 20
    assert "its recipe, of stage 'merge', names no guidance" in other.record_from


def test_a_hub_that_is_not_there_has_been_sent_nothing():
    why = r"^The Hub at http.* could not be reached \(HTTPError\). Nothing was sent"
    with pytest.raises(WorkError, match=why), explained("me/a"):
        raise HTTPError("no")


def test_two_files_that_are_two_adapters_are_refused(gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    half = {key: value.to(torch.bfloat16) for key, value in load_file(tmp_path / WEIGHTS[0]).items()}
    save_file(half, tmp_path / WEIGHTS[0])
    read_subject(str(tmp_path))  # rounded, it is the same
    key = next(key for key in half if "lora_B" in key)
    half[key][0, 0] += 1
    save_file(half, tmp_path / WEIGHTS[0])
    with pytest.raises(RequestError, match=f"{WEIGHTS[1]} and {WEIGHTS[0]} differ: the change of .* by up to"):
        read_subject(str(tmp_path))
    read_subject(str(tmp_path / WEIGHTS[1]))  # named, it is the one that is meant


def test_the_file_that_a_merge_leaves_is_called_by_its_name(gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    (tmp_path / "merge.json").write_text(json.dumps({"recipe": {"teachers": {"gone": 1.0}}}))
    with pytest.raises(RequestError, match=r"merge.json names 'gone' \(merged\).* or correct .*merge.json") as refused:
        read_subject(str(tmp_path))
    assert "recipe.json" not in str(refused.value)


def test_a_judges_address_stays_at_home():
    scorer = {"judge": "a-model", "url": "http://10.0.0.7:8000/v1", "parts": [{"url": "x", "n": 1}]}
    assert without_addresses({"scorer": scorer}) == {"scorer": {"judge": "a-model", "parts": [{"n": 1}]}}


def test_somebody_elses_commit_in_between_is_not_overwritten(machine, hub, trained):
    hub.busy = True
    answer = machine("push", trained / "adapter", "me/busy")
    assert answer.code == 1
    assert "changed by somebody else" in answer.err
    assert list(of(hub, "me/busy").files) == [".gitattributes", "theirs.txt"]


# ---------------------------------------------------------------------------------------------------- what is refused


def spoilt(gentle, kind) -> Adapter:
    factors = dict(gentle.factors)
    name = next(iter(factors))
    a, b = factors[name]
    if kind == "partial":
        del factors[name]
    elif kind == "foreign":
        factors = {f"blocks.{n}": f for n, f in factors.items()}
    else:
        factors[name] = Factors(a, {"nan": b * float("nan"), "zero": b * 0, "shape": b[:-1]}[kind])
    return Adapter(factors)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("partial", "1 modules left out that it should cover"),
        ("foreign", "match no linear layer"),
        ("nan", "NaN or infinity in 1 of"),
        ("zero", "lora_A or lora_B is all zero in 1 of"),
        ("shape", "another shape"),
    ],
)
def test_an_adapter_that_fails_its_checks_is_refused_and_nothing_sent(machine, hub, gentle, tmp_path, kind, why):
    write_adapter(spoilt(gentle, kind), tmp_path)
    # without a config, the other blocks say what is left out
    source = tmp_path if kind in ("nan", "zero") else tmp_path / WEIGHTS[0]
    answer = machine("push", source, "me/spoilt")
    assert (answer.code, why in answer.err) == (2, True), answer.err
    assert hub.writes() == []


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("# no metadata", "states no licence"),
        ("---\nlicense: unknown\n---\n", "states no licence"),
        ("---\nlicense: other\n---\n", "states no licence"),
        ("---\nlicense: other\nlicense_name: a-licence\n---\n", "is under 'a-licence', which is not known here"),
        ("---\nlicense: cc-by-nc-nd-4.0\n---\n", "is under 'cc-by-nc-nd-4.0', which lets nothing that was changed"),
        ("---\nlicense: [mit, cc-by-nd-4.0]\n---\n", "is under 'cc-by-nd-4.0', which lets nothing that was changed"),
        ("---\nlicense: other\nlicense_name: stabilityai-ai-community\n---\n", "which is the licence of SD3.5's works"),
    ],
)
def test_an_upstream_adapter_needs_a_licence_that_lets_it_be_passed_on(machine, hub, gentle, tmp_path, card, says):
    name = of_somebody(hub, gentle, tmp_path, card)
    (tmp_path / "README.md").unlink()
    recipe = {"stage": "distill", "teachers": {"ocr": {"source": f"hub:{name}"}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for source in (f"hub:{name}", tmp_path):
        answer = machine("push", source, "me/again")
        assert (answer.code, says in answer.err) == (2, True), answer.err
        assert name in answer.err or "SD3.5" in says
        assert "Nothing was sent" in answer.err
        assert hub.writes() == []


def of_somebody(hub, adapter, folder, card, **more) -> str:
    """An adapter with a card, in ``folder`` and on the Hub; its name there, another each time as the client caches."""
    write_adapter(adapter, folder)
    (folder / "README.md").write_text(card)
    for name, text in more.items():
        (folder / name).write_text(text)
    name = f"they/{hashlib.sha1(card.encode()).hexdigest()}"
    hub.repositories[f"models/{name}"] = Stored(
        {"a" * 40: {p.name: p.read_bytes() for p in folder.iterdir()}}, "a" * 40
    )
    return name


@pytest.mark.parametrize("licence", ["mit", "cc-by-nc-4.0", "openrail++"])
@pytest.mark.parametrize("local", [False, True])
def test_what_somebody_published_keeps_its_licence_and_its_texts(machine, hub, gentle, tmp_path, licence, local):
    texts = {"LICENSE": f"their {licence}", "NOTICE": "made by them"}
    folder = tmp_path / "theirs"
    folder.mkdir()
    name = of_somebody(hub, gentle, folder, f"---\nlicense: {licence}\n---\n# {local}\n", **texts)
    answer = machine("push", folder if local else f"hub:{name}", "me/kept", "--dry-run")
    assert f"is under {licence}: the card says so" in answer.out
    answer = machine("push", folder if local else f"hub:{name}", "me/kept")
    assert answer.code == 0, answer.err
    files = of(hub, "me/kept").files
    assert ModelCard(files["README.md"].decode()).data.license == licence
    label = "theirs" if local else name.replace("/", ".")
    assert {one: files[f"upstream/{label}/{one}"].decode() for one in texts} == texts
    assert b"Apache License" in files["LICENSE"]  # of the miniature, which the adapter changes
    assert f"`upstream/{label}/LICENSE`" in files["README.md"].decode()
    # and again, from where it now lies
    again = machine("push", "hub:me/kept", f"me/kept-{licence.strip('+')}-{local}".lower())
    assert again.code == 0, again.err
    copy = of(hub, f"me/kept-{licence.strip('+')}-{local}".lower()).files
    assert ModelCard(copy["README.md"].decode()).data.license == licence
    assert copy[f"upstream/{label}/LICENSE"] == files[f"upstream/{label}/LICENSE"]
    assert not [one for one in copy if "me.kept" in one]


@pytest.mark.parametrize(
    ("card", "why"),
    [
        ("license: cc-by-nc-nd-4.0", "README.md is under 'cc-by-nc-nd-4.0', which lets nothing"),
        ("license: other\nlicense_name: mine-alone", "README.md is under 'mine-alone', which is not known here"),
        ("license: [", "has no metadata that can be read"),
    ],
)
def test_a_card_beside_a_local_adapter_is_heeded(gentle, tmp_path, card, why):
    write_adapter(gentle, tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(RequestError, match=why):
        read_subject(str(tmp_path))
    # as what another one started from, too
    write_adapter(gentle, tmp_path / "next" / "adapter")
    (tmp_path / "next" / "recipe.json").write_text(json.dumps({"stage": "nft", "start": str(tmp_path)}))
    with pytest.raises(RequestError, match=why):
        read_subject(str(tmp_path / "next" / "adapter"))


def test_a_teachers_licence_binds_its_student_only_where_it_says_so(machine, hub, gentle, tmp_path):
    for licence, stays in (("mit", "apache-2.0"), ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0")):
        folder = tmp_path / licence
        folder.mkdir()
        name = of_somebody(hub, gentle, folder, f"---\nlicense: {licence}\n---\n# a teacher\n")
        (folder / "README.md").unlink()
        recipe = {"stage": "distill", "teachers": {"ocr": {"source": f"hub:{name}"}}}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        assert machine("push", folder, "me/student").code == 0
        card = of(hub, "me/student").files["README.md"].decode()
        assert ModelCard(card).data.license == stays
        assert f"hub:{name}" in card.replace("\\", "")


@pytest.mark.parametrize(
    ("role", "licence", "carried"),
    [(AGAIN, "mit", True), (MERGED, "mit", True), (STARTED, "mit", True), (f"teacher, {STARTED}", "mit", True),
     ("teacher", "mit", False), ("anchor", "mit", False), ("teacher", "mit-and-cc-by-nc-4.0", True)],
)  # fmt: skip
def test_whose_values_are_in_it_is_carried_and_whose_licence_says_so(role, licence, carried):
    assert Upstream("hub:somebody/adapter", role, licence).carried == carried


def test_a_link_by_a_licences_name_leads_nowhere(tmp_path):
    (tmp_path / "elsewhere").write_text("private")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "NOTICE").symlink_to(tmp_path / "elsewhere")
    assert licence_texts("adapter", folder) == {"upstream/adapter/LICENSE.txt": folder / "LICENSE.txt"}


def test_upstream_is_followed_through_adapters_of_ones_own(gentle, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("flowopd_eval.hub.subject.licence_of_repository", lambda source: asked.append(source) or "mit")
    expert, student = tmp_path / "expert" / "adapter", tmp_path / "student" / "adapter"
    for folder, recipe in (
        (expert, {"stage": "nft", "start": "hub:they/start"}),
        (student, {"stage": "distill", "teachers": {"a": {"source": str(expert)}, "b": {"source": "flow-opd:merge"}}}),
    ):
        write_adapter(gentle, folder)
        (folder.parent / "recipe.json").write_text(json.dumps(recipe))
    subject = read_subject(str(student))
    assert {one.source: one.role for one in subject.upstream}["hub:they/start"] == "started from"
    assert "hub:jieliu/SD3.5M-FlowGRPO-Text" in asked  # each part of a merge
    assert len(asked) == 5


def test_a_merge_says_what_it_was_made_of(command, transformer, tmp_path):
    for seed in (1, 2):
        write_adapter(random_adapter(transformer, seed), tmp_path / str(seed))
    parts = [f"{tmp_path / str(seed)}=0.5" for seed in (1, 2)]
    code, _, errors = command("merge", *parts, "--out", tmp_path / "merged")
    assert code == 0, errors
    subject = read_subject(str(tmp_path / "merged"))
    assert subject.merged
    assert subject.recipe["teachers"] == {"1": 0.5, "2": 0.5}  # of their paths, the names
    assert (subject.base, subject.upstream) == ("tiny:base", ())


def test_a_run_of_another_adapter_is_refused(machine, hub, transformer, finished, tmp_path):
    write_adapter(random_adapter(transformer, 1), tmp_path)
    answer = machine("push", tmp_path, "me/other", "--run", finished)
    assert answer.code == 2
    assert "holds no pictures of this adapter" in answer.err
    assert hub.writes() == []


def edited(run, tmp_path, **changes):
    """A copy of a run whose request says something else."""
    out = tmp_path / "edited"
    shutil.copytree(run, out)
    recorded = json.loads((out / "run.json").read_text())
    ((_, entry),) = recorded["runs"].items()
    for name, value in changes.items():
        target = entry["request"] if name in entry["request"] else entry["request"]["generator"]
        target[name] = value
    (out / "run.json").write_text(json.dumps(recorded))
    return out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base_sha256": "0" * 64}, "was drawn on another backbone than tiny:base"),
        ({"partial": "--limit 3"}, "--limit 3. Evaluate all of --bench quality into another --out, and give that."),
        ({"key": "geneval"}, "never comparable"),
    ],
)
def test_scores_that_are_not_this_cards_are_refused(machine, hub, trained, finished, tmp_path, changes, why):
    answer = machine("push", trained / "adapter", "me/claims", "--run", edited(finished, tmp_path, **changes))
    assert (answer.code, why in answer.err) == (2, True), answer.err
    assert hub.writes() == []


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    """An adapter of rank 1 for every block of SD3.5-Medium."""
    folder = tmp_path_factory.mktemp("sd35")
    fresh = fresh_adapter(skeleton(FAMILIES["flow-opd"]), ["attn.to_q", "attn.to_v"], 1)
    write_adapter(Adapter({name: Factors(f.A, f.B + 0.01) for name, f in fresh.factors.items()}), folder)
    return folder


# The lines by which it is known, as one of its copies has them.
AGREEMENT = """STABILITY AI COMMUNITY LICENSE AGREEMENT
Last Updated: July 5, 2024

II. RESEARCH & NON-COMMERCIAL USE LICENSE
III. COMMERCIAL USE LICENSE
Subject to the terms of this Agreement (including the remainder of this Section
III), Stability AI grants You ...
IV. GENERAL TERMS
a. **Distribution & Attribution.** ... (iii) prominently display "Powered by Stability AI" ...
e. Limitation Of Liability. ...
g. Governing Law. ...
V. DEFINITION(S)
"Trade Control Laws" means any applicable ...
"""


def test_sd35_takes_its_licence_along_from_its_own_repository(machine, hub, sd35):
    refused = machine("push", sd35, "me/sd")
    assert refused.code == 2
    assert f"https://huggingface.co/{SD35}/blob/main/LICENSE.md" in refused.err
    assert f"as {sd35 / 'LICENSE.md'}" in refused.err
    assert hub.writes() == []
    hub.repositories[f"models/{SD35}"] = Stored({"c" * 40: {"LICENSE.md": b"the agreement"}}, "c" * 40)
    answer = machine("push", sd35, "me/sd")
    assert answer.code == 0, answer.err
    files = of(hub, "me/sd").files
    assert files["LICENSE.md"] == b"the agreement"
    notice = files["NOTICE"].decode()
    asked = (
        "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd."
    )
    assert notice.startswith(asked)
    assert "rank 1 in 48 linear layers" in notice
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == SD35
    assert "LICENSE" not in files


def test_a_licence_beside_the_adapter_serves_without_the_gated_repository(machine, hub, sd35, tmp_path):
    shutil.copytree(sd35, tmp_path / "a")
    (tmp_path / "a" / "LICENSE.md").write_text(AGREEMENT)
    assert machine("push", tmp_path / "a", "me/sd2").code == 0
    assert of(hub, "me/sd2").files["LICENSE.md"].decode() == AGREEMENT


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("MIT License", "Stability AI Community License Agreement"),
        (AGREEMENT.replace("COMMUNITY", "NON-COMMERCIAL"), "Stability AI Community License Agreement"),
        (AGREEMENT.partition("g. Governing")[0], "Governing Law"),
        ("Stability AI Community License Agreement: see its web page.", "Research & Non-Commercial Use License"),
    ],
)
def test_another_text_by_the_licences_name_is_refused(tmp_path, text, lacking):
    (tmp_path / "LICENSE.md").write_text(text)
    with pytest.raises(
        RequestError, match="is not the Stability AI Community License Agreement, or not all"
    ) as refused:
        licence_files("flow-opd", "not at all", tmp_path)
    assert f"it lacks {lacking!r}" in str(refused.value)
    assert str(tmp_path / "LICENSE.md") in str(refused.value)


def test_the_miniatures_scores_stand_on_no_other_card(machine, hub, sd35, finished, tmp_path):
    sha256 = read_adapter(sd35).sha256
    run = edited(finished, tmp_path, adapter_sha256=sha256)
    answer = machine("push", sd35, "me/sd", "--run", run)
    assert answer.code == 2
    assert "the miniature's scores are never comparable with a real model's" in answer.err
    assert hub.writes() == []


def test_a_token_in_a_file_stops_everything(machine, hub, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe | {"note": "hf_" + "x" * 34}))
    answer = machine("push", tmp_path / "run" / "adapter", "me/leak")
    assert answer.code == 2
    assert "recipe.json holds a Hub token" in answer.err
    assert "xxxx" not in answer.err + answer.out
    assert hub.writes() == []


def test_a_training_run_is_told_where_its_adapter_lies(machine, trained):
    answer = machine("push", trained, "me/a")
    assert answer.code == 2
    assert f"push its adapter, {trained / 'adapter'}" in answer.err


def test_a_backbone_is_nothing_to_publish():
    with pytest.raises(RequestError, match="backbone without an adapter"):
        read_subject("tiny:base")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/a/b.txt", "b.txt"),
        ("~/x/y.json", "y.json"),
        (r"C:\Users\a\b.txt", "b.txt"),
        ("python /opt/judge/run.py --to=/srv/x/out", "python run.py --to=out"),
        ("hub:owner/name@main", "hub:owner/name@main"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("runs/train/x", "x"),
        ("runs/private/mine/", "mine"),
        ("../x", "x"),
        (r"runs\private\x", "x"),
        ("lists/mine.jsonl", "mine.jsonl"),
        ("python judge/run.py --to=out/mine/x", "python run.py --to=x"),
        ("judge/mine.py:score", "mine.py:score"),
        ("owner/name", "owner/name"),
        ("hub:owner/name/x.json", "hub:owner/name/x.json"),
        ("a photo and/or b", "a photo and/or b"),
    ],
)
def test_of_a_path_its_name_is_left(text, left):
    assert without_paths({text: [text]}) == {left: [left]}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("runs/mine", "mine"),
        ("mine/", "mine/"),
        ("/home/a/b", "b"),
        ("hub:owner/name@main", "hub:owner/name@main"),
        ("read and/or write", "read and/or write"),
    ],
)
def test_of_a_path_in_a_recipe_its_name_is_left(text, left):
    assert without_places({"start": text}) == {"start": left}


def test_paths_that_end_alike_are_numbered_and_none_is_lost():
    found = without_paths({"runs/a/x": 1, "b": 2, "/home/c/x": 3})
    assert found == {"x (1)": 1, "b": 2, "x (2)": 3}


# ----------------------------------------------------------------------------------------- what is refused, in parts


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"x" * 100 + b"hf_" + b"y" * 34, "a Hub token"),
        (str(Path.home()).encode() + b"/work", "the path of your home folder"),
        (b"xx mine xx", "this machine's Hub token"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 24, 40])  # of 40: a token lies on a border
def test_secrets_are_found_in_bytes_and_in_files_on_the_disk(tmp_path, monkeypatch, content, what, chunk):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "mine")
    monkeypatch.setattr("flowopd_eval.hub.repository._CHUNK", chunk)
    file = tmp_path / "weights"
    file.write_bytes(content)
    refuse_secrets(Repository("model", {"README.md": b"harmless"}))
    for held in (content, file):
        with pytest.raises(RequestError, match=f"^weights holds {what}; nothing was sent"):
            refuse_secrets(Repository("model", {"README.md": b"harmless", "weights": held}))


def test_an_upstream_adapter_that_is_not_here_is_refused(gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    recipe = {"stage": "distill", "teachers": {"a": {"source": str(tmp_path / "gone")}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RequestError, match=r"names '.*gone' \(teacher\), which is not here"):
        read_subject(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "they/model"}),
        ("recipe.json", {"base": "they/model"}),
        ("flow_opd.json", {"adapter_of": "they/model"}),
    ],
)
def test_a_backbone_that_no_card_can_name_is_refused(gentle, tmp_path, name, content):
    write_adapter(gentle, tmp_path)
    there = json.loads((tmp_path / name).read_text()) if (tmp_path / name).is_file() else {}
    (tmp_path / name).write_text(json.dumps(there | content))
    with pytest.raises(RequestError, match="was made for 'they/model'; a card can name flow-opd, tiny") as refused:
        read_subject(str(tmp_path))
    assert name in str(refused.value) or "recipe" in str(refused.value)


OWN = folder_sha256(fetch_base("builtin:tiny"))


@pytest.mark.parametrize(
    ("family", "drawn", "refused"),
    [
        ("tiny", [("tiny:base+a", OWN)], False),
        ("tiny", [("tiny:base+a", OWN), ("tiny:base+b", "0" * 64)], True),
        ("tiny", [("tiny:base+a", None)], True),
        ("flow-opd", [("flow-opd:base+a", "1" * 64), ("hub:me/x@main", "1" * 64)], False),
        ("flow-opd", [("flow-opd:base+a", "1" * 64), ("flow-opd:base+a", "2" * 64)], True),
        ("flow-opd", [("mine+a", "1" * 64)], True),
        ("flow-opd", [("hub:they/model+a", "1" * 64)], True),
    ],
)
def test_scores_of_another_backbone_or_of_several_are_refused(family, drawn, refused):
    entries = [SimpleNamespace(summary={"model": m, "generator": {"base_sha256": sha256}}) for m, sha256 in drawn]
    subject = SimpleNamespace(base=f"{family}:base", family=FAMILIES[family])
    with pytest.raises(RequestError, match="on another backbone than") if refused else nullcontext():
        _check_backbone(entries, subject)
