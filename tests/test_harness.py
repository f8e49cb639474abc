"""The harness with a real painter and a real judge: resume, shards, refusals and failures, compared byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from painting import ENTRY, PROMPTS, RUN, Judge, Painter

from flowopd_eval import harness, store
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.harness import Interrupted, finish, plan, run_bench
from flowopd_eval.records import Score
from flowopd_eval.report import write_report
from flowopd_eval.rescore import import_geneval, rescore
from flowopd_eval.store import BenchFolder, Shard


class Fragile(Judge):
    """Breaks on the pictures of some prompts, in one of the ways in which judges break."""

    def __init__(self, broken, result=None):
        super().__init__()
        self.broken, self.result = broken, result

    def one(self, pixels, prompt):
        if prompt.id not in self.broken:
            return super().one(pixels, prompt)
        if self.result is None:
            raise RuntimeError(f"no eyes <{object()}>")
        return self.result


def tree(out: Path) -> dict[str, bytes]:
    """Every file of a finished run that must not vary between two runs, by name."""
    folder = out / ENTRY
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    run_bench(RUN, Painter(), out)
    return tree(out)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / ENTRY / "samples.jsonl").read_text().splitlines()]


def png_that_claims(side: int) -> bytes:
    """A PNG of some hundred bytes whose header promises ``side`` x ``side`` pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_run_stores_each_picture_once_with_seed_hash_and_score(tmp_path):
    summary = run_bench(RUN, Painter(), tmp_path, note="squares, not photographs")
    found = lines(tmp_path)
    assert [(line["id"], line["k"]) for line in found] == [(p.id, k) for p in PROMPTS for k in range(2)]
    judge = Judge()
    for line in found:
        prompt = next(p for p in PROMPTS if p.id == line["id"])
        assert line["seed"] == prompt.seed(7, line["k"])
        path = tmp_path / ENTRY / line["file"]
        assert store.file_sha256(path) == line["sha256"]
        expected = judge.one(np.asarray(Painter().generate([prompt], [line["seed"]])[0], dtype=float), prompt)
        assert (line["score"], line["reason"]) == (expected.value, expected.reason)
        assert line["error"] is None
    scores = {task: [x["score"] for x in found if x["task"] == task] for task in ("counting", "colors")}
    means = {task: np.mean(values) for task, values in scores.items()}
    assert 0 < means["counting"] < 1
    metrics = summary["metrics"]
    assert metrics["overall"]["value"] == pytest.approx(np.mean(list(means.values())))
    assert {task: one["value"] for task, one in metrics["tasks"].items()} == pytest.approx(means)
    assert metrics["images"]["value"] == pytest.approx(np.mean([x["score"] for x in found]))
    any_right = [max(x["score"] for x in found if x["id"] == p.id) for p in PROMPTS]
    assert metrics["prompts_any"]["value"] == pytest.approx(np.mean(any_right))
    assert (summary["n"], summary["unscored"], summary["expected"], summary["partial"]) == (20, 0, 20, None)
    assert json.loads((tmp_path / ENTRY / "summary.json").read_text()) == summary
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["note"] == "squares, not photographs"
    session = run["runs"][ENTRY]["sessions"][0]
    assert (session["status"], session["pictures"]) == ("finished", 20)
    assert {"python", "numpy", "pillow"} <= set(session["versions"])


def test_two_runs_of_one_request_are_the_same_bytes(tmp_path, whole):
    run_bench(RUN, Painter(), tmp_path)
    assert tree(tmp_path) == whole


def test_nothing_that_varies_stands_in_the_results(tmp_path, whole):
    for name in ("samples.jsonl", "summary.json", "prompts.jsonl"):
        text = whole[name].decode()
        assert str(tmp_path.parent) not in text
        assert "wall" not in text
        assert "started" not in text


def test_a_picture_s_bytes_do_not_carry_its_metadata(tmp_path):
    plain = Painter().generate(PROMPTS[:1], [3])[0]
    dressed = plain.copy()
    dressed.info = {"icc_profile": b"profile", "dpi": (72, 72), "comment": "today"}
    assert store.write_picture(tmp_path / "a.png", plain) == store.write_picture(tmp_path / "b.png", dressed)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_finished_run_called_again_draws_nothing(tmp_path, whole):
    run_bench(RUN, Painter(), tmp_path)
    record = (tmp_path / "run.json").read_bytes()
    painter, judge = Painter(), Judge()
    summary = run_bench(replace(RUN, scorer=judge), painter, tmp_path)
    assert (painter.drawn, judge.judged) == (0, 0)
    assert summary["n"] == 20
    assert (tmp_path / "run.json").read_bytes() == record
    assert tree(tmp_path) == whole


