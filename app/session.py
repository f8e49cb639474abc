"""The models of one family on one backbone, drawing one prompt one after the other from the same noise."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.judging import Panel, Seat, scores
from app.wanted import GUIDANCE, SIDES, Wanted, shown
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.models import FAMILIES, Backbone, ModelGenerator, ModelSpec, load_adapter, resolve
from flowopd_eval.records import SamplingRecord, Score

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)
_PATIENCE = 0.1  # seconds between two looks at whether one is still wanted


@dataclass(frozen=True)
class Arm:
    """A model that may draw. ``problem`` says why it cannot, or is empty."""

    name: str
    spec: ModelSpec
    about: str
    problem: str = ""


@dataclass(frozen=True)
class Lora:
    """An adapter of the user's own. ``guidance`` None: it draws with the base's scale."""

    source: str
    guidance: float | None = None

    @classmethod
    def named(cls, text: str) -> tuple[str, Lora]:
        """Name and adapter out of ``NAME=SOURCE`` or ``NAME=SOURCE@GUIDANCE``. Raises ``RequestError``."""
        name, sign, source = text.partition("=")
        if not (sign and name and source):
            raise RequestError(
                f"--lora {text}: expected NAME=FOLDER or NAME=FOLDER@GUIDANCE, such as mine=runs/x/adapter@1."
            )
        whole, at, last = source.rpartition("@")
        # A folder may have an @ in its name, and hub:REPO@REVISION has one before that of the guidance.
        if not at or Path(source).exists() or (source.startswith("hub:") and "@" not in whole):
            return name, cls(source)
        try:
            guidance = float(last)
        except ValueError:
            guidance = math.nan
        if not (whole and 0 <= guidance <= GUIDANCE):
            raise RequestError(
                f"--lora {text}: expected a guidance scale from 0 to {GUIDANCE:g} after the @, such as "
                f"mine=runs/x/adapter@1, but got {last!r}."
            )
        return name, cls(whole, guidance)


@dataclass(frozen=True)
class Step:
    """An arm has done ``done`` of ``steps``; at the last one it is about to be judged."""

    arm: str
    done: int
    steps: int


@dataclass(frozen=True)
class Drawn:
    """What came of one arm: a picture with its scores by judge and all that decides it, or why there is none."""

    arm: str
    picture: Image.Image | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    seconds: float = 0.0
    error: str = ""


def weights(identity: Mapping[str, Any]) -> str:
    """The hashes of what drew: the backbone's, and after a + the adapter's where there is one."""
    hashes = (identity.get("base_sha256"), identity.get("adapter_sha256"))
    return "+".join(str(one) for one in hashes if one)


class Stopped(Exception):
    """Nobody wants the picture any more."""


class Session:
    """A backbone in memory with every arm that could be had.

    Args:
        family: ``tiny`` or ``flow-opd``.
        loras: further arms, name -> LoRA in any layout that the toolkit reads, with its guidance scale.
        device: where it draws.
        dtype: name of a torch dtype; None takes the family's.

    Raises:
        RequestError: no such family, the backbone cannot be had (a licence, no network), or a LoRA that does not fit.
    """

    def __init__(
        self, family: str, loras: Mapping[str, Lora] | None = None, device: str = "cpu", dtype: str | None = None
    ) -> None:
        if family not in FAMILIES:
            raise RequestError(f"--model {family}: the demo shows a family of models: {', '.join(FAMILIES)}.")
        self.family = FAMILIES[family]
        self.toy = self.family.base == "builtin:tiny"
        base = resolve(f"{family}:base")
        self._backbone = Backbone(self.family.base, [base], device, dtype)
        self._backbone.load()
        self._turn = threading.Lock()  # the backbone draws with one arm at a time
        self.arms: dict[str, Arm] = {}
        for name, member in self.family.members.items():
            self._add(Arm(name, resolve(f"{family}:{name}"), member.about))
        for name, lora in (loras or {}).items():
            self._add_lora(name, lora)
        self.panel = Panel(self.family.objects)

    def _add_lora(self, name: str, lora: Lora) -> None:
        family = self.family.name
        if name in self.arms:
            raise RequestError(f"--lora {name}=…: {family} has a member of that name; choose another.")
        spec = replace(resolve(f"{family}:base", lora.source), name=f"{family}:{name}")
        if lora.guidance is not None:
            spec = replace(spec, record=replace(spec.record, guidance=lora.guidance))
        self._add(Arm(name, spec, "an adapter of yours"))
        if self.arms[name].problem:
            raise RequestError(f"--lora {name}={lora.source}: {self.arms[name].problem}")

    def _add(self, arm: Arm) -> None:
        """Put an arm on the backbone; one that cannot be had keeps its place, with the reason."""
        if arm.spec.adapter:
            try:
                adapter = load_adapter(arm.spec.adapter)
                self._backbone.pipeline.add_experts({arm.spec.name: adapter}, {arm.spec.name: arm.spec.record.guidance})
            except RequestError as error:
                arm = replace(arm, problem=str(error))
        self.arms[arm.name] = arm

    @property
    def ready(self) -> list[Arm]:
        """The arms that can draw."""
        return [arm for arm in self.arms.values() if not arm.problem]

    @property
    def sides(self) -> tuple[int, ...]:
        """Heights and widths that may be asked for, in pixels."""
        return SIDES[self.family.objects]

    @cached_property
    def _words(self) -> frozenset[str] | None:
        """What the miniature's tokenizer knows; None for a model with a real one."""
        if not self.toy:
            return None
        from flowopd_eval.tiny.vocabulary import words

        return frozenset(words())

    def unknown_words(self, prompt: str) -> list[str]:
        """Words outside quotes that the miniature never saw, and so draws without."""
        if self._words is None:
            return []
        outside = " ".join(prompt.lower().split('"')[::2])
        said = (word.strip(".,;:!?()") for word in outside.split())
        return [word for word in dict.fromkeys(said) if word and word not in self._words]

    def check(self, request: Wanted) -> Wanted:
        """The request with its arms in the page's order. Raises ``RequestError`` for what cannot be drawn here."""
        for name in request.arms:
            if name not in self.arms:
                raise RequestError(f"Models: there is no model {name!r} here; there are: {', '.join(self.arms)}.")
            if problem := self.arms[name].problem:
                raise RequestError(f"Models: {name} is not available: {problem}")
        self.check_side(request.side)
        return request.model_copy(update={"arms": tuple(name for name in self.arms if name in request.arms)})

    def check_side(self, side: Any) -> None:
        """Raises ``RequestError`` for a height and width that this family does not draw."""
        if side not in (None, *self.sides):
            choice = ", ".join(map(str, self.sides))
            raise RequestError(f"Side: this family draws {choice} pixels, but got {shown(repr(side), 60)}.")

    def record(self, name: str, request: Wanted) -> SamplingRecord:
        """The sampling record by which an arm answers a request: its own, but for what the request says."""
        own = self.arms[name].spec.record
        return replace(
            own,
            steps=request.steps or own.steps,
            guidance=own.guidance if request.guidance is None else request.guidance,
            width=request.side or own.width,
            height=request.side or own.height,
            dtype=self._backbone.dtype,
        )

    def weights(self, name: str) -> str:
        """The hashes of an arm, as :func:`weights` has them of a picture."""
        spec = self.arms[name].spec
        return weights(ModelGenerator(self._backbone, spec, spec.record).identity())

    def draw(self, request: Wanted) -> Iterator[Step | Drawn]:
        """Draw and judge the request's arms, each on its own: one that fails leaves the others theirs.

        A thread of its own draws. It ends within one step of this generator's being closed.
        """
        request = self.check(request)
        told: queue.SimpleQueue[Step | Drawn | None] = queue.SimpleQueue()
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(request, told.put, stop), name="drawing", daemon=True)
        worker.start()
        try:
            while (event := told.get()) is not None:
                yield event
        finally:
            stop.set()
            worker.join()

    def _work(self, request: Wanted, tell: Callable[[Step | Drawn | None], None], stop: threading.Event) -> None:
        try:
            seats: list[Seat] | None = None
            for name in request.arms:
                self._wait(stop)
                try:
                    drawn = self._draw_one(name, request, tell, stop)
                finally:
                    self._turn.release()
                if drawn.picture is not None:
                    seats = self.panel.seats(request.prompt) if seats is None else seats
                    drawn = replace(drawn, scores=scores(seats, drawn.picture))
                tell(drawn)
        except Stopped:
            _log.info("Drawing was stopped.")
        except Exception:  # a thread's exception would be heard by nobody
            _log.exception("The comparison could not be finished")
        finally:
            tell(None)

    def _wait(self, stop: threading.Event) -> None:
        """Takes the turn. Raises ``Stopped`` when it is no longer wanted."""
        while not self._turn.acquire(timeout=_PATIENCE):
            if stop.is_set():
                raise Stopped
        if stop.is_set():
            self._turn.release()
            raise Stopped

    def _draw_one(
        self, name: str, request: Wanted, tell: Callable[[Step | Drawn | None], None], stop: threading.Event
    ) -> Drawn:
        began = time.perf_counter()
        try:
            picture, identity = self._picture(name, request, tell, stop)
        except Stopped:
            raise
        except (RequestError, WorkError) as error:
            return Drawn(name, error=shown(error))
        except Exception as error:  # whatever a model raises, the other arms are drawn
            _log.exception("%s could not draw", name)
            memory = type(error).__name__ == "OutOfMemoryError"
            why = "it ran out of memory; try a smaller size" if memory else "it failed; the server's log says why"
            return Drawn(name, error=f"{name} could not draw: {why}.")
        return Drawn(name, picture, identity=identity, seed=request.seed, seconds=time.perf_counter() - began)

    def _picture(
        self, name: str, request: Wanted, tell: Callable[[Step | Drawn | None], None], stop: threading.Event
    ) -> tuple[Image.Image, dict[str, Any]]:
        import numpy as np
        from PIL import Image

        spec, record = self.arms[name].spec, self.record(name, request)

        def after_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                raise Stopped
            tell(Step(name, index + 1, record.steps))
            return tensors

        tell(Step(name, 0, record.steps))
        output = self._backbone.pipeline(
            request.prompt,
            expert=spec.name if spec.adapter else None,
            seed=request.seed,
            num_inference_steps=record.steps,
            guidance_scale=record.guidance,
            height=record.height,
            width=record.width,
            max_sequence_length=record.text_length,
            negative_prompt=record.negative_prompt,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="np",
        )
        pixels = np.asarray(output.images[0])  # type: ignore[union-attr]
        if not np.isfinite(pixels).all():
            raise WorkError(f"{name} drew NaN in {record.dtype}; start the demo with --dtype float32.")
        picture = Image.fromarray((pixels * 255).round().astype("uint8"))
        return picture, ModelGenerator(self._backbone, spec, record).identity()
