"""What makes a step fast on a device changes no result: memory layout, compiling, bfloat16, waiting for nothing."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.config.schema import TrainRunConfig
from distseg.data.keys import Purpose, torch_generators
from distseg.errors import ConfigError
from distseg.losses.supervised import supervised_loss
from distseg.methods.base import At
from distseg.methods.uncertainty import uncertainty_and_label
from distseg.networks.ema import make_teacher
from distseg.networks.stochastic import stochastic_logits
from distseg.networks.unet import UNet3D
from distseg.training import compiled, loop
from distseg.training.allocator import keep_large_buffers
from distseg.training.checkpoint import load_checkpoint
from distseg.training.clock import Clock
from distseg.training.compiled import check_compiler
from distseg.training.local import train_local
from distseg.training.optimizer import load_optimizer, make_optimizer
from distseg.training.precision import resolved_precision
from distseg.training.reduce import FlatGradients, SingleProcess
from distseg.training.setup import open_run
from distseg.training.step import Learner, StepSettings, training_step
from tests.unit.test_methods import SEMI_SUPERVISED, batch_of, make
from tests.unit.test_training import config, newest, rows_of, train, weights_of

CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


pytestmark = pytest.mark.usefixtures("one_thread")


# Layout


def test_channels_last_gives_the_same_run(cohort_path: str, tmp_path: Path) -> None:
    """In float64, five steps with both kinds of term."""
    more = {"train__precision": "float64"}
    train(config(cohort_path, tmp_path / "plain", **more))
    train(config(cohort_path, tmp_path / "last", **more, train__channels_last=True))
    for network in ("student", "teacher"):
        ours, plain = (weights_of(tmp_path / run, network=network) for run in ("last", "plain"))
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-9)
    for ours, expected in zip(rows_of(tmp_path / "last"), rows_of(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_branch_may_change_the_layout(cohort_path: str, tmp_path: Path, first: bool, then: bool) -> None:
    """Adam's fused kernel walks memory in order, so moments must lie as their parameters do, whatever the parent's."""
    more = {"train__precision": "float64", "method": "supervised", "train__steps": 2}
    weights = []
    for name, layouts in (("same", (first, first)), ("other", (first, then))):
        parent, branch = tmp_path / f"{name}-a", tmp_path / f"{name}-b"
        train(config(cohort_path, parent, **more, train__channels_last=layouts[0]))
        train(config(cohort_path, branch, **more, train__init_from=str(parent), train__channels_last=layouts[1]))
        weights.append(weights_of(branch))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-9)


def test_the_network_runs_in_the_layout_it_was_given(cohort_path: str, tmp_path: Path) -> None:
    settings = config(cohort_path, tmp_path / "run", train__channels_last=True, network__base_filters=4)
    open_run(settings)
    learner = loop.start_session(settings, SingleProcess()).learner
    for network in (learner.student, learner.teacher):
        weight = network.decoder[0][1].conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert not weight.is_contiguous()
    for parameter in learner.student.parameters():
        assert parameter.grad.stride() == parameter.stride()


# Compiling

NO_COMPILER = shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch warns of while it compiles is its own
@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("dropout", ["all", "last"])
def test_compiled_networks_give_the_same_losses(cohort_path: str, tmp_path: Path, dropout: str) -> None:
    """With dropout, by the same masks."""
    more = {"network__dropout": dropout, "train__steps": 3}
    train(config(cohort_path, tmp_path / "plain", **more))
    train(config(cohort_path, tmp_path / "compiled", **more, train__compile=True))
    for ours, expected in zip(rows_of(tmp_path / "compiled"), rows_of(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)
    ours, plain = (weights_of(tmp_path / run) for run in ("compiled", "plain"))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ("neither", r"train\.compile: torch\.compile cannot build .*it needs the C\+\+ compiler g\+\+; install it"),
        ("compiler", r"it needs Python's headers"),
    ],
)
def test_compile_without_a_compiler_is_refused_before_a_run_is_made(
    cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, says: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if there == "compiler" else None)
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match=says) as caught:
        train_local(config(cohort_path, tmp_path / "run", train__compile=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    check_compiler(config(cohort_path, tmp_path / "run"))  # nobody asked


# bfloat16


def trained_on_boxes(steps: int) -> UNet3D:
    """A student of the step's own test batches: boxes brighter than noise."""
    torch.manual_seed(0)
    network = UNet3D(num_classes=2, base_filters=4, levels=2, dropout_rate=0.15).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(steps):
        batch = batch_of(step).to(CPU, torch.float32)
        optimizer.zero_grad()
        supervised_loss(network(3 * batch.labelled_image).logits, batch.labelled_target).sum().backward()
        optimizer.step()
    return network