def test_a_limited_run_says_that_it_is_partial(tmp_path):
    summary = run_bench(replace(RUN, prompts=PROMPTS[:4], partial="--limit 4"), Painter(), tmp_path)
    assert summary["partial"] == "--limit 4"


# ---------------------------------------------------------------------------------------------------------- the plan


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 7), st.integers(1, 5))
def test_the_plan_holds_every_picture_once_in_order_and_shards_part_it(prompts, samples, batch_size, shards):
    batches = plan(PROMPTS[:prompts], samples, 0, batch_size)
    flat = [(item.prompt.id, item.k) for batch in batches for item in batch]
    assert flat == [(p.id, k) for p in PROMPTS[:prompts] for k in range(samples)]
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len({item.file for batch in batches for item in batch}) == len(flat)
    parts = [batches[shard.index :: shard.count] for shard in (Shard(i, shards) for i in range(shards))]
    assert sorted(item.file for part in parts for batch in part for item in batch) == sorted(
        item.file for batch in batches for item in batch
    )


def test_shards_are_counted_from_zero():
    assert [Shard.parse(f"{i}/3") for i in range(3)] == [Shard(0, 3), Shard(1, 3), Shard(2, 3)]
    for text in ("3/3", "-1/3", "1", "0/0", "a/b"):
        with pytest.raises(RequestError, match="--shard"):
            Shard.parse(text)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"prompts": ()}, "no prompts"),
        ({"prompts": (PROMPTS[0], PROMPTS[1], PROMPTS[0])}, "'p0' occurs twice"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(change, match):
    with pytest.raises(RequestError, match=match):
        replace(RUN, **change)


# ------------------------------------------------------------------------------------------------- shards and resume


def start(out: Path, **options) -> subprocess.Popen:
    """``painting.main`` in a process of its own, past its first progress report; it prints a line after each batch."""
    code = "import sys, json, painting; painting.main(sys.argv[1], **json.loads(sys.argv[2]))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "progress\n", process.communicate()[1]
    return process


def test_killed_five_times_and_resumed_ends_with_the_same_bytes(tmp_path, whole):
    rng = random.Random(0)
    for batches in (1, 0, 1, 0, 1):
        process = start(tmp_path, pause=0.04)
        for _ in range(batches):
            process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.06))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    painter = Painter()
    run_bench(RUN, painter, tmp_path)
    assert 0 < painter.drawn <= 20 - 3 * RUN.batch_size  # three batches were kept for certain
    assert tree(tmp_path) == whole


def test_shards_at_the_same_time_make_the_file_of_one_run(tmp_path, whole):
    processes = [start(tmp_path, shard=f"{i}/3") for i in range(3)]
    assert [(process.communicate(), process.returncode)[1] for process in processes] == [0, 0, 0]
    assert tree(tmp_path) == whole


def test_missing_shards_are_named_and_the_rest_is_partial(tmp_path, whole):
    run_bench(RUN, Painter(), tmp_path, shard=Shard(0, 3))
    summary = run_bench(RUN, Painter(), tmp_path, shard=Shard(2, 3))
    # 20 pictures in batches of 3: batches 0..6, shard 1 has batches 1 and 4
    assert summary["partial"] == "6 of 20 pictures are not drawn yet; shard 1/3 lacks 6 pictures"
    assert summary["n"] == 14
    with pytest.raises(RequestError, match="shard 1/3 lacks 6"):
        rescore(BenchFolder(tmp_path, ENTRY), Judge(2))
    painter = Painter()
    run_bench(RUN, painter, tmp_path)  # what shards left over is finished by an unsharded run
    assert painter.drawn == 6
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_drawn_and_says_how_to_go_on(tmp_path, whole, number):
    process = start(tmp_path, pause=0.04)
    process.stdout.readline()  # the first batch is kept
    process.send_signal(number)
    _, message = process.communicate(timeout=20)
    kept = lines(tmp_path)
    assert 0 < len(kept) < 20
    assert message.startswith(f"Stopped after {len(kept)} of 20 pictures")
    assert f"--out {tmp_path}" in message
    assert "Traceback" not in message
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["runs"][ENTRY]["sessions"][0]["status"] == "interrupted"
    run_bench(RUN, Painter(), tmp_path)
    assert tree(tmp_path) == whole


