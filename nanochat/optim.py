"""Muon for the matrices of the blocks and AdamW for everything else, in one sharded optimizer.

There is no DDP wrapper: `step` averages the gradients over the ranks by reduce-scatter, each rank
updates the shard whose state it keeps, and an all-gather distributes the new weights. That is one
path for gloo and nccl, it holds 1/n of the optimizer state on each of n ranks, and it makes the
weights bit-identical on all ranks, since each element is computed once and copied. (Every rank keeps
parameters under 1,024 elements whole, as upstream does, and updates them from the same all-reduced
gradient.) The collectives of all groups are started before the first is waited for. The
rules themselves are in `update_rules`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.optimizer_shards import ShardedArray
from nanochat.update_rules import AdamWRule, MuonRule, adamw_update, muon_update, shorter_dim

_STATE_BYTES = 4  # all moments are fp32


class MuonAdamW(torch.optim.Optimizer):
    """Groups say `kind`: "adamw" (lr, betas, eps, weight_decay) or "muon" (lr, momentum,
    ns_steps, beta2, weight_decay; matrices of one shape). Every group gets `initial_lr`, for
    schedules: with it, groups have the keys that upstream's have.

    All ranks must call `step` together; a parameter without a gradient on a rank counts as zeros
    there. `state_dict` is this rank's shard: load it on the same rank of as many, or all of them,
    through `recut`, on any number.
    """

    def __init__(
        self, param_groups: list[dict[str, Any]], *, polar_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(param_groups, defaults={})
        self._polar_dtype = polar_dtype

    # torch's own forms of the next four methods first import its compiler: 1.3 s of every process

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**param_group, "params": list(param_group["params"])}
        if group["kind"] not in ("adamw", "muon"):
            raise ValueError(f"unknown kind of parameter group: {group['kind']!r}")
        if group["kind"] == "muon" and len({p.shape for p in group["params"]}) != 1:
            raise ValueError("the matrices of a muon group must have one shape")
        group.setdefault("initial_lr", group["lr"])
        self.param_groups.append(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or fill them with zeros."""
        for param in self._params():
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad = torch.zeros_like(param.grad)

    def state_dict(self) -> dict[str, Any]:
        """In torch's form: state by the parameter's number, groups with numbers for parameters."""
        numbers = {id(param): i for i, param in enumerate(self._params())}
        groups = [
            {**group, "params": [numbers[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]
        state = {numbers[id(param)]: dict(values) for param, values in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a shard saved by the same rank of as many, ours or upstream's; moments stay (or
        become) fp32. What a group of the file does not say (`ns_steps`, once) stays as it is.

        Raises ValueError if the groups or the moments are not of the same sizes.
        """
        saved = state_dict["param_groups"]
        sizes = [
            [len(group["params"]) for group in groups] for groups in (saved, self.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(f"groups of {sizes[0]} parameters do not fit groups of {sizes[1]}")
        state = _fitted_state(self.param_groups, state_dict)
        self.state.clear()
        for param, values in state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    value = value.to(param.device, torch.float32, copy=True)
                self.state[param][name] = value
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({**values, "params": group["params"]})

    def recut(
        self, shards: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """The shard of `rank` of `world_size`, from all shards of a run of `len(shards)` ranks.

        Nothing is computed: the numbers are those that were saved. Raises ValueError if they do not fit.
        """
        groups = shards[0]["param_groups"]
        state: dict[int, dict[str, Any]] = {}
        for group, saved in zip(self.param_groups, groups, strict=True):
            numbers = dict(zip(group["params"], saved["params"], strict=True))
            for array in _arrays(group):
                number = numbers[array.params[0]]
                parts = [shard["state"].get(number, {}) for shard in shards]
                if cut := _recut(array, parts, rank, world_size):
                    state[number] = cut
        return {"state": state, "param_groups": groups}

    def state_bytes(self, world_size: int = 1) -> int:
        """Of the first of `world_size` ranks, which has the largest share, once it has a state."""
        arrays = [array for group in self.param_groups for array in _arrays(group)]
        return sum(_state_elements(array, world_size) for array in arrays) * _STATE_BYTES

    def fits(self, state: dict[int, dict[str, Any]]) -> bool:
        """Whether `state`, by the parameter's number, is one of this rank of as many."""
        try:
            _fitted_state(self.param_groups, self.state_dict() | {"state": state})
        except ValueError:
            return False
        return True

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        rank, world_size = _rank_and_world_size()
        arrays = [array for group in self.param_groups for array in _arrays(group)]
        for array in arrays:
            self._start_reduce(array, world_size)
        for array in arrays:
            array.wait()
            self._update(array, rank, world_size)
        for array in arrays:
            array.wait()
            if array.gathered is not None:
                array.unpack(array.gathered)

    def _start_reduce(self, array: ShardedArray, world_size: int) -> None:
        chunk = array.chunk_size(world_size)
        padded = array.count if array.is_whole else chunk * world_size
        array.grads = grads = array.pack((p.grad for p in array.params), padded)
        if world_size > 1 and array.is_whole:
            array.work = dist.all_reduce(grads, async_op=True)
        elif world_size > 1:
            array.grads = torch.empty_like(grads[:chunk])
            array.work = dist.reduce_scatter_tensor(array.grads, grads, async_op=True)

    def _update(self, array: ShardedArray, rank: int, world_size: int) -> None:
        """Update this rank's chunk and start sending it to the others."""
        assert array.grads is not None
        grads, array.grads = array.grads, None
        chunk = grads.size(0)
        begin, size = array.chunk_of(rank, world_size)  # the last ranks may hold padding only
        if world_size > 1:
            grads.div_(world_size)
        if array.is_muon:
            weights = array.pack(array.params[begin : begin + size], chunk)
        else:
            weights = array.params[0][begin : begin + size]
        if size:
            rule = self._muon if array.is_muon else self._adamw
            rule(array, weights, grads, size)
        if world_size == 1 or array.is_whole:
            array.gathered = weights if array.is_muon else None  # AdamW has worked in place
            return
        if not array.is_muon:
            padded = torch.zeros_like(grads, dtype=weights.dtype)
            padded[:size].copy_(weights)
            weights = padded
        array.sent = weights
        array.gathered = weights.new_empty((chunk * world_size, *weights.shape[1:]))
        array.work = dist.all_gather_into_tensor(array.gathered, weights, async_op=True)

    def _adamw(self, array: ShardedArray, weights: Tensor, grads: Tensor, size: int) -> None:
        group, state = array.group, self.state[array.params[0]]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weights, dtype=torch.float32)
        state["step"] += 1
        adamw_update(
            weights.view(-1),
            grads[:size].view(-1),
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            step=int(state["step"]),
            rule=AdamWRule(
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            ),
        )

    def _muon(self, array: ShardedArray, weights: Tensor, grads: Tensor, size: int) -> None:
        group, state = array.group, self.state[array.params[0]]
        if not state:  # padding included, as upstream has it
            state["momentum_buffer"] = torch.zeros_like(weights)
            factored = list(weights.shape)
            factored[shorter_dim(weights.shape)] = 1
            state["second_momentum_buffer"] = weights.new_zeros(factored)
        muon_update(
            weights[:size],
            grads[:size],
            state["momentum_buffer"][:size],
            state["second_momentum_buffer"][:size],
            MuonRule(
                lr=group["lr"],
                momentum=group["momentum"],
                beta2=group["beta2"],
                weight_decay=group["weight_decay"],
                polar_dtype=self._polar_dtype,
                polar_steps=group["ns_steps"],
            ),
        )


def _arrays(group: dict[str, Any]) -> list[ShardedArray]:
    """All of a Muon group is one array, each parameter of an AdamW group another."""
    params: list[Tensor] = group["params"]
    together = [params] if group["kind"] == "muon" else [[param] for param in params]
    return [ShardedArray(group, members) for members in together]


def _state_elements(array: ShardedArray, world_size: int) -> int:
    """Of rank 0: two moments of AdamW, or Muon's momentum and its factored second moment, padding included."""
    if not array.is_muon:
        return 2 * array.chunk_of(0, world_size)[1] * array.item_shape.numel()
    factored = list(array.item_shape)
    factored[shorter_dim(array.item_shape)] = 1
    return array.chunk_size(world_size) * (array.item_shape.numel() + math.prod(factored))


def _fitted_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """The state of a file by parameter, in this rank's shapes; of a Muon group the first has it."""
    state: dict[Tensor, dict[str, Any]] = {}
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        numbers = dict(zip(group["params"], saved["params"], strict=True))
        for array in _arrays(group):
            param = array.params[0]
            for name, value in state_dict["state"].get(numbers[param], {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    value = array.fitted(value, *_rank_and_world_size())
                state.setdefault(param, {})[name] = value
    return state


def _recut(
    array: ShardedArray, parts: Sequence[dict[str, Any]], rank: int, world_size: int
) -> dict[str, Any]:
    """One array's state by name; empty where the rank has no items."""
    cut: dict[str, Any] = {}
    if not array.chunk_of(rank, world_size)[1]:
        return cut
    for name, value in next((part for part in parts if part), {}).items():
        if isinstance(value, Tensor) and value.dim() > 0:
            value = array.recut([part.get(name) for part in parts], rank, world_size)
        cut[name] = value
    return cut


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
