"""Many adapters on one backbone: each row of a batch is computed with the adapter of its choice.

PEFT's ``adapter_names`` does not exist on diffusers models, and switching with ``set_adapter`` changes
``requires_grad`` and recompiles. Here the factors of all adapters lie stacked, rows choose by integer index, and only
the values of that index change from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flowopd_eval.adapters.adapter import Adapter, Factors, check_adapter, linear_modules, listing
from flowopd_eval.errors import RequestError


@dataclass(frozen=True)
class _Choice:
    """What the rows of a forward are computed with.

    Neither field: the base. ``trainable``: one trainable adapter for all rows. ``index`` of shape (): one frozen
    adapter for all rows, by its place among the frozen; of shape (n,): row i has the adapter at place ``index[i]`` of
    :attr:`AdapterBank.names`, and the place after the last is the base.
    """

    trainable: int | None = None
    index: torch.Tensor | None = None
    frozen: bool = False  # the rows' places are among the frozen alone, the base after them


class _Selection:
    """What all layers of one bank look at; ``choice`` is None outside ``use`` and ``select``."""

    choice: _Choice | None = None
    fused: str | None = None

    @contextmanager
    def holding(self, choice: _Choice | None) -> Iterator[None]:
        before, self.choice = self.choice, choice
        try:
            yield
        finally:
            self.choice = before


class _Slot(nn.Module):
    """One layer's factors of every adapter.

    ``frozen_A`` (n + 1, r, in) and ``frozen_B`` (n + 1, out, r), ranks padded with zeros; the last of the n + 1 is all
    zero, for the base. Trainable factors stand apart, so that gradients and optimisers see them alone; their B is
    stored without its scale.
    """

    frozen_A: torch.Tensor
    frozen_B: torch.Tensor

    def __init__(
        self,
        linear: nn.Linear,
        frozen: Sequence[Factors | None],
        trainable: Sequence[Factors],
        scales: Sequence[float],
        selection: _Selection,
    ) -> None:
        super().__init__()
        self.selection = selection
        self.scales = tuple(scales)
        weight = linear.weight
        rank = max([f.rank for f in trainable] + [f.rank for f in frozen if f is not None])
        # fp8 is a way to store the base's weights; nothing can be computed in it.
        dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
        blank = torch.zeros(len(frozen) + 1, device=weight.device, dtype=dtype)
        self.register_buffer("frozen_A", blank[:, None, None].repeat(1, rank, linear.in_features))
        self.register_buffer("frozen_B", blank[:, None, None].repeat(1, linear.out_features, rank))
        for row, factors in enumerate(frozen):
            if factors is not None:
                self.frozen_A[row, : factors.rank] = factors.A
                self.frozen_B[row, :, : factors.rank] = factors.B
        # fp32 whatever the base: steps of an optimiser vanish in bf16.
        master = partial(torch.Tensor.to, device=weight.device, dtype=torch.float32, copy=True)
        self.trainable_A = nn.ParameterList([master(f.A.detach()) for f in trainable])
        self.trainable_B = nn.ParameterList([master(f.B.detach() / s) for f, s in zip(trainable, scales, strict=True)])

    def factors(self, position: int) -> Factors:
        """Factors of the adapter at ``position`` of the bank's names, its scale inside B."""
        if position < len(self.scales):
            return Factors(self.trainable_A[position], self.trainable_B[position] * self.scales[position])
        return Factors(self.frozen_A[position - len(self.scales)], self.frozen_B[position - len(self.scales)])

    def _apply(self, fn: Callable, recurse: bool = True) -> _Slot:
        # To the layer's device, but never to its precision: layerwise casting stores the layer in fp8 between forwards,
        # and factors sent there would come back with three bits.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)

    def _stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n + 1, r, in) and B (n + 1, out, r) of all adapters in the order of the bank's names, the base last."""
        if not self.scales:
            return self.frozen_A, self.frozen_B
        rank, dtype = self.frozen_A.shape[1], self.frozen_A.dtype
        trainable = [self.factors(position) for position in range(len(self.scales))]
        a = [F.pad(f.A, (0, 0, 0, rank - f.rank)).to(dtype) for f in trainable]
        b = [F.pad(f.B, (0, rank - f.rank)).to(dtype) for f in trainable]
        return torch.cat([torch.stack(a), self.frozen_A]), torch.cat([torch.stack(b), self.frozen_B])

    def change(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the chosen adapters add to the layer's output for input ``x`` (rows, ..., in); None for nothing."""
        choice = self.selection.choice
        if choice is None:
            if self.selection.fused is None:
                raise RuntimeError("No adapter is chosen: call the transformer inside `with bank.use(...)`.")
            return None
        if choice.trainable is not None:
            a, b = self.trainable_A[choice.trainable], self.trainable_B[choice.trainable]
            return F.linear(F.linear(x, a.to(x)) * self.scales[choice.trainable], b.to(x))
        if choice.index is None:
            return None
        index = choice.index.to(self.frozen_A.device)
        if index.ndim == 0:
            # index_select, because `frozen_A[index]` would read the index back to the host.
            a, b = (stack.index_select(0, index).squeeze(0).to(x) for stack in (self.frozen_A, self.frozen_B))
            return F.linear(F.linear(x, a), b)
        index = _tiled(index, x.shape[0])
        stacks = (self.frozen_A, self.frozen_B) if choice.frozen else self._stacks()
        a, b = (stack.index_select(0, index).to(x) for stack in stacks)
        rows = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)  # (rows, tokens, in)
        low = torch.bmm(rows, a.transpose(1, 2))  # (rows, tokens, r)
        return torch.bmm(low, b.transpose(1, 2)).reshape(*x.shape[:-1], b.shape[1])