@pytest.mark.parametrize(
    ("damage", "drawn"),
    [
        (lambda data: data[:-20], 2),  # torn in its last line: the last batch has two pictures
        (lambda data: data + b'{"id": "p9", "k": 1', 0),
        (lambda data: data.replace(b'"k": 1', b'"k": "1"', 1), 3),
        (lambda data: b"\n".join(data.split(b"\n")[4:]), 6),
        (lambda data: data.replace(b"samples/00002-01.png", b"../../../00002-01.png"), 3),
        (lambda data: data.replace(b'"seed": ', b'"seed": 1', 1), 3),
        (lambda data: b"", 20),
    ],
)
def test_damaged_lines_are_drawn_again_by_whole_batches(tmp_path, whole, damage, drawn):
    run_bench(RUN, Painter(), tmp_path)
    path = tmp_path / ENTRY / "samples.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    painter = Painter()
    run_bench(RUN, painter, tmp_path)
    assert painter.drawn == drawn
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("data", [None, b"", b"not a picture"])
def test_a_damaged_picture_is_drawn_again_with_its_batch_and_a_warning(tmp_path, whole, caplog, data):
    run_bench(RUN, Painter(), tmp_path)
    path = tmp_path / ENTRY / "samples/00004-01.png"
    path.unlink() if data is None else path.write_bytes(data)
    partial = "1 pictures are gone from the folder" if data is None else None
    assert finish(BenchFolder(tmp_path, ENTRY))["partial"] == partial
    painter = Painter()
    run_bench(RUN, painter, tmp_path)
    assert painter.drawn == 3
    assert "samples/00004-01.png" in caplog.text
    assert tree(tmp_path) == whole


CHANGES = {
    "seed: 7 there, 8 asked for": lambda run, painter: (replace(run, seed=8), painter),
    "batch_size: 3 there, 4 asked for": lambda run, painter: (replace(run, batch_size=4), painter),
    "version: 1 there, 2 asked for": lambda run, painter: (replace(run, version=2), painter),
    "samples: 2 there, 3 asked for": lambda run, painter: (replace(run, samples=3), painter),
    "prompts_sha256: ": lambda run, painter: (replace(run, prompts=PROMPTS[::-1]), painter),
    "partial: null there": lambda run, painter: (replace(run, prompts=PROMPTS[:5], partial="--limit 5"), painter),
    "generator.sampling.steps: 20 there, 30 asked": lambda run, painter: (run, Painter(steps=30)),
    "scorer.version: 1 there, 2 asked for": lambda run, painter: (replace(run, scorer=Judge(2)), painter),
}


@pytest.mark.parametrize("difference", CHANGES)
def test_a_changed_request_is_refused_with_both_values(tmp_path, whole, difference):
    run_bench(RUN, Painter(), tmp_path)
    run, painter = CHANGES[difference](RUN, Painter())
    with pytest.raises(RequestError) as refusal:
        run_bench(run, painter, tmp_path)
    assert difference in str(refusal.value)
    assert "another --out" in str(refusal.value)
    assert painter.drawn == 0
    assert tree(tmp_path) == whole


def test_two_benches_share_a_folder(tmp_path, whole):
    run_bench(RUN, Painter(), tmp_path)
    run_bench(replace(RUN, bench="other", prompts=PROMPTS[:1]), Painter(), tmp_path)
    assert [folder.entry for folder in store.bench_folders(tmp_path)] == [ENTRY, "painter-base/other"]
    assert tree(tmp_path) == whole


def test_a_shard_that_is_being_written_is_left_to_its_process(tmp_path):
    with (
        BenchFolder(tmp_path, ENTRY).alone("samples.jsonl"),
        pytest.raises(RequestError, match=r"Another process is writing .*samples\.jsonl"),
    ):
        run_bench(RUN, Painter(), tmp_path)


# ---------------------------------------------------------------------------------------------------------- failures


