"""The student and its heads as they start, and as they go on from a checkpoint: this run's, or that of its parent."""

from __future__ import annotations

import torch
from torch import nn

from distseg.config.schema import TrainRunConfig
from distseg.data.keys import Purpose, torch_seed
from distseg.inference.model import build_network
from distseg.methods.base import Method
from distseg.networks.unet import UNet3D
from distseg.training.checkpoint import Checkpoint
from distseg.training.optimizer import load_optimizer
from distseg.training.step import Learner


def new_networks(
    config: TrainRunConfig, method: Method, *, device: torch.device, dtype: torch.dtype
) -> tuple[UNet3D, nn.Module | None]:
    """The student, and its heads where the method has some. Both draw under keys of their own, so every method's
    student starts from the same weights."""
    torch.manual_seed(torch_seed(config.seed, Purpose.INITIAL_WEIGHTS))
    student = build_network(
        config.network,
        num_classes=method.num_classes,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    torch.manual_seed(torch_seed(config.seed, Purpose.HEAD_WEIGHTS))
    heads = method.make_heads(student)
    for network in (student, *([heads] if heads is not None else [])):
        network.to(device=device, dtype=dtype)
        if config.train.channels_last:
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch types 4-D only
    return student, heads


def take_over(learner: Learner, checkpoint: Checkpoint, *, branched: bool) -> None:
    """Go on from a checkpoint. A branch takes its parent's student, as teacher too, and the student's moments; heads
    are not handed down: they start from their own draw with no moments, whatever the parent had beside its student."""
    learner.student.load_state_dict(checkpoint.student)
    learner.teacher.load_state_dict(checkpoint.student if branched else checkpoint.teacher)
    state = checkpoint.optimizer
    if branched:
        shared = len(list(learner.student.parameters()))  # the first of the optimizer's
        moments = {index: value for index, value in state["state"].items() if index < shared}
        ours = learner.optimizer.state_dict()["param_groups"]
        groups = [{**theirs, "params": own["params"]} for theirs, own in zip(state["param_groups"], ours, strict=True)]
        state = {"state": moments, "param_groups": groups}
    elif learner.heads is not None:
        learner.heads.load_state_dict(checkpoint.heads)
    load_optimizer(learner.optimizer, state)
