"""What was pushed is a model by its repository: `--model hub:REPO@REV` draws what the card shows."""

from __future__ import annotations

import json

import pytest

from flowopd_eval.errors import RequestError
from flowopd_eval.models import resolve


def test_what_was_pushed_is_drawn_by_its_repository_and_commit(machine, hub, pushed, finished, tmp_path):
    repo = hub.repositories[f"models/{pushed}"]
    words = ("--bench", "quality", "--limit", 1, "--tasks", "single_object", "--out", tmp_path / "again")
    answer = machine(*words, "--model", f"hub:{pushed}@{repo.head}")
    assert answer.code == 0, answer.err
    (log,) = (tmp_path / "again").rglob("samples.jsonl")
    drawn = json.loads(log.read_text())
    (first,) = finished.rglob("samples.jsonl")
    shown = json.loads(first.read_text().splitlines()[0])
    assert {name: drawn[name] for name in ("id", "seed")} == {name: shown[name] for name in ("id", "seed")}
    assert drawn["score"] == pytest.approx(shown["score"], abs=1e-3)
    generator = json.loads((tmp_path / "again" / "run.json").read_text())["runs"]
    ((_, entry),) = generator.items()
    recorded = json.loads((finished / "run.json").read_text())["runs"]
    ((_, original),) = recorded.items()
    for name in ("adapter_sha256", "base_sha256", "sampling"):
        assert entry["request"]["generator"][name] == original["request"]["generator"][name]


def test_a_folder_of_the_same_files_is_the_same_model(hub, pushed, tmp_path):
    folder = tmp_path / "mine"
    for name, content in hub.repositories[f"models/{pushed}"].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    spec = resolve(str(folder))
    assert (spec.name, spec.base, spec.objects) == ("mine", "builtin:tiny", "shapes")
    assert (spec.record.steps, spec.record.guidance) == (2, 1.0)
    with pytest.raises(RequestError, match="is an adapter itself"):
        resolve(str(folder), "another")


@pytest.mark.parametrize("base", ["evil.py:draw", "hub:they/model", "tiny:student", "/tmp"])
def test_a_backbone_of_a_strangers_choice_is_refused(tmp_path, base):
    (tmp_path / "flow_opd.json").write_text(json.dumps({"adapter_of": base, "record": {}}))
    with pytest.raises(RequestError, match="names the backbone"):
        resolve(str(tmp_path))