def test_drawing_and_judging_overlap(tmp_path):
    second_drawn, first_judged = threading.Event(), threading.Event()

    class Waiting(Painter):
        def generate(self, prompts, seeds):
            if self.drawn:
                second_drawn.set()
                assert first_judged.wait(10)
            return super().generate(prompts, seeds)

    class Patient(Judge):
        def score(self, images, prompts):
            assert second_drawn.wait(10)
            first_judged.set()
            return super().score(images, prompts)

    summary = run_bench(replace(RUN, scorer=Patient()), Waiting(), tmp_path)
    assert (summary["n"], summary["unscored"]) == (20, 0)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (None, "RuntimeError: no eyes <<object object at 0x…>>"),
        (Score(float("nan")), "ValueError: the score is nan"),
        (Score(1.0, detail={"seen": float("inf")}), "ValueError: Out of range float values"),
        (Score(1.0, detail={"seen": {1, 2}}), "TypeError: Object of type set"),
        (Score(None, error="the answer had no number"), "the answer had no number"),
    ],
)
def test_a_picture_that_cannot_be_judged_is_unscored_and_alone_so(tmp_path, result, error):
    summary = run_bench(replace(RUN, scorer=Fragile({"p3"}, result)), Painter(), tmp_path)
    found = lines(tmp_path)
    assert {line["id"] for line in found if line["score"] is None} == {"p3"}
    assert all(line["error"].startswith(error) for line in found if line["id"] == "p3")
    assert (summary["n"], summary["unscored"], summary["partial"]) == (18, 2, None)
    task = summary["metrics"]["tasks"][PROMPTS[3].task]
    scored = [line["score"] for line in found if line["task"] == PROMPTS[3].task and line["score"] is not None]
    assert task["value"] == pytest.approx(np.mean(scored))
    assert (task["n"], task["unscored"]) == (8, 2)


def test_a_task_without_any_score_makes_the_summary_partial(tmp_path):
    summary = run_bench(replace(RUN, scorer=Fragile({p.id for p in PROMPTS[1::2]})), Painter(), tmp_path)
    assert summary["partial"] == "no picture of colors has a score"
    assert summary["metrics"]["overall"]["value"] == summary["metrics"]["tasks"]["counting"]["value"]


def test_a_judge_that_gives_too_few_scores_takes_no_picture_s_score(tmp_path):
    class Short(Judge):
        def score(self, images, prompts):
            return super().score(images, prompts)[:1]

    assert run_bench(replace(RUN, scorer=Short()), Painter(), tmp_path)["n"] == 20  # one by one it is right


def test_a_judge_that_lacks_its_library_is_noticed_before_anything_is_drawn(tmp_path):
    class Missing(Judge):
        def identity(self):
            raise RequestError("rapidocr is not installed: pip install 'flowopd-eval[ocr]'.")

    painter = Painter()
    with pytest.raises(RequestError, match="rapidocr"):
        run_bench(replace(RUN, scorer=Missing()), painter, tmp_path / "out")
    assert painter.drawn == 0
    assert not (tmp_path / "out").exists()


