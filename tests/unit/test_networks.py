"""The U-Net's shapes and widths, dropout by key, Monte-Carlo passes, and the teacher's moving average."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distseg.config.compose import train_config
from distseg.data.keys import Purpose, torch_generators
from distseg.errors import ConfigError
from distseg.inference.model import build_network
from distseg.networks import stochastic
from distseg.networks.best_class import best_class
from distseg.networks.dropout import KeyedDropout, dropout_active, keyed
from distseg.networks.ema import make_teacher, update_teacher
from distseg.networks.stochastic import add_noise, stochastic_logits
from distseg.networks.unet import UNet3D

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**more: object) -> UNet3D:
    torch.manual_seed(0)
    arguments = {"num_classes": 2, "base_filters": 2, "levels": 2, "dropout_rate": 0.3, **more}
    return UNet3D(**arguments)


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 1, size, size, size, generator=torch.Generator().manual_seed(1))


def convolutions(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]


def keyed_dropouts(network: nn.Module) -> list[KeyedDropout]:
    return [m for m in network.modules() if isinstance(m, KeyedDropout)]


def keys(slots: list[int], passes: int = 1, *, step: int = 1) -> list[torch.Generator]:
    return torch_generators(0, Purpose.TEACHER, step, slots, passes)


# The U-Net


@pytest.mark.parametrize("widening", ["within", "between"])
@pytest.mark.parametrize(("levels", "num_classes"), [(2, 2), (3, 3)])
def test_shapes(widening: str, levels: int, num_classes: int) -> None:
    network = tiny(widening=widening, levels=levels, num_classes=num_classes)
    x = torch.randn(2, 1, 8, 12, 16)
    output = network(x)
    assert output.logits.shape == (2, num_classes, 8, 12, 16)
    assert output.embeddings.shape == (2, 4, 8, 12, 16)  # E = 2 x base_filters
    assert network.embedding_width == 4
    torch.testing.assert_close(network.head(output.embeddings), output.logits)  # the map before the last 1x1x1
    assert network.head.kernel_size == (1, 1, 1)


def test_xie2024_is_half_of_cicek() -> None:
    """Cicek 2016: 32-64, 64-128, 128-256, 256-512 in the encoder, 256, 128, 64 in the decoder; here half of each."""
    config = train_config(cohort="c", run="r", preset="xie2024")
    network = build_network(config.network, num_classes=2)
    encoder = [[conv.out_channels for conv in convolutions(level)] for level in network.encoder]
    assert encoder == [[16, 32], [32, 64], [64, 128], [128, 256]]
    assert [[conv.out_channels for conv in convolutions(level)] for level in network.decoder] == [
        [128, 128],
        [64, 64],
        [32, 32],
    ]
    assert [conv.out_channels for conv in convolutions(network.up)] == [256, 128, 64]  # 2^3 transposed
    assert all(up.kernel_size == up.stride == (2, 2, 2) for up in convolutions(network.up))
    assert network.embedding_width == 32
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    # Dropout after every convolution but the output's: 8 + 3 + 6 of 18.
    assert len(convolutions(network)) == 18
    assert [layer.p for layer in keyed_dropouts(network)] == [0.15] * 17


def test_dropout_in_the_decoder_alone() -> None:
    network = tiny(levels=3, dropout="decoder")
    assert len(keyed_dropouts(network.encoder)) == 0
    assert len(keyed_dropouts(network)) == len(convolutions(network.up)) + len(convolutions(network.decoder)) == 6


def test_dropout_after_the_last_two_convolutions_alone() -> None:
    network = tiny(levels=3, dropout="last")
    assert len(keyed_dropouts(network)) == len(keyed_dropouts(network.decoder[-1])) == 2


def test_he_initialisation() -> None:
    network = tiny(base_filters=16)
    conv = convolutions(network.encoder[1])[1]  # 64 maps of 27 voxels in: sd = sqrt(2 / fan_in)
    fan_in = conv.weight[0].numel()
    assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    assert conv.bias is None  # instance norm would take it out again
    assert float(network.head.bias.detach().abs().max()) == 0.0


def test_no_statistics_cross_samples() -> None:
    network = tiny().double().train()
    for layer in keyed_dropouts(network):
        layer.p = 0.0
    x = images(3).double()
    together = network(x).logits
    alone = torch.cat([network(x[b : b + 1]).logits for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny(activation_checkpointing=checkpointing, dropout_rate=0.0).double()
        network(images(1).double()).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# Dropout


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_rate_and_scale(rate: float) -> None:
    layer = KeyedDropout(rate).train()
    n = 40_000
    with keyed(layer, keys([0])):
        out = layer(torch.ones(1, 1, 1, 1, n, dtype=torch.float64))
    kept = int((out > 0).sum())
    assert abs(kept - (1 - rate) * n) < 5 * (rate * (1 - rate) * n) ** 0.5
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=1e-4)  # the rate is exact to 2^-16
    assert out.mean().item() == pytest.approx(1.0, abs=5 * (rate / (1 - rate) / n) ** 0.5)


def test_masks_are_of_elements_and_independent_in_space() -> None:
    layer = KeyedDropout(0.5).train()
    with keyed(layer, keys([0])):
        dropped = layer(torch.ones(1, 4, 8, 8, 8)) == 0
    for axis in range(1, 5):  # neighbours along any axis agree half of the time
        first, second = (
            dropped.narrow(axis, 0, dropped.shape[axis] - 1),
            dropped.narrow(axis, 1, dropped.shape[axis] - 1),
        )
        agree = (first == second).double()
        assert abs(agree.mean().item() - 0.5) < 5 * 0.5 / agree.numel() ** 0.5


def test_a_samples_masks_do_not_depend_on_its_batch() -> None:
    """Slots 0, 1, 2 together, reversed, and slot 1 alone: slot 1 drops the same units."""
    network = tiny().double().train()
    x = images(3).double()

    def logits(slots: list[int]) -> Tensor:
        with keyed(network, keys(slots)), torch.no_grad():
            return network(x[slots]).logits

    together = logits([0, 1, 2])
    torch.testing.assert_close(logits([2, 1, 0]).flip(0), together, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits([1])[0], together[1], rtol=0, atol=1e-12)
    assert not torch.allclose(together[0], network.eval()(x).logits[0])  # it was on


def test_keyed_is_put_back_and_counts_its_samples() -> None:
    network = tiny().train()
    with pytest.raises(ValueError, match="2 generators for a batch of 3"), keyed(network, keys([0, 1])):
        network(images(3))
    assert all(layer.generators is None for layer in keyed_dropouts(network))


def test_only_dropout_goes_to_train_mode() -> None:
    network = nn.Sequential(tiny(), nn.BatchNorm3d(2), nn.Dropout(0.2), nn.Dropout(0.0)).eval()
    network[2].train()  # whatever the mode was, it is back afterwards
    before = {name: m.training for name, m in network.named_modules()}
    with dropout_active(network):
        inside = {name: m.training for name, m in network.named_modules()}
        changed = {name for name in inside if inside[name] != before[name]}
        dropouts = {name for name, m in network.named_modules() if isinstance(m, KeyedDropout)}
        assert changed == dropouts
        assert all(inside[name] for name in changed)
    assert {name: m.training for name, m in network.named_modules()} == before
    with pytest.raises(KeyError), dropout_active(network):
        raise KeyError
    assert {name: m.training for name, m in network.named_modules()} == before


@pytest.mark.parametrize("network", [tiny(dropout_rate=0.0), nn.Sequential(nn.Dropout(0.0))])
def test_without_dropout_monte_carlo_is_refused(network: nn.Module) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"network\.dropout_rate: .*the network has none; set network\.dropout_rate=0\.15"
        ),
        dropout_active(network),
    ):
        pass


# Monte-Carlo passes


@pytest.mark.parametrize(("dropout", "encoded"), [("all", 6), ("decoder", 2), ("last", 2)])
def test_passes(dropout: str, encoded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the encoder has no dropout it runs once on B images, not on M x B."""
    network = tiny(dropout=dropout).eval()
    calls: list[int] = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda x: calls.append(len(x)) or encode(x))
    x = images(2)
    with torch.inference_mode():
        passes = stochastic_logits(network, x, passes=3, noise_sigma=0.01, generators=keys([0, 1], 3))
    assert calls == [encoded]
    assert passes.shape == (3, 2, 2, 8, 8, 8)
    assert not torch.equal(passes[0], passes[1])
    assert not network.training
    assert not any(layer.training for layer in keyed_dropouts(network))


