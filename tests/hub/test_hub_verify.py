"""Does a card keep its word: an honest one, and forgeries of every kind, each told by what it is."""

from __future__ import annotations

import json
import os

import pytest
from loopback_hub import Hub, Stored, _oid, _sha
from PIL import Image
from random_adapters import random_adapter
from safetensors.torch import save

from flowopd_eval.hub.results import Claim, pixels_sha256
from flowopd_eval.hub.verify import Redrawn, _chosen, _Findings, _unasked, _verdict, level_difference
from flowopd_eval.records import Score

KEY = "shapes_quality"


def lines_of(hub: Hub, name: str) -> list[dict]:
    return [json.loads(line) for line in hub.repositories[f"models/{name}"].files["samples.jsonl"].splitlines()]


def publish(hub: Hub, name: str, **files: bytes) -> None:
    """A commit by hand."""
    repo = hub.repositories[f"models/{name}"]
    changed = repo.files | files
    repo.head = _sha(repo.head.encode(), *(_oid(n, c).encode() for n, c in changed.items()))
    repo.revisions[repo.head] = changed


def forge(hub: Hub, name: str, change, overall: float | None = None) -> None:
    """Publishes the list with ``change`` done to each line, and another overall score on the card."""
    lines = lines_of(hub, name)
    for line in lines:
        change(line)
    files = {"samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}
    metrics = json.loads(hub.repositories[f"models/{name}"].files["metrics.json"])
    summary = metrics["metrics"][KEY]
    if overall is not None:
        cell = summary["metrics"]["overall"]
        shift = overall - cell["value"]
        cell |= {end: cell[end] + shift for end in ("value", "low", "high")}
    publish(hub, name, **files, **{"metrics.json": json.dumps(metrics).encode()})


def test_an_honest_card_is_consistent_picture_by_picture(machine, hub, pushed):
    answer = machine("verify", pushed, "--pictures", 12, "--device", "cpu")
    assert answer.code == 0, answer.err
    head = hub.repositories[f"models/{pushed}"].head
    assert f"hub:{pushed}@{head}" in answer.out
    assert "could not be asked" not in answer.out
    assert "of 15 drawn again are identical" in answer.out  # and a quarter of published ones
    assert "the largest difference is" in answer.out
    levels = int(answer.out.split("the largest difference is ")[1].split()[0])
    assert levels <= 2  # float32, in other batches than when they were first drawn
    assert "scored as the card says: 12 of 12" in answer.out
    assert "\n  consistent" in answer.out
    assert hub.writes()[-1].startswith("POST")  # of the push: verifying writes nothing
    assert not [line for line in hub.writes() if head in line]


def test_the_numbers_must_be_those_of_the_list(machine, hub, pushed):
    forge(hub, pushed, lambda line: None, overall=0.9)
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 1
    assert "the list's own scores give" in answer.out
    assert "not 0.9000" in answer.out
    assert "NOT CONSISTENT" in answer.out
    assert "is not what its card says" in answer.err


def test_the_card_must_show_the_numbers_of_its_metrics(machine, hub, pushed):
    card = hub.repositories[f"models/{pushed}"].files["README.md"].decode()
    metrics = json.loads(hub.repositories[f"models/{pushed}"].files["metrics.json"])
    value = f"{metrics['metrics'][KEY]['metrics']['overall']['value']:.3f}"
    assert value in card
    publish(hub, pushed, **{"README.md": card.replace(value, "0.999").encode()})
    answer = machine("verify", pushed, "--pictures", 8)
    assert (answer.code, "README.md shows other numbers than metrics.json" in answer.out) == (1, True)


def test_pictures_without_a_score_or_under_another_task_are_found(machine, hub, pushed):
    first, *_, last = lines_of(hub, pushed)
    assert first["task"] != last["task"]

    def change(line):
        if line["id"] == first["id"]:
            line["score"] = None
        if line["id"] == last["id"]:
            line["task"] = first["task"]

    forge(hub, pushed, change)
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 1
    assert "1 of 144 pictures of the list have no score" in answer.out
    assert "1 of 144 pictures stand under another task than their prompt's" in answer.out


def test_scores_that_were_raised_are_found_by_judging_again(machine, hub, pushed):
    forge(hub, pushed, lambda line: line.update(score=0.8, pixels_sha256="0" * 64), overall=0.8)
    answer = machine("verify", pushed, "--pictures", 12)
    assert answer.code == 1
    assert "beyond the card's own interval" in answer.out
    assert "the list's own scores" not in answer.out  # which fit the forged number
    assert "scored as the card says: 0 of 12" in answer.out


def test_a_seed_that_no_generator_takes_is_named(machine, hub, pushed):
    forge(hub, pushed, lambda line: line.update(seed=2**70))
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 2
    assert f"seed {2**70} is none" in answer.err


def test_seeds_that_were_picked_are_found(machine, hub, pushed):
    forge(hub, pushed, lambda line: line.update(seed=line["seed"] + (line["id"] == "shapes-00006")))
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 1
    assert "1 of 144 seeds are not those of the rule for base seed 0" in answer.out


def test_a_list_with_gaps_is_found(machine, hub, pushed):
    lines = hub.repositories[f"models/{pushed}"].files["samples.jsonl"].splitlines(keepends=True)
    publish(hub, pushed, **{"samples.jsonl": b"".join(lines[3:])})
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 1
    assert "the list is not the whole bench" in answer.out


def test_other_weights_than_were_judged_are_found(machine, hub, pushed, transformer):
    other = random_adapter(transformer, 9)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor
        for name, factors in other.factors.items()
        for side, tensor in zip("AB", factors, strict=True)
    }
    publish(hub, pushed, **{"adapter_model.safetensors": save(tensors)})
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 1
    assert "of another adapter than the one that lies there" in answer.out
    assert "adapter_model.safetensors and pytorch_lora_weights.safetensors differ: the change of " in answer.out
    assert "0 of 10 drawn again are identical" in answer.out