def test_bfloat16_passes_give_the_same_labels() -> None:
    """The teacher's label under autocast is float32's on at least 99.5 % of voxels, by the same masks and noise; its
    entropy moves by little, and both are computed in float32."""
    teacher = make_teacher(trained_on_boxes(60))
    image = torch.cat([3 * batch_of(step, 4).labelled_image for step in range(100, 104)]).float()
    found = []
    for enabled in (False, True):
        generators = torch_generators(0, Purpose.TEACHER, 1, range(len(image)), 5)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = stochastic_logits(teacher, image, passes=5, noise_sigma=0.01, generators=generators)
            assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            found.append(uncertainty_and_label(logits, uncertainty="mean_of_entropies"))
    (entropy, label), (rounded, same) = found
    assert rounded.dtype == torch.float32
    assert (label == same).double().mean().item() >= 0.995
    assert (entropy - rounded).abs().mean().item() < 0.02
    assert 0.01 < (label > 0).double().mean().item() < 0.3  # there is something to label


def test_precision_is_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for there, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda there=there, **_: there)
        assert resolved_precision("auto", gpu) == expected
    assert resolved_precision("auto", CPU) == "float32"
    assert resolved_precision("bfloat16", CPU) == "bfloat16"


def test_a_run_in_bfloat16_keeps_its_weights_in_float32(cohort_path: str, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        train(config(cohort_path, tmp_path / precision, train__precision=precision, train__steps=3))
    checkpoint = load_checkpoint(newest(tmp_path / "bfloat16"))
    assert {t.dtype for t in checkpoint.student.values()} == {torch.float32}
    losses = [[row["loss"] for row in rows_of(tmp_path / precision)] for precision in ("float32", "bfloat16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# Nothing in a step waits for a number


def step_on(device: torch.device, name: str, optimizer: Any) -> None:
    method = make(name)
    batch = batch_of(1).to(device, torch.float32)
    torch.manual_seed(0)
    student = UNet3D(num_classes=2, base_filters=2, levels=2, dropout_rate=0.2).to(device).train()
    learner = Learner(
        student, make_teacher(student), optimizer(student.parameters()), FlatGradients(student.parameters(), slots=2)
    )
    settings = StepSettings(
        seed=0, batch_size=2, slots_per_pass=2, keyed=False, ema_decay=0.99, student_noise_sigma=0.02
    )
    logged = training_step(
        learner, batch, method=method, at=At(2, 3), settings=settings, communicator=SingleProcess(), clock=Clock(CPU)
    )
    assert all(value.device.type == device.type for value in logged.values())


@pytest.mark.parametrize("name", ["supervised", *SEMI_SUPERVISED])
def test_a_step_asks_no_tensor_for_its_value(name: str) -> None:
    """On tensors without data whatever would wait for a GPU raises: item, bool, nonzero, a mask as an index."""
    step_on(torch.device("meta"), name, lambda parameters: torch.optim.RMSprop(parameters, foreach=True))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["supervised", *SEMI_SUPERVISED])
def test_a_step_on_a_gpu_does_not_wait(name: str) -> None:
    device = torch.device("cuda")
    step_on(device, name, lambda parameters: torch.optim.Adam(parameters, fused=True))  # what is done once waits
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_on(device, name, lambda parameters: torch.optim.Adam(parameters, fused=True))
        waited = None
    except RuntimeError as error:  # of the mode set above, which names the call
        waited = str(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert waited is None


# Memory


def test_large_buffers_are_kept() -> None:
    """Where the C library is glibc, as here; a freed buffer above its limit for mappings is there again at once."""
    assert keep_large_buffers() is True


def test_an_optimizer_keeps_its_moments_in_its_parameters_order() -> None:
    weight = torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        parameter = torch.nn.Parameter(weight.to(memory_format=layout).clone())
        settings = TrainRunConfig().optimizer
        optimizer = make_optimizer([parameter], settings)
        FlatGradients([parameter], slots=2)
        for step in range(3):
            if step == 2:  # as if the state came from a run of the other layout
                state = optimizer.state_dict()
                for moment in ("exp_avg", "exp_avg_sq"):
                    state["state"][0][moment] = state["state"][0][moment].contiguous()
                load_optimizer(optimizer, state)
            parameter.grad.zero_()
            (parameter * weight * (step + 1)).sum().backward()
            optimizer.step()
        runs.append(parameter.detach().contiguous())
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-7)


def test_batches_for_a_gpu_are_pinned(cohort_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the batch, by the thread that cuts it; pinning itself is torch's and needs a GPU."""
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: tensor + 1 if tensor.dtype != torch.bool else ~tensor
    )
    settings = config(cohort_path, tmp_path / "run")
    open_run(settings)
    feed = loop.start_session(settings, SingleProcess()).feed
    plain = feed.batch(1)
    feed._pin = True
    pinned = next(feed.ahead(1, 1))
    for name, tensor in plain._tensors():
        expected = tensor + 1 if tensor.dtype != torch.bool else ~tensor
        assert torch.equal(getattr(pinned, name), expected), name