def test_the_signal_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run_bench(RUN, Painter(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_generator_that_fails_loses_nothing_that_was_drawn(tmp_path, whole):
    class Tired(Painter):
        def generate(self, prompts, seeds):
            if self.drawn >= 9:
                raise WorkError("the model draws NaN")
            return super().generate(prompts, seeds)

    with pytest.raises(WorkError, match="NaN"):
        run_bench(RUN, Tired(), tmp_path)
    assert len(lines(tmp_path)) == 9
    assert json.loads((tmp_path / "run.json").read_text())["runs"][ENTRY]["sessions"][0]["status"] == "failed"
    run_bench(RUN, Painter(), tmp_path)
    assert tree(tmp_path) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="a file size limit stands in for a full disk")
@pytest.mark.parametrize(
    ("options", "refused"), [({"side": 64}, "samples/00000-00.png"), ({"padding": 600}, "samples.jsonl")]
)
def test_a_full_disk_is_explained_and_leaves_nothing_half_written(tmp_path, options, refused):
    judge, painter = Judge(padding=options.get("padding", 0)), Painter(options.get("side", 12))
    run_bench(replace(RUN, scorer=judge), painter, tmp_path / "a")
    process = start(tmp_path / "b", limit=8000, **options)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"{tmp_path / 'b' / ENTRY / refused}: File too large" in message
    assert "MiB are free" in message
    assert "same command again" in message
    journal = (tmp_path / "b" / ENTRY / "samples.jsonl").read_bytes()
    assert journal.count(b"\n") % 3 == 0
    assert journal == b"" or journal.endswith(b"\n")
    assert not list((tmp_path / "b").rglob("*.tmp"))
    process = start(tmp_path / "b", **options)
    process.communicate(timeout=20)
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full_is_named():
    with (
        pytest.raises(WorkError, match="No space left on device"),
        store._explained(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


# --------------------------------------------------------------------------------------- judging pictures that exist


def test_drawing_first_and_judging_later_is_the_same_as_both_at_once(tmp_path, whole):
    drawn = run_bench(replace(RUN, scorer=None), Painter(), tmp_path)
    assert (drawn["n"], drawn["unscored"]) == (0, 20)
    assert {line["error"] for line in lines(tmp_path)} == {harness.NOT_SCORED}
    rescore(BenchFolder(tmp_path, ENTRY), Judge())
    assert tree(tmp_path) == whole


def test_the_same_judge_judges_only_what_has_no_score(tmp_path, whole):
    run_bench(replace(RUN, scorer=Fragile({"p3"})), Painter(), tmp_path)
    judge = Judge()
    rescore(BenchFolder(tmp_path, ENTRY), judge)
    assert judge.judged == 2
    assert tree(tmp_path) == whole
    rescore(BenchFolder(tmp_path, ENTRY), judge, again=True)
    assert judge.judged == 22


def test_another_judge_judges_all_and_stands_in_the_results(tmp_path):
    run_bench(RUN, Painter(), tmp_path)
    judge = Judge(2)
    summary = rescore(BenchFolder(tmp_path, ENTRY), judge)
    assert judge.judged == 20
    assert summary["scorer"] == {"name": "red", "version": 2}
    painter = Painter()
    run_bench(replace(RUN, scorer=Judge(2)), painter, tmp_path)  # is now the request that the folder answers
    assert painter.drawn == 0


def test_judging_that_was_stopped_keeps_the_old_scores_and_continues(tmp_path):
    class Stopped(Judge):
        def score(self, images, prompts):
            if self.judged >= 8:
                raise KeyboardInterrupt
            return super().score(images, prompts)

    run_bench(RUN, Painter(), tmp_path)
    before = (tmp_path / ENTRY / "samples.jsonl").read_bytes()
    folder = BenchFolder(tmp_path, ENTRY)
    with pytest.raises(Interrupted, match="after judging 8 of 20"):
        rescore(folder, Stopped(2), batch_size=4)
    assert (tmp_path / ENTRY / "samples.jsonl").read_bytes() == before
    assert folder.request()["scorer"] == {"name": "red", "version": 1}
    (journal,) = folder.path.glob("rescore-*.jsonl")
    other = store.read_samples(journal)
    journal.write_bytes(b"".join(store.json_line(replace(s, sha256=s.sha256[s.k :]).to_json()) for s in other))
    judge = Judge(2)
    rescore(folder, judge)
    assert judge.judged == 12 + 4  # the four with k = 1 are judgements of pictures that are no longer there
    assert not list(folder.path.glob("rescore-*"))


def test_a_picture_that_cannot_be_read_is_unscored(tmp_path):
    run_bench(RUN, Painter(), tmp_path)
    replace_picture(tmp_path, 0, b"not a picture", recorded=True)
    (tmp_path / ENTRY / "samples/00000-01.png").unlink()
    summary = rescore(BenchFolder(tmp_path, ENTRY), Judge(2))
    assert summary["unscored"] == 2
    assert summary["partial"] == "1 pictures are gone from the folder"
    assert "cannot be read" in lines(tmp_path)[0]["error"]


def geneval_folder(source: Path) -> Path:
    for number, prompt in enumerate(PROMPTS[:3]):
        samples = source / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        record = {"tag": prompt.task, "include": [{"class": "cat", "count": number}], "prompt": prompt.prompt}
        (samples.parent / "metadata.jsonl").write_text(json.dumps(record))
        for k, picture in enumerate(Painter().generate([prompt] * 3, [number, number + 10, number + 20])):
            picture.save(samples / f"{k:04d}.png")
    (source / "00001/samples/0002.png").unlink()
    (source / "grid.png").write_bytes(b"")
    return source


def test_pictures_in_geneval_s_layout_are_judged_where_they_were_copied(tmp_path):
    source = geneval_folder(tmp_path / "pictures")
    folder = import_geneval(source, tmp_path / "out", RUN, model="theirs")
    summary = rescore(folder, Judge())
    assert (summary["n"], summary["expected"]) == (8, 9)
    assert summary["partial"] == (
        "the folder lacks 7 of the bench's 10 prompts and has 0 others; 1 of 9 pictures are not drawn yet"
    )
    sample = store.read_samples(folder.samples)[3]
    assert (sample.id, sample.k, sample.task, sample.prompt) == ("00001", 0, "colors", "a photo of 1 cats")
    assert sample.which == "picture 0, seed unknown"
    assert "seed -1" not in write_report(folder.out).read_text()
    assert (folder.path / sample.file).read_bytes() == (source / "00001/samples/0000.png").read_bytes()
    assert folder.prompts()[1].fields == {"include": [{"class": "cat", "count": 1}]}
    judge = Judge()
    rescore(import_geneval(source, tmp_path / "out", RUN, model="theirs"), judge)
    assert judge.judged == 0
    Painter().generate([PROMPTS[0]], [99])[0].save(source / "00000/samples/0000.png")
    with pytest.raises(RequestError, match="pictures_sha256"):
        import_geneval(source, tmp_path / "out", RUN, model="theirs")


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(RequestError, match="GenEval's layout"):
        import_geneval(tmp_path, tmp_path / "out", RUN, model="theirs")
    (tmp_path / "00000").mkdir()
    with pytest.raises(RequestError, match=r"metadata\.jsonl is not a GenEval record"):
        import_geneval(tmp_path, tmp_path / "out", RUN, model="theirs")


# ------------------------------------------------------------------------------------------------------- hostile runs


@pytest.mark.parametrize("file", ["../x.png", "/etc/passwd", "a/../../x.png", "C:\\x", "..\\x.png", "", "file:x.png"])
def test_a_picture_outside_the_run_is_refused(tmp_path, file):
    run_bench(RUN, Painter(), tmp_path)
    line = {**lines(tmp_path)[0], "file": file}
    with pytest.raises(RequestError, match="does not lie inside the run"):
        store.parse_sample(store.json_line(line), "line 1")


def test_a_link_out_of_the_run_is_refused(tmp_path):
    run_bench(RUN, Painter(), tmp_path)
    (tmp_path / "secret.png").write_bytes(b"secret")
    path = tmp_path / ENTRY / "samples/00000-00.png"
    path.unlink()
    path.symlink_to(tmp_path / "secret.png")
    with pytest.raises(RequestError, match="leads outside the run"):
        rescore(BenchFolder(tmp_path, ENTRY), Judge(2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run: run["runs"].update({"../../etc/x": run["runs"][ENTRY]}), "refused"),
        (lambda run: run["runs"].update({"/etc/x": run["runs"][ENTRY]}), "refused"),
        (lambda run: run.update(schema=99), "another version"),
        (lambda run: run.update(runs=[]), "does not list its runs"),
    ],
)
def test_a_run_json_that_lies_is_refused(tmp_path, change, match):
    run_bench(RUN, Painter(), tmp_path)
    run = store.read_run(tmp_path)
    change(run)
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(RequestError, match=match):
        store.bench_folders(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"there is no .*run\.json"):
        store.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RequestError, match="is not JSON"):
        store.read_run(tmp_path)


def test_models_become_folders_that_every_system_and_link_takes():
    assert store.folder_name("tiny:base") == "tiny-base"
    assert store.folder_name("hub:a/b@main") == "hub-a-b-main"
    assert store.folder_name("../..") == "model"


def replace_picture(out: Path, place: int, data: bytes, *, recorded: bool) -> dict:
    """Put other bytes in a picture's place; ``recorded``: as if they had been there from the start."""
    found = lines(out)
    (out / ENTRY / found[place]["file"]).write_bytes(data)
    if recorded:
        found[place]["sha256"] = hashlib.sha256(data).hexdigest()
        (out / ENTRY / "samples.jsonl").write_bytes(b"".join(map(store.json_line, found)))
    return found[place]


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_picture_bomb_is_unscored_and_the_others_are_judged(side, tmp_path):
    """Under Pillow's warning, between its warning and its error, and above both."""
    run_bench(RUN, Painter(), tmp_path)
    bomb = replace_picture(tmp_path, 3, png_that_claims(side), recorded=True)
    assert rescore(BenchFolder(tmp_path, ENTRY), Judge(version=2))["unscored"] == 1
    found = lines(tmp_path)[3]
    assert (found["id"], found["score"]) == (bomb["id"], None)
    assert "cannot be read (ValueError)" in found["error"]


def test_a_picture_that_is_not_the_one_on_record_is_not_judged(tmp_path):
    run_bench(RUN, Painter(), tmp_path)
    other = (tmp_path / ENTRY / lines(tmp_path)[0]["file"]).read_bytes()
    replace_picture(tmp_path, 3, other, recorded=False)
    assert rescore(BenchFolder(tmp_path, ENTRY), Judge(version=2))["unscored"] == 1
    assert lines(tmp_path)[3]["error"] == "the picture is not the one on record"