def _tiled(index: torch.Tensor, rows: int) -> torch.Tensor:
    """``index`` (n,) for a batch of k * n rows that repeats its n rows k times, as guidance stacks them."""
    if rows % index.shape[0]:
        raise RequestError(f"{index.shape[0]} rows chose an adapter, but the batch has {rows} rows, no multiple of it.")
    return index.repeat(rows // index.shape[0])


class AdaptedLinear(nn.Linear):
    """A linear layer that adds its rows' adapters. Its own parameters keep their names: the state dict stays stock."""

    _slot: _Slot

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        change = self._slot.change(x)
        return out if change is None else out + change

    def _apply(self, fn: Callable, recurse: bool = True) -> AdaptedLinear:
        # The slot is not in the module tree; `.to(device)`, and with it offloading, has to reach it all the same.
        self._slot._apply(fn, recurse)
        return super()._apply(fn, recurse)


class _Checkpointed:
    """A gradient checkpointing function whose recomputation sees the choice of the first computation."""

    def __init__(self, inner: Callable[..., Any], selection: _Selection) -> None:
        self.inner = inner
        self.selection = selection

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the index is an input of the graph and is kept with the others
            return self.inner(module, *args, **kwargs)
        return self.inner(partial(self._run, self.selection.choice, module), *args, **kwargs)

    def _run(self, choice: _Choice | None, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.selection.holding(choice):
            return module(*args, **kwargs)


class AdapterBank(nn.Module):
    """Adapters on the linear layers of one transformer, chosen row by row.

    ``with bank.use("geneval"): transformer(...)`` computes all rows with one adapter; ``bank.use([...])`` or
    ``bank.select(index)`` give each row its own. An index of n rows serves a batch of k * n rows, taken as k
    repetitions (classifier-free guidance stacks the unconditional rows before the conditional ones). Outside of these a
    forward is an error, unless an adapter is fused.

    The transformer's parameters are frozen, its state dict stays as it was, and ``transformer.to(...)`` takes the
    adapters along. ``bank.parameters()`` are the trainable factors. Gradient checkpointing recomputes with the choice
    of the first computation, wherever ``backward`` is called. Under ``torch.compile`` another index of the same shape
    does not recompile. There is one graph for the base, one for a frozen adapter by name, one for each trainable
    adapter by name, one for mixed rows of frozen adapters and one for those with a trainable one, each with and without
    gradients; where blocks are compiled one by one, also one for each kind of block (SD3.5-Medium has three), so that
    ``torch._dynamo.config.recompile_limit`` (8) may have to grow.

    Args:
        transformer: any module with :class:`torch.nn.Linear` layers.
        adapters: name -> adapter; ranks and covered modules may differ.
        trainable: name -> scale of those that are trained. The change is ``scale * B @ A`` with A and B the parameters:
            the scale (alpha / r, 2 for the public runs) decides how far a step of the optimiser goes, not where the
            adapter starts.

    Raises:
        RequestError: no adapter, one that does not fit (:func:`~flowopd_eval.adapters.check_adapter`), a trainable name
            that is none of them, a layer that is a subclass of Linear or whose forward a hook has replaced, or a
            transformer that has a bank already.
    """

    transformer: nn.Module

    def __init__(
        self, transformer: nn.Module, adapters: Mapping[str, Adapter], trainable: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        trainable = trainable or {}
        unknown = trainable.keys() - adapters.keys()
        if unknown or not adapters:
            raise RequestError(f"No adapter to train by the name {listing(unknown)}." if unknown else "No adapters.")
        for adapter in adapters.values():
            check_adapter(adapter, transformer)
        # Past nn.Module's own registration: a bank is beside the transformer, not around it.
        object.__setattr__(self, "transformer", transformer)
        self.names: tuple[str, ...] = (*trainable, *(name for name in adapters if name not in trainable))
        self._selection = _Selection()
        self._trainable = len(trainable)
        self._ranks = {name: {m: f.rank for m, f in adapters[name].factors.items()} for name in self.names}
        self._positions: dict[tuple[int | tuple[int, ...], torch.device], torch.Tensor] = {}
        self._originals: list[torch.Tensor] = []
        # diffusers marks modules that can checkpoint with this attribute, and sets their function at any later time.
        self._checkpointing: list[Any] = [m for m in transformer.modules() if hasattr(m, "gradient_checkpointing")]
        linears = linear_modules(transformer)
        self.modules_covered = sorted({module for adapter in adapters.values() for module in adapter.factors})
        self._linears = [linears[module] for module in self.modules_covered]
        self.slots = nn.ModuleList(
            self._slot(module, linear, adapters, trainable)
            for module, linear in zip(self.modules_covered, self._linears, strict=True)
        )
        transformer.requires_grad_(False)
        self.attach()

    def _slot(
        self, module: str, linear: nn.Linear, adapters: Mapping[str, Adapter], trainable: Mapping[str, float]
    ) -> _Slot:
        factors = [adapters[name].factors.get(module) for name in self.names]
        blank = Factors(torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0))
        trained = [blank if f is None else f for f in factors[: self._trainable]]
        return _Slot(linear, factors[self._trainable :], trained, list(trainable.values()), self._selection)

    def attach(self) -> None:
        """Put the bank on its transformer (done at the start; needed again after :meth:`detach`)."""
        plain = [type(linear) is nn.Linear for linear in self._linears]
        if not all(plain):
            names = [name for name, ok in zip(self.modules_covered, plain, strict=True) if not ok]
            raise RequestError(
                f"{len(names)} layers are no plain Linear: {listing(names)}. They carry another bank (`detach()` it), "
                "PEFT layers, or are quantised."
            )
        hooked = ["forward" in linear.__dict__ for linear in self._linears]
        if any(hooked):
            names = [name for name, found in zip(self.modules_covered, hooked, strict=True) if found]
            raise RequestError(
                f"{len(names)} layers have a forward that a hook replaced (layerwise casting, sequential offloading), "
                f"past which no adapter is seen: {listing(names)}. Load the adapters first, then enable that."
            )
        for linear, slot in zip(self._linears, self.slots, strict=True):
            # Into __dict__, so that the slot is no submodule and the state dict stays stock.
            linear.__dict__["_slot"] = slot
            linear.__class__ = AdaptedLinear

    def detach(self) -> None:
        """Take the bank off its transformer, which is the stock module again.

        Raises:
            RequestError: an adapter is fused.
        """
        self._refuse_fused("`detach()`")
        for linear in self._linears:
            linear.__class__ = nn.Linear
            del linear.__dict__["_slot"]
        for module in self._checkpointing:
            inner = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(inner, _Checkpointed):
                module._gradient_checkpointing_func = inner.inner

    def index(self, names: Sequence[str | None]) -> torch.Tensor:
        """Index (n,) of the rows' adapters for :meth:`select`, on the bank's device; None is the base.

        Raises:
            RequestError: an unknown name.
        """
        return torch.tensor([self._position(name) for name in names], device=self._device)

    def use(self, names: str | Sequence[str | None] | None) -> Any:
        """Context in which all rows have one adapter (None: the base), or row i of n has ``names[i]``.

        One adapter for all costs a plain low-rank product; a trainable one alone gets gradients.

        Raises:
            RequestError: an unknown name, or another one than the fused.
        """
        rows = [names] if names is None or isinstance(names, str) else list(names)
        positions = [self._position(name) for name in rows]
        fused = self._selection.fused
        if fused is not None and any(name != fused for name in rows):
            raise RequestError(f"Adapter {fused!r} is fused into the weights: `unfuse()` before choosing {rows}.")
        if fused is not None:
            return self._holding(_Choice())
        if len(set(positions)) > 1:
            if any(0 <= position < self._trainable for position in positions):
                return self.select(self.index(rows))
            last = len(self.names) - self._trainable  # where the frozen stack has the base
            places = [last if position < 0 else position - self._trainable for position in positions]
            return self._holding(_Choice(index=self._places(tuple(places)), frozen=True))
        return self._holding(self._uniform(positions[0]))

    def select(self, index: torch.Tensor) -> Any:
        """Context in which row i of n has the adapter ``index[i]`` of :attr:`names`, -1 the base.

        The values are not looked at (no synchronisation): an index out of range is an error of the device. Every
        trainable adapter gets a gradient, zero where no row chose it.

        Args:
            index: integers (n,), from :meth:`index`.

        Raises:
            RequestError: an adapter is fused.
        """
        self._refuse_fused("choosing by index")
        return self._holding(_Choice(index=torch.where(index == -1, len(self.names), index)))

    def forward(self, names: str | Sequence[str | None] | None, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward under ``use(names)``: what DistributedDataParallel wraps is the bank."""
        with self.use(names):
            return self.transformer(*args, **kwargs)

    def adapter(self, name: str) -> Adapter:
        """A copy of an adapter as it is now, fp32 on the CPU, scale inside B (a frozen one in the base's precision)."""
        position = self._position(name)
        factors = {}
        for module, slot in zip(self.modules_covered, self.slots, strict=True):
            rank = self._ranks[name].get(module)
            if rank is not None:
                a, b = (t.detach().to("cpu", torch.float32) for t in slot.factors(position))  # type: ignore[operator]
                factors[module] = Factors(a[:rank].clone(), b[:, :rank].clone())
        return Adapter(factors, source=name, declared={"target_modules": sorted(factors)})

    @torch.no_grad()
    def fuse(self, name: str) -> None:
        """Add an adapter to the base's weights: no cost a forward, and no other choice until :meth:`unfuse`.

        Raises:
            RequestError: an unknown name, an adapter is fused already, or weights stored in fp8 have no room for one.
        """
        self._refuse_fused(f"fusing {name!r}")
        position = self._position(name)
        if any(linear.weight.dtype.itemsize == 1 for linear in self._linears):
            raise RequestError(f"Fusing {name!r} into weights stored in fp8 would round it away: fuse, then store.")
        self._originals = [linear.weight.detach().to("cpu", copy=True) for linear in self._linears]
        for linear, slot in zip(self._linears, self.slots, strict=True):
            a, b = slot.factors(position)  # type: ignore[operator]
            linear.weight.copy_(linear.weight.float() + b.float() @ a.float())
        self._selection.fused = name

    @torch.no_grad()
    def unfuse(self) -> None:
        """Give the transformer its own weights back, bit for bit."""
        for linear, original in zip(self._linears, self._originals, strict=True):
            linear.weight.copy_(original)
        self._originals = []
        self._selection.fused = None

    @property
    def fused(self) -> str | None:
        """Name of the fused adapter."""
        return self._selection.fused

    @property
    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _position(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.names:
            raise RequestError(f"Unknown adapter {name!r}; expected one of {', '.join(self.names)}, or None.")
        return self.names.index(name)

    def _uniform(self, position: int) -> _Choice:
        if position < 0:
            return _Choice()
        if position < self._trainable:
            return _Choice(trainable=position)
        return _Choice(index=self._places(position - self._trainable))

    def _places(self, places: int | tuple[int, ...]) -> torch.Tensor:
        """Places among the frozen, on the bank's device; kept, since to send them the host waits for the device."""
        key = (places, self._device)
        if key not in self._positions:
            if len(self._positions) > 64:
                self._positions.clear()
            self._positions[key] = torch.tensor(places, device=self._device)
        return self._positions[key]

    @contextmanager
    def _holding(self, choice: _Choice) -> Iterator[None]:
        for module in self._checkpointing:
            inner = getattr(module, "_gradient_checkpointing_func", None)
            if inner is not None and not isinstance(inner, _Checkpointed):
                module._gradient_checkpointing_func = _Checkpointed(inner, self._selection)
        with self._selection.holding(choice):
            yield

    def _refuse_fused(self, what: str) -> None:
        if self._selection.fused is not None:
            raise RequestError(
                f"Adapter {self._selection.fused!r} is fused into the weights: `unfuse()` before {what}."
            )
