"""The DeepSpeed engine: the module it wraps, its config, and its state as whole tensors.

DeepSpeed shards optimizer state (ZeRO 1), gradients (2) and weights (3) over the ranks. The state is read and written
here as whole fp32 tensors by parameter name, so that checkpoints are independent of stage and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion
from model.methods.registry import method_of
from model.objective import ObjectiveConfig, TrainingBatch
from train.recipe import TrainParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


class Objective(nn.Module):
    """A training step as one module, batch -> losses: the module that the engine wraps.

    Only the adapter is trained. The frozen backbone is not part of the module, so the engine leaves it alone, except
    under ZeRO 3 (`sharded`), which shards everything inside the module and gathers it layer by layer.
    """

    def __init__(self, adapter: Adapter, diffusion: Diffusion, config: ObjectiveConfig, *, sharded: bool) -> None:
        super().__init__()
        self.adapter, self.diffusion, self.config = adapter, diffusion, config
        if sharded:
            self.backbone = nn.ModuleList([diffusion.unet, *diffusion.text_encoders])

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The losses of the adapter's method."""
        losses = method_of(self.adapter.config).losses
        return losses(batch, self.adapter, self.adapter.config, self.diffusion, self.config)


def start_engine(params: TrainParams, objective: Objective, ranks: int, device: torch.device) -> Any:
    """A DeepSpeedEngine around `objective`. Collective."""
    adapter, dtype = objective.adapter.to(device), DTYPES[params.precision]
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    config = engine_config(params, params.rows(ranks), sum(p.numel() for p in adapter.parameters()))
    if params.zero_stage == 3:
        shard(objective, config, dtype, device)
    optimizer = torch.optim.AdamW(
        adapter.parameters(),
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        fused=device.type == "cpu" or None,  # an eighth of the time there; on a GPU torch's own choice is as fast
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    if params.zero_stage == 0 and params.precision != "fp32":
        # DeepSpeed has taken a first step without gradients, which would count in Adam's bias correction.
        optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def shard(objective: Objective, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Shard the frozen backbone's weights over the ranks, one tensor at a time, so that no GPU ever holds them all."""
    # Hooks do not see the tensors in our dataclasses, and need not: every layer inside has its own hooks.
    logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    deepspeed.zero.Init(module=objective.backbone, config_dict_or_path=config, dtype=dtype)
    for buffer in objective.backbone.buffers():
        buffer.data = buffer.data.to(device)
    for text in objective.diffusion.text_encoders:
        # Read for the norm of the class noun's embedding, outside the layer it belongs to.
        embedding: Any = text.get_input_embeddings()
        deepspeed.zero.register_external_parameter(objective, embedding.weight)


def engine_config(params: TrainParams, rows: int, weights: int) -> dict[str, Any]:
    """DeepSpeed's config for `rows` samples per rank and micro step, and `weights` trained parameters."""
    # Buckets are reallocated each step; the default of 500 million elements takes 2 GB for any adapter.
    bucket = min(weights, 50_000_000)
    zero: dict[str, Any] = {
        "stage": params.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if params.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if params.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": params.accumulation,
        "gradient_clipping": params.gradient_clipping,
        "zero_optimization": zero,
        # DeepSpeed's own CPU optimizer would be compiled on first use; torch's does the same arithmetic.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": params.precision == "bf16"},
        "fp16": {"enabled": params.precision == "fp16"},
        "steps_per_print": 10**9,
    }


class TrainedState:
    """Weights, moments, moving average and counters of an engine. All methods are collective."""

    def __init__(self, engine: Any, decay: float | None) -> None:
        """`decay` of the weights' moving average; None: no average."""
        self.engine, self.decay = engine, decay
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.adapter.named_parameters())
        self.masters = masters(engine)
        """This rank's share of the fp32 weights, as the optimizer sees them."""
        self.shadows = [master.detach().clone() for master in self.masters] if decay is not None else None
        """The moving average of each of `masters`."""
        self.whole = unsharded(engine)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside DeepSpeed's wrapper."""
        found: torch.optim.Optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        return found

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Update the moving average after 0-based `step`.

        ema <- d ema + (1 - d) weights with d = min(decay, (2 + step) / (11 + step)): young averages quickly forget the
        initial weights, as in TensorFlow's and diffusers' EMA.
        """
        if self.shadows is None or self.decay is None:
            return
        decay = min(self.decay, (2 + step) / (11 + step))
        for shadow, master in zip(self.shadows, self.masters, strict=True):
            shadow.lerp_(master.detach(), 1 - decay)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole fp32 tensor): `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `ema/NAME`."""
        if not self.optimizer.state:  # e.g. if the loss scaler skipped every step so far
            self._allocate(0.0)
        for name, parameter in self.parameters.items():
            yield f"weight/{name}", self._get(parameter)
            for moment in MOMENTS:
                yield f"{moment}/{name}", self._get(parameter, moment)
        if self.shadows is not None:
            with self.averaged():
                for name, parameter in self.parameters.items():
                    yield f"{EMA}/{name}", self._get(parameter)

    def counts(self) -> dict[str, Any]:
        """Non-tensor state: the optimizer's step count and the fp16 loss scaler."""
        steps = [float(state["step"]) for state in self.optimizer.state.values()]
        return {"steps": steps[0], "scaler": {k: v for k, v in vars(self._scaler()).items() if number(v)}}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """Restore what `read` and `counts` returned, into any engine around the same adapter."""
        self._allocate(counts["steps"])
        if self.shadows is not None:
            for name, parameter in self.parameters.items():
                self._set(parameter, tensors[f"{EMA}/{name}"])
            for shadow, master in zip(self.shadows, self.masters, strict=True):
                shadow.copy_(master)
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                self._set(parameter, tensors[f"{moment}/{name}"], moment)
            self._set(parameter, tensors[f"weight/{name}"])
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensors[f"weight/{name}"].to(parameter.device))
        for name, value in counts["scaler"].items():
            setattr(self._scaler(), name, value)

    def adapter_weights(self, *, ema: bool) -> dict[str, Tensor]:
        """Tensors that `Adapter.save` stores: trained weights, raw or averaged, in training precision, and buffers."""
        adapter = self.engine.module.adapter
        found = {name: buffer.cpu() for name, buffer in adapter.named_buffers()}
        with self.averaged(ema):
            for name, parameter in self.parameters.items():
                found[name] = self._get(parameter).to(parameter.dtype).cpu()
        return {name: found[name] for name in adapter.state_dict()}

    @contextmanager
    def averaged(self, wanted: bool = True) -> Iterator[None]:
        """Inside, the optimizer's weights are the averages; the model's own are untouched."""
        if not wanted or self.shadows is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, master in zip(self.shadows or (), self.masters, strict=True):
            held = master.detach().clone()
            master.copy_(shadow)
            shadow.copy_(held)

    def _get(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        master = self.whole.get(parameter)
        if master is not None:
            found = master if moment is None else self.optimizer.state[master][moment]
            return found.detach().clone()  # the optimizer and `averaged` change it in place
        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        master = self.whole.get(parameter)
        if master is not None:
            (master if moment is None else self.optimizer.state[master][moment]).copy_(value)
        elif hasattr(parameter, "ds_tensor"):  # ZeRO 3 does not pad a whole value if the ranks do not divide it
            part = part_of(value, parameter.ds_tensor.numel(), dist.get_rank())
            if moment is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _allocate(self, steps: float) -> None:
        """Allocate AdamW's state, which otherwise exists only after its first step."""
        for master in self.masters:
            moments = {name: torch.zeros_like(master) for name in MOMENTS}
            self.optimizer.state[master] = {"step": torch.tensor(steps), **moments}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # ZeRO 1 and 2 look moments up through this link
            link()

    def _scaler(self) -> Any:
        wrapper = self.engine.optimizer
        return getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None) or NoScaler()