def test_an_adapter_without_scores_has_nothing_to_verify(machine, hub, trained):
    assert machine("push", trained / "adapter", "me/bare").code == 0
    answer = machine("verify", "me/bare")
    assert (answer.code, "publishes no scores" in answer.err) == (2, True)


def test_a_repository_that_is_not_there_is_told(machine, hub):
    answer = machine("verify", "me/none")
    assert (answer.code, "no repository 'me/none'" in answer.err) == (2, True), answer.err


CELL = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "level": 0.95}
SUMMARY = {
    "key": KEY, "version": 1, "prompts": 144, "prompts_sha256": "a", "samples": 1, "seed": 0, "scorer": {},
    "generator": {"adapter_sha256": "a", "sampling": {}}, "metrics": {"overall": CELL, "tasks": {}},
}  # fmt: skip
RECORD = {"steps": 2, "guidance": 1.0, "shift": 3.0, "width": 64, "height": 64, "text_length": 0}


def metrics(**changes) -> bytes:
    return json.dumps({"adapter_sha256": "a", "metrics": {KEY: SUMMARY | changes}}).encode()


def settings(**changes) -> bytes:
    return json.dumps({"adapter_of": "tiny:base", "record": RECORD | changes}).encode()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("flow_opd.json", b"{", "is no JSON"),
        ("flow_opd.json", b"\xff", "is no JSON"),
        ("flow_opd.json", b"[]", "should hold an object, but holds list"),
        ("flow_opd.json", b"{}", "is not an adapter that `flowopd-eval push` published"),
        ("flow_opd.json", b'{"adapter_of": ["tiny:base"]}', "names the backbone ['tiny:base']"),
        ("flow_opd.json", b'{"adapter_of": "/tmp/evil.py:draw"}', "names the backbone '/tmp/evil.py:draw'"),
        ("flow_opd.json", b'{"adapter_of": "tiny:base"}', "holds no sampling record (record is missing)"),
        ("flow_opd.json", b'{"adapter_of": "tiny:base", "record": {"steps": 2}}', "holds no sampling record"),
        ("flow_opd.json", settings(steps="two"), "holds no sampling record"),
        ("flow_opd.json", settings(steps=0), "steps is 0"),
        ("flow_opd.json", settings(guidance=float("nan")), "guidance nan"),
        ("flow_opd.json", settings(height=65536), "height is 65536, and not from 8 to 4096"),
        ("flow_opd.json", settings(width=60), "not divisible by 8"),
        ("flow_opd.json", settings(text_length=-1), "text_length is -1"),
        ("flow_opd.json", settings(shift=0.0), "shift not above 0"),
        ("flow_opd.json", b"[" * 100_000, "is no JSON"),
        ("flow_opd.json", settings(dtype="load"), "dtype is 'load'"),
        ("metrics.json", b"{", "Invalid JSON"),
        ("metrics.json", b"\xff", "Invalid JSON"),
        ("metrics.json", b"[]", "it: "),
        ("metrics.json", b"{}", "adapter_sha256: Field required"),
        ("metrics.json", b'{"adapter_sha256": "a", "metrics": {}}', "publishes no scores"),
        ("metrics.json", b'{"adapter_sha256": "a", "metrics": {"x": {}}}', "metrics.x.key: Field required"),
        ("metrics.json", metrics(key="ocr"), f"metrics.{KEY}.key is 'ocr'"),
        ("metrics.json", metrics(seed="0"), f"metrics.{KEY}.seed: Input should be a valid integer"),
        ("metrics.json", metrics(samples=0), f"metrics.{KEY}.samples: Input should be greater than 0"),
        ("metrics.json", metrics(scorer="me"), f"metrics.{KEY}.scorer: "),
        ("metrics.json", metrics(generator={}), f"metrics.{KEY}.generator.adapter_sha256: Field required"),
        ("metrics.json", metrics(metrics={"overall": None, "tasks": {}}), f"metrics.{KEY}.metrics.overall: "),
        ("metrics.json", metrics(metrics={"overall": CELL | {"low": float("nan")}, "tasks": {}}), "finite number"),
        ("metrics.json", metrics(metrics={"overall": CELL, "tasks": {"a": {}}}), f"{KEY}.metrics.tasks.a.value: "),
        ("samples.jsonl", b'{"id": 1}\n', "samples.jsonl, line 1, of"),
        ("samples.jsonl", b"\xff\n", "samples.jsonl, line 1, of"),
        ("samples.jsonl", b'{"id"', "its last line is cut off"),
        ("samples/shapes_quality-00000-00.png", b"none", "samples/shapes_quality-00000-00.png of"),
        ("samples/shapes_quality-00000-00.png", b"\x89PNG\r\n\x1a\n", "samples/shapes_quality-00000-00.png of"),
        ("README.md", b"# A card without metadata", "there is none between two lines of --- on top"),
        ("README.md", b"---\na: [\n---\n", "has no metadata that can be read"),
        ("README.md", b"---\n- a\n---\n", "has no metadata that can be read"),
        ("README.md", b"---\n1: a\n---\n", "has no metadata that can be read"),
        ("README.md", b"\xff", "has no metadata that can be read"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_in_words(machine, hub, pushed, name, content, why):
    publish(hub, pushed, **{name: content})
    answer = machine("verify", pushed)
    assert (answer.code, why in answer.err) == (2, True), answer.err
    assert pushed in answer.err
    speaks_of_all = ("names the backbone", "publishes no scores", "is not an adapter")
    assert why.startswith(speaks_of_all) or name in answer.err
    assert "Traceback" not in answer.err


@pytest.fixture
def unreachable(machine):
    """Makes the Hub one that does not answer."""
    machine.python("import flowopd_eval.download as d; d.before = d.hub_answers; d.hub_answers = lambda: False")
    yield
    machine.python("import flowopd_eval.download as d; d.hub_answers = d.before")


@pytest.fixture
def cached(machine, pushed) -> str:
    """What was pushed, in this machine's cache."""
    answer = machine.python(f"from flowopd_eval.download import fetch_files as f; f('hub:{pushed}', ['*', '*/*'])")
    assert answer.code == 0, answer.err
    return pushed


@pytest.mark.parametrize("how", ["revision", "removed", "token"])
def test_a_hub_that_refuses_is_not_replaced_by_the_cache(machine, hub, cached, how):
    name = cached
    if how == "revision":
        name += "@main2"
    elif how == "removed":
        del hub.repositories[f"models/{cached}"]
    else:
        machine.token = "hf_other"
    answer = machine("verify", name, "--pictures", 8)
    why = "has no revision 'main2'" if how == "revision" else "no repository 'me/gentle' on the Hub that this token may"
    assert (answer.code, why in answer.err) == (2, True), answer.err
    assert "consistent" not in answer.out


def test_a_hub_that_cannot_be_asked_is_told_with_the_commit_that_was_verified(machine, hub, cached, unreachable):
    before = len(hub.log)
    answer = machine("verify", cached, "--pictures", 8)
    assert answer.code == 0, answer.err
    assert f"hub:{cached}@{hub.repositories[f'models/{cached}'].head}" in answer.out
    assert "the Hub could not be asked: this is the commit in the local cache" in answer.out
    assert len(hub.log) == before


@pytest.mark.parametrize(
    "index", [[], [{"name": "x"}], [{"name": "x", "results": [{"task": {"type": []}, "metrics": [{"type": []}]}]}]]
)
def test_metadata_without_numbers_are_not_those_of_the_metrics(machine, hub, pushed, index):
    publish(hub, pushed, **{"README.md": b"---\nmodel-index: " + json.dumps(index).encode() + b"\n---\n"})
    answer = machine("verify", pushed, "--pictures", 8)
    assert (answer.code, "README.md shows other numbers than metrics.json" in answer.out) == (1, True), answer.err
    assert "Traceback" not in answer.err


def test_an_empty_list_is_not_the_bench(machine, hub, pushed):
    publish(hub, pushed, **{"samples.jsonl": b""})
    answer = machine("verify", pushed, "--pictures", 8)
    assert (answer.code, "the list is not the whole bench" in answer.out) == (1, True), answer.err


def test_a_listed_picture_that_is_missing_is_named(machine, hub, pushed):
    name = "samples/shapes_quality-00000-00.png"
    publish(hub, pushed)
    del hub.repositories[f"models/{pushed}"].files[name]
    answer = machine("verify", pushed, "--pictures", 8)
    assert (answer.code, f"1 pictures that the list names are missing: {name}" in answer.out) == (1, True), answer.err


def test_a_dataset_is_called_one(machine, hub, pushed):
    hub.repositories["datasets/me/run"] = Stored({"d" * 40: {"README.md": b""}}, "d" * 40)
    answer = machine("verify", "me/run")
    assert (answer.code, "me/run is a dataset" in answer.err) == (2, True), answer.err
    machine.token = ""
    answer = machine("verify", "me/nothing")
    assert (answer.code, "or log in" in answer.err) == (2, True), answer.err


def test_the_cache_says_which_commit_is_the_newest_it_has(tmp_path):
    for age, commit in ((20, "old"), (10, "branch"), (0, "new")):
        (tmp_path / commit).mkdir()
        os.utime(tmp_path / commit, (1e9 - age, 1e9 - age))
    assert _unasked("hub:me/x", tmp_path / "branch").endswith("too: verify me/x@new")
    assert "verify" not in _unasked("hub:me/x", tmp_path / "new")
    assert "verify" not in _unasked("hub:me/x@v1", tmp_path / "branch")


def test_a_picture_outside_of_samples_is_refused(machine, hub, pushed):
    forge(hub, pushed, lambda line: line.update(file="../../../etc/x.png"))
    answer = machine("verify", pushed)
    assert answer.code == 2
    assert "does not lie in samples/" in answer.err


def test_a_backbone_that_is_a_program_is_never_opened(machine, hub, pushed):
    settings = json.loads(hub.repositories[f"models/{pushed}"].files["flow_opd.json"])
    program = machine.folder / "evil.py"
    program.write_text("open('ran', 'w')\ndef draw(p, s): pass\n")
    publish(hub, pushed, **{"flow_opd.json": json.dumps(settings | {"adapter_of": f"{program}:draw"}).encode()})
    answer = machine("verify", pushed)
    assert answer.code == 2
    assert "names the backbone" in answer.err
    assert not (machine.folder / "ran").exists()


# -------------------------------------------------------------------------------------------------------- the verdict


def claim(n: int, score: float, k: int = 0) -> Claim:
    return Claim(KEY, f"p{n:03}", k, "colors", "text", "0", n, "hash", score)


def verdict(pairs, half: float = 0.04, identical: bool = False):
    """The verdict on pictures with these scores (there, here); the card's interval is ``half`` to either side."""
    redrawn = [Redrawn(claim(n, there), identical, None, Score(here)) for n, (there, here) in enumerate(pairs)]
    summary = {"metrics": {"overall": {"value": 0.5, "low": 0.5 - half, "high": 0.5 + half, "n": 500}}}
    return _verdict(KEY, summary, redrawn, _Findings())


@pytest.mark.parametrize(
    ("fell", "rose", "consistent"),
    [(0, 0, True), (2, 0, True), (4, 0, True), (5, 5, True), (10, 0, False), (16, 0, False), (0, 12, False)],
)
def test_a_few_that_fall_decide_nothing_and_many_do(fell, rose, consistent):
    pairs = [(1.0, 0.0)] * fell + [(0.0, 1.0)] * rose
    pairs += [(float(n % 2), float(n % 2)) for n in range(32 - len(pairs))]
    found = verdict(pairs)
    assert (not found.contradictions) == consistent
    assert found.difference.value == pytest.approx((rose - fell) / 32)
    assert found.difference.level == 0.99
    assert found.agreeing == (32 - fell - rose, 32)


def test_a_bias_within_the_cards_own_interval_is_none_of_note():
    """A judge that rounds otherwise moves every score by a little: certain, and of no consequence."""
    pairs = [(n / 40, n / 40 + 0.03 + 0.0001 * (n % 5)) for n in range(32)]
    assert not verdict(pairs, half=0.04).contradictions
    assert verdict(pairs, half=0.02).contradictions


def test_one_picture_has_one_score():
    found = verdict([(0.5, 0.5)] * 31 + [(0.9, 0.5)], identical=True)
    assert found.contradictions == ["1 of 32 pictures that are identical are judged otherwise"]
    assert not verdict([(0.5, 0.5)] * 31 + [(0.9, 0.5)], identical=False).contradictions


def test_the_commit_chooses_one_picture_of_each_prompt():
    claims = [claim(n, 0.5, k) for n in range(50) for k in range(3)]
    one, again, other = (_chosen(claims, 20, seed)[0] for seed in ("a" * 40, "a" * 40, "b" * 40))
    assert one == again
    assert one != other
    assert len({c.id for c in one}) == 20
    assert {c.k for c in one} == {0, 1, 2}


def test_pictures_are_compared_by_their_values():
    red = Image.new("RGB", (4, 2), (200, 0, 0))
    almost = red.copy()
    almost.putpixel((3, 1), (200, 7, 0))
    assert (level_difference(red, red.copy()), level_difference(red, almost)) == (0, 7)
    assert level_difference(red, red.resize((2, 4))) == 255
    assert pixels_sha256(red) == pixels_sha256(red.convert("RGBA"))
    assert len({pixels_sha256(one) for one in (red, almost, red.resize((2, 4)))}) == 3