@pytest.mark.parametrize("dropout", ["all", "decoder", "last"])
def test_passes_belong_to_their_slot(dropout: str) -> None:
    """Pass m of slot s is the same in a batch with others and alone."""
    network = tiny(dropout=dropout).double().eval()
    x = images(2).double()
    arguments = {"passes": 3, "noise_sigma": 0.1}
    together = stochastic_logits(network, x, **arguments, generators=keys([0, 1], 3))
    alone = stochastic_logits(network, x[1:], **arguments, generators=keys([1], 3))
    torch.testing.assert_close(together[:, 1:], alone, rtol=0, atol=1e-12)


def test_passes_by_the_loop() -> None:
    """Each pass is one forward with its own noise, then its own masks, from its own generator."""
    network = tiny().double().eval()
    x = images(2).double()
    together = stochastic_logits(network, x, passes=2, noise_sigma=0.1, noise_clip=0.15, generators=keys([0, 1], 2))
    for number in range(2):
        generators = keys([0, 1], 2)[2 * number : 2 * number + 2]
        noise = torch.stack([torch.randn(x[0].shape, generator=g, dtype=x.dtype) for g in generators])
        with dropout_active(network), keyed(network, generators):
            alone = network(x + (0.1 * noise).clamp(-0.15, 0.15)).logits
        torch.testing.assert_close(together[number], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("widening", ["within", "between"])
@pytest.mark.parametrize("dropout", ["decoder", "last"])
def test_what_passes_share_is_the_network_in_two_parts(dropout: str, widening: str) -> None:
    """Against one whole forward pass a pass, with the same masks. The masks change from pass to pass."""
    network = tiny(dropout=dropout, widening=widening, levels=3, num_classes=3).double().eval()
    x = images(2).double()
    with torch.no_grad(), dropout_active(network):
        shared = network.before_dropout(x)
        passes = []
        for number in range(2):
            generators = keys([0, 1], 2)[2 * number : 2 * number + 2]
            with keyed(network, generators):
                passes.append(network.after_dropout(shared))
            with keyed(network, keys([0, 1], 2)[2 * number : 2 * number + 2]):
                whole = network(x)
            torch.testing.assert_close(passes[-1].logits, whole.logits, rtol=0, atol=1e-12)
            torch.testing.assert_close(passes[-1].embeddings, whole.embeddings, rtol=0, atol=1e-12)
    assert float((passes[0].logits - passes[1].logits).abs().max()) > 1e-3


@pytest.mark.parametrize("dropout", ["all", "decoder", "last"])
@pytest.mark.parametrize(("batch", "at_once", "sizes"), [(1, 1, [2, 3]), (1, 4, [5]), (2, 1, [2] * 5), (2, 4, [4, 6])])
def test_passes_in_groups_are_passes_at_once(
    dropout: str, batch: int, at_once: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`at_once` images at a time. No group has a single image, which would miss the fast convolutions."""
    network = tiny(dropout=dropout).double().eval()
    x = images(batch).double()
    found = []
    for images_at_once in (100, at_once):
        seen: list[int] = []
        hook = network.head.register_forward_hook(lambda _m, given, _out, seen=seen: seen.append(len(given[0])))
        monkeypatch.setitem(stochastic._VOXELS_AT_ONCE, "cpu", images_at_once * 8**3)
        generators = keys(list(range(batch)), 5)
        found.append(stochastic_logits(network, x, passes=5, noise_sigma=0.1, generators=generators))
        hook.remove()
    assert seen == sizes
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_noise() -> None:
    x = torch.zeros(1, 1, 20, 20, 20)
    assert add_noise(x, 0.0) is x
    noise = add_noise(x, 0.1, None, keys([0]))
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    clipped = add_noise(x, 0.1, 0.2, keys([0]))
    assert torch.equal(clipped, noise.clamp(-0.2, 0.2))


def test_passes_without_generators_follow_the_global_one() -> None:
    network, x = tiny().eval(), images(1)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(stochastic_logits(network, x, passes=2, noise_sigma=0.1))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_best_class_is_argmax() -> None:
    """Of equal scores the lowest class, as argmax."""
    scores = torch.randint(0, 3, (2, 4, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(best_class(scores), scores.argmax(1))


# The teacher


def test_ema_by_hand() -> None:
    """Teacher 1, student 3. Step 1, decay 1/2: 1/2 + 3/2 = 2. Student 5, step 2, decay 2/3: 4/3 + 5/3 = 3: so far the
    plain mean of 1, 3 and 5."""
    student = nn.Linear(1, 1, bias=False).double()
    teacher = make_teacher(student)
    teacher.weight.fill_(1.0)
    for step, value, expected in ((1, 3.0, 2.0), (2, 5.0, 3.0)):
        with torch.no_grad():
            student.weight.fill_(value)
        update_teacher(teacher, student, decay=1 - 1 / (step + 1))
        assert teacher.weight.item() == pytest.approx(expected)


def test_ema_is_the_loop_and_copies_buffers() -> None:
    student = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)).double()
    teacher = make_teacher(student)
    assert teacher is not student
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    student(torch.randn(2, 1, 4, 4, 4, dtype=torch.float64))  # moves the running statistics
    expected = {
        n: 0.9 * p + 0.1 * dict(student.named_parameters())[n] for n, p in copy.deepcopy(teacher).named_parameters()
    }
    update_teacher(teacher, student, decay=0.9)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name].detach(), rtol=0, atol=1e-14)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