class NoScaler:
    """Placeholder for an optimizer without loss scaling."""


def masters(engine: Any) -> list[Tensor]:
    """This rank's share of the fp32 weights of the optimizer: flat parts under ZeRO 1 to 3, else whole tensors."""
    wrapper = engine.optimizer
    flat = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # ZeRO 3 exposes them to AdamW one at a time
    return list(flat) if flat is not None else [p for group in wrapper.param_groups for p in group["params"]]


def part_of(value: Tensor, size: int, rank: int) -> Tensor:
    """The `size` elements of `value` that a rank holds, zero-padded past its end."""
    part = value.flatten()[rank * size : (rank + 1) * size]
    return F.pad(part, (0, size - len(part)))


def unsharded(engine: Any) -> dict[nn.Parameter, Tensor]:
    """ZeRO 0: the fp32 weights behind each parameter (in fp32, the parameter itself). Empty from ZeRO 1 on."""
    if engine.zero_optimization_stage() > 0:
        return {}
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    return dict(zip(engine.module.adapter.parameters(), held, strict=True))


def gradient_norm(engine: Any) -> float | None:
    """Gradient norm of the coming step before clipping; None if DeepSpeed reports it after the step."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    if not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.adapter.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def number(value: Any) -> bool:
    """Whether a scaler's attribute is a plain number that JSON can store."""
    return isinstance(value, (bool, int, float))
