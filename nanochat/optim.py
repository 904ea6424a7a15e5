"""Muon for the matrices of the blocks and AdamW for everything else, in one sharded optimizer.

There is no DDP wrapper: `step` takes the mean of the gradients over the ranks by reduce-scatter,
each rank updates the shard whose state it keeps, and an all-gather hands the new weights round.
That is one path for gloo and nccl, it holds 1/n of the optimizer state on each of n ranks, and it
makes the weights bit-identical on all ranks, since each element is computed once and copied. (Of
parameters under 1,024 elements every rank keeps all, as upstream does, and updates it from the same
all-reduced gradient.) The collectives of all groups are started before the first is waited for.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.optimizer_shards import Shards

# Polar express (arXiv 2505.16932): the best odd quintic for each of 5 iterations, safety 2e-2.
_POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_STEPS = len(_POLAR_COEFFICIENTS)
_POLAR_SAFETY = 1.01
_PIECE = 1 << 20  # elements of AdamW on a CPU: 86 ms a step at a vocabulary of 32,768, 94 with 2^17
_TINY = 1e-10  # keeps divisions by a norm finite where a gradient is exactly zero


def adamw_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place: decoupled decay first, then the bias-corrected update.

    All tensors are of one shape (n,); moments are fp32, weight and grad may be bf16 (rounded once, at
    the end). On a CPU pieces that fit its caches go through torch's fused kernel one after the other,
    which leaves no temporaries to speak of.
    """
    pieces = [(weight, grad, exp_avg, exp_avg_sq)]
    if weight.device.type == "cpu":
        pieces = list(zip(*(t.split(_PIECE) for t in pieces[0]), strict=True))
    for piece in pieces:
        _adamw_piece(*piece, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adamw_piece(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    beta1, beta2 = betas
    grad, new = grad.float(), weight.float()  # themselves, if they are in fp32
    if weight.device.type == "cpu":
        torch._fused_adamw_(
            [new],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(step))],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
    else:
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        new.mul_(1 - lr * weight_decay)
        new.addcdiv_(exp_avg, deviation, value=-lr / (1 - beta1**step))
    if new is not weight:
        weight.copy_(new)


def equilibrate_rows(x: Tensor) -> Tensor:
    """Scale the rows of each matrix (..., m, n) to the mean of their norms."""
    norms = x.norm(dim=-1, keepdim=True)
    return x * (norms.mean(dim=-2, keepdim=True) / norms.clamp_min(_TINY))


def polar_express(
    x: Tensor, *, dtype: torch.dtype = torch.float32, steps: int = POLAR_STEPS
) -> Tensor:
    """About the orthogonal factor of the polar decomposition of each matrix (..., m, n).

    Iterates `steps` times, at most 5, on the smaller Gram matrix, in `dtype`; bf16 is what the safety
    margin is made for.
    """
    x = x.to(dtype)
    x = x / (_POLAR_SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in _POLAR_COEFFICIENTS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def snap_norm(x: Tensor) -> Tensor:
    """Scale each matrix (..., m, n) to the Frobenius norm of an exactly orthogonal one."""
    target = math.sqrt(min(x.size(-2), x.size(-1)))
    return x * (target / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY))


def reduce_variance(x: Tensor, second_moment: Tensor, *, beta2: float) -> Tensor:
    """NorMuon: even out the rows (columns, if those are more) of an update, keeping its norm.

    x: (..., m, n); second_moment: (..., m, 1) if m >= n, else (..., 1, n), is updated in place.
    """
    mean_square = x.square().mean(dim=_shorter_dim(x.shape), keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    evened = x * second_moment.clamp_min(_TINY).rsqrt()
    norms = [t.norm(dim=(-2, -1), keepdim=True) for t in (x, evened)]
    return evened * (norms[0] / norms[1].clamp_min(_TINY))


def _shorter_dim(shape: torch.Size) -> int:
    return -1 if shape[-2] >= shape[-1] else -2


def muon_update(
    weights: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    polar_dtype: torch.dtype,
    polar_steps: int = POLAR_STEPS,
) -> None:
    """One Muon step in place on a stack of matrices (k, m, n), fp32.

    Nesterov momentum, row equilibration, polar express, norm snap, NorMuon, then the update with
    cautious decay: only weights that the update shrinks anyway are decayed.
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = equilibrate_rows(torch.lerp(grads, momentum_buffer, momentum))
    update = polar_express(update, dtype=polar_dtype, steps=polar_steps)
    update = snap_norm(update.float())
    update = reduce_variance(update, second_moment, beta2=beta2)
    lr = lr * math.sqrt(max(1.0, weights.size(-2) / weights.size(-1)))
    if weight_decay:
        agree = (update * weights) >= 0
        update = update + weight_decay * weights * agree
    weights.sub_(update, alpha=lr)


class MuonAdamW(torch.optim.Optimizer):
    """Groups say `kind`: "adamw" (lr, betas, eps, weight_decay) or "muon" (lr, momentum,
    ns_steps, beta2, weight_decay; matrices of one shape). Every group gets `initial_lr`, for
    schedules: with it, groups have the keys that upstream's have.

    All ranks must call `step` together; a parameter without a gradient on a rank counts as zeros
    there. `state_dict` is this rank's shard: load it on the same rank of as many.
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
        shares = [one for group in self.param_groups for one in _shards(group)]
        for one in shares:
            self._start_reduce(one, world_size)
        for one in shares:
            one.wait()
            self._update(one, rank, world_size)
        for one in shares:
            one.wait()
            if one.everyone is not None:
                one.unpack(one.everyone)

    def _start_reduce(self, one: Shards, world_size: int) -> None:
        chunk = one.chunk(world_size)
        padded = one.count if one.is_whole else chunk * world_size
        one.own_grads = grads = one.pack((p.grad for p in one.params), padded)
        if world_size > 1 and one.is_whole:
            one.work = dist.all_reduce(grads, async_op=True)
        elif world_size > 1:
            one.own_grads = torch.empty_like(grads[:chunk])
            one.work = dist.reduce_scatter_tensor(one.own_grads, grads, async_op=True)

    def _update(self, one: Shards, rank: int, world_size: int) -> None:
        """Update this rank's chunk and start handing it round."""
        assert one.own_grads is not None
        grads, one.own_grads = one.own_grads, None
        chunk = grads.size(0)
        begin, size = one.own(rank, world_size)  # the last ranks may hold padding only
        if world_size > 1:
            grads.div_(world_size)
        if one.is_muon:
            weights = one.pack(one.params[begin : begin + size], chunk)
        else:
            weights = one.params[0][begin : begin + size]
        if size:
            rule = self._muon if one.is_muon else self._adamw
            rule(one, weights, grads, size)
        if world_size == 1 or one.is_whole:
            one.everyone = weights if one.is_muon else None  # AdamW has worked in place
            return
        if not one.is_muon:
            own = torch.zeros_like(grads, dtype=weights.dtype)
            own[:size].copy_(weights)
            weights = own
        one.own_weights = weights
        one.everyone = weights.new_empty((chunk * world_size, *weights.shape[1:]))
        one.work = dist.all_gather_into_tensor(one.everyone, weights, async_op=True)

    def _adamw(self, one: Shards, weights: Tensor, grads: Tensor, size: int) -> None:
        group, state = one.group, self.state[one.params[0]]
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
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _muon(self, one: Shards, weights: Tensor, grads: Tensor, size: int) -> None:
        group, state = one.group, self.state[one.params[0]]
        if not state:  # padding included, as upstream has it
            state["momentum_buffer"] = torch.zeros_like(weights)
            factored = list(weights.shape)
            factored[_shorter_dim(weights.shape)] = 1
            state["second_momentum_buffer"] = weights.new_zeros(factored)
        muon_update(
            weights[:size],
            grads[:size],
            state["momentum_buffer"][:size],
            state["second_momentum_buffer"][:size],
            lr=group["lr"],
            momentum=group["momentum"],
            beta2=group["beta2"],
            weight_decay=group["weight_decay"],
            polar_dtype=self._polar_dtype,
            polar_steps=group["ns_steps"],
        )


def _shards(group: dict[str, Any]) -> list[Shards]:
    """All of a Muon group is one array, each parameter of an AdamW group another."""
    params: list[Tensor] = group["params"]
    arrays = [params] if group["kind"] == "muon" else [[param] for param in params]
    return [Shards(group, array) for array in arrays]


def _fitted_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """The state of a file by parameter, in this rank's shapes; of a Muon group the first has it."""
    state: dict[Tensor, dict[str, Any]] = {}
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        numbers = dict(zip(group["params"], saved["params"], strict=True))
        for one in _shards(group):
            param = one.params[0]
            for name, value in state_dict["state"].get(numbers[param], {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    value = one.fitted(value, *_rank_and_world_size())
                state.setdefault(param, {})[name] = value
    return state


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
