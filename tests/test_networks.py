"""The networks, their losses, one training step, the optimizers, and what a student edits."""

import copy
import math
import signal
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FINISHED, SCRIPT, TINY, batch, exit_status, flags, one_line, same, table
from matplotlib.figure import Figure
from torch import nn

import dcgan

approx = pytest.approx
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def make(tiny):
    """A function: a Trainer with some constants, whose logits of attributes are not zero."""

    def trainer(dtype=torch.float32, attributes=0, **constants):
        vars(tiny).update(constants)
        made = tiny.Trainer(CPU, dtype, attributes)
        nn.init.normal_(layers(made.discriminator, *CONVOLUTIONS)[-1].weight, 0, 0.1)
        return made

    return trainer


def layers(network, *kinds):
    return [layer for layer in network if isinstance(layer, kinds)]


# ------------------------------------------------------------------------------------ architecture


def test_the_default_networks_are_the_papers():
    def up(inner, outer):
        convolution = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=outer == 3)
        return [nn.BatchNorm2d(inner), nn.ReLU(inplace=True), convolution]

    def down(outer, inner):
        convolution = nn.Conv2d(outer, inner, 4, 2, 1, bias=False)
        return [convolution, nn.BatchNorm2d(inner), nn.LeakyReLU(0.2, inplace=True)]

    first = [nn.Unflatten(1, (100, 1, 1)), nn.ConvTranspose2d(100, 512, 4, bias=False)]
    wanted = [*first, *up(512, 256), *up(256, 128), *up(128, 64), *up(64, 3), nn.Tanh()]
    generator = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    assert list(map(str, generator)) == list(map(str, wanted))
    first = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    wanted = [*first, *down(64, 128), *down(128, 256), *down(256, 512), nn.Conv2d(512, 1, 4)]
    discriminator = dcgan.Discriminator(dcgan.IMAGE_SIZE, dcgan.D_FEATURES, 0)
    assert list(map(str, discriminator)) == list(map(str, [*wanted, nn.Flatten()]))


@pytest.mark.parametrize("size, widest", [(32, 8), (64, 16), (128, 16), (256, 16)])
def test_networks_of_each_size_fit_each_other_and_widen_up_to_eight_times(size, widest):
    generator, discriminator = dcgan.Generator(size, 10, 2), dcgan.Discriminator(size, 2, 0)
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, 3, size, size) and discriminator(images).shape == (2,)
    assert layers(generator, *CONVOLUTIONS)[0].out_channels == widest
    assert layers(discriminator, *CONVOLUTIONS)[-1].in_channels == widest


def test_first_weights_are_normal_with_deviation_0_02_and_gains_around_1(make):
    made = make(G_FEATURES=64)
    for layer in layers(made.generator, *CONVOLUTIONS, nn.BatchNorm2d):
        spread = (layer.weight.detach().flatten() - 1.0 * isinstance(layer, nn.BatchNorm2d)) / 0.02
        found = [spread.mean().item(), spread.std().item()]
        assert found == approx([0, 1], abs=5 / math.sqrt(len(spread)))
        assert layer.bias is None or not layer.bias.any()
    assert same(made.generator.state_dict(), make().generator.state_dict())
    assert not same(made.generator.state_dict(), make(SEED=1).generator.state_dict())


def test_each_attribute_adds_its_logit_times_its_label_and_nothing_at_the_start():
    discriminator = dcgan.Discriminator(32, 4, 2).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    alone = discriminator(images)
    assert torch.equal(discriminator(images, labels), alone), "attribute logits are not zero"
    nn.init.normal_(layers(discriminator, *CONVOLUTIONS)[-1].weight[1:])
    one, two = (discriminator(images, label) - alone for label in torch.eye(2))
    assert one.all() and two.all()
    wanted = alone + labels[:, 0] * one + labels[:, 1] * two
    torch.testing.assert_close(discriminator(images, labels), wanted)


# --------------------------------------------------------------------------------- training step


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_the_loss_keeps_its_gradient_where_the_discriminator_is_sure_and_wrong(target):
    logits = torch.tensor([-100.0, -17.0, 0.0, 17.0, 100.0], requires_grad=True)
    dcgan.bce(logits, target).backward()
    torch.testing.assert_close(logits.grad, (logits.sigmoid() - target) / 5)


STILL = {"LEARNING_RATE": 0, "REAL_LABEL": 0.9, "R1_GAMMA": 30.0}


def descended(made, inputs, with_penalty=False):
    """What a step of networks that stand still measures, and its gradients; both also by hand."""
    generator, discriminator = copy.deepcopy((made.generator, made.discriminator))
    made.step(with_penalty, *inputs)
    weights = [*made.generator.parameters(), *made.discriminator.parameters()]
    measured = [made.totals, *(weight.grad for weight in weights)]

    faces, flips, latents, *changes = inputs
    labels = latents[:, TINY["LATENT_SIZE"] :]
    reals = torch.where(flips, faces.flip(3), faces) / 127.5 - 1
    fakes = generator(latents)
    if changes:
        reals, fakes = map(dcgan.augment, (reals, fakes), changes[0].unbind(1))
    real, fake = discriminator(reals, labels), discriminator(fakes.detach(), labels)
    penalty, means = 0, [real.sigmoid().mean(), fake.sigmoid().mean()]
    loss_d = (0.9 * F.softplus(-real) + 0.1 * F.softplus(real) + F.softplus(fake)).mean()
    if with_penalty:  # each logit by its own image
        discriminator.eval()
        for image, label in zip(reals.split(1), labels.split(1)):
            image.requires_grad_()
            (slope,) = torch.autograd.grad(discriminator(image, label), image, create_graph=True)
            penalty = penalty + dcgan.R1_INTERVAL * dcgan.R1_GAMMA / 2 * slope.square().sum() / 8
    loss_g = F.softplus(-discriminator.train()(fakes, labels)).mean()
    by_hand = [torch.stack([*means, loss_d, loss_g, torch.ones(())]).detach()]
    by_hand += torch.autograd.grad(loss_g, list(generator.parameters()), retain_graph=True)
    by_hand += torch.autograd.grad(loss_d + penalty, list(discriminator.parameters()))
    return measured, by_hand


@pytest.mark.parametrize("attributes", [0, 2], ids=["plain", "labels"])
@pytest.mark.parametrize("with_penalty", [False, True], ids=["losses", "R1"])
def test_a_step_descends_the_papers_losses_and_half_the_r1_penalty(make, with_penalty, attributes):
    trainer, inputs = make(attributes=attributes, **STILL), batch(attributes=attributes)
    torch.testing.assert_close(*descended(trainer, inputs, with_penalty), rtol=1e-3, atol=1e-4)


def test_reals_and_fakes_are_augmented_and_the_generator_learns_through_it(make):
    inputs = [*batch(), torch.linspace(-1, 1, 80).view(8, 2, 5)]
    torch.testing.assert_close(*descended(make(**STILL), inputs), rtol=1e-3, atol=1e-4)


def test_each_fourth_step_has_the_penalty_also_in_a_resumed_run(tiny, monkeypatch):
    step, seen = tiny.Trainer.step, []

    def noted(trainer, with_penalty, *inputs):
        seen.append(with_penalty)
        step(trainer, with_penalty, *inputs)
        if len(seen) == 6:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tiny.Trainer, "step", noted)
    monkeypatch.setattr(tiny, "DISTANCE_IMAGES", 64)
    monkeypatch.setattr(tiny, "save_picture", lambda *about: None)
    assert exit_status(*flags(DATA_DIR="faces")) == 128 + signal.SIGTERM and len(seen) == 6
    assert exit_status(*flags(DATA_DIR="faces")) == 0 and len(seen) == 10
    assert [number for number, penalty in enumerate(seen) if penalty] == [0, 4, 8]


def test_changes_move_images_and_their_colours_as_far_as_they_say():
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    changed = [dcgan.augment(images, change.expand(2, 5)) for change in -torch.eye(5)]
    darker, grey, flat, higher, left = changed
    torch.testing.assert_close(dcgan.augment(images, torch.zeros(2, 5)), images)
    torch.testing.assert_close(darker, images - 0.5)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(images.shape))
    torch.testing.assert_close(flat.std((1, 2, 3)), images.std((1, 2, 3)) / 2)
    torch.testing.assert_close(flat.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(higher, F.pad(images[:, :, 4:], (0, 0, 0, 4)))  # an eighth
    torch.testing.assert_close(left, F.pad(images[..., 4:], (0, 4)))
    one, other = torch.rand(2, 1, 5) * 2 - 1
    both = dcgan.augment(images, torch.cat([one, other]))
    torch.testing.assert_close(both[1:], dcgan.augment(images[1:], other))


def test_each_network_moves_by_its_own_learning_rate(make):
    made = make(LEARNING_RATE=1e-2, D_LEARNING_RATE=1e-4)
    networks = made.generator, made.discriminator
    before = copy.deepcopy(networks)
    made.step(False, *batch())
    for old, new, rate in zip(before, networks, (1e-2, 1e-4)):
        moves = [(a - b).abs().max().item() for a, b in zip(old.parameters(), new.parameters())]
        assert max(moves) == approx(rate, rel=0.05)


def test_a_step_reaches_each_weight_and_touches_nothing_else(make):
    made, inputs = make(), batch()
    kept = copy.deepcopy([inputs, made.average.state_dict(), torch.get_rng_state()])
    made.step(True, *inputs)
    assert same(kept, [inputs, made.average.state_dict(), torch.get_rng_state()])
    for network, forwards in ((made.generator, 1), (made.discriminator, 3)):
        assert all(weight.grad.any() for weight in network.parameters()) and network.training
        # The discriminator's: reals, fakes, and fakes again for the generator
        assert {layer.num_batches_tracked.item() for layer in layers(network, nn.BatchNorm2d)} == {
            forwards
        }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_networks_compute_in_precision_when_they_train_and_when_they_draw(make, dtype):
    made, seen = make(dtype), []
    for layer in layers([*made.generator, *made.discriminator, *made.average], *CONVOLUTIONS):
        layer.register_forward_hook(lambda *about: seen.append(about[-1].dtype))
    made.step(True, *batch())
    images = dcgan.draw(made.average, batch()[-1], dtype)
    assert seen == [dtype] * 4 * (1 + 4 + 1)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


# -------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name, value", [("BETA1", 0.6), ("BETA2", 0.5), ("WEIGHT_DECAY", 0.7)])
def test_the_optimizer_is_adamw_with_this_setting(monkeypatch, name, value):
    monkeypatch.setattr(dcgan, name, value)
    network, rate = nn.Linear(3, 1, bias=False), 0.1
    optimizer = dcgan.adamw(network, rate)
    wanted, first, second = network.weight.detach().clone(), 0, 0
    for step, slopes in enumerate(torch.tensor([[1.0, -2, 3], [-4, 0.5, 1], [2, 2, -2]]), 1):
        network.weight.grad = slopes[None]
        optimizer.step()
        first = dcgan.BETA1 * first + (1 - dcgan.BETA1) * slopes
        second = dcgan.BETA2 * second + (1 - dcgan.BETA2) * slopes**2
        mean, square = first / (1 - dcgan.BETA1**step), second / (1 - dcgan.BETA2**step)
        wanted = wanted * (1 - rate * dcgan.WEIGHT_DECAY) - rate * mean / square.sqrt()
    torch.testing.assert_close(network.weight.detach(), wanted)


def test_gradients_too_small_for_float16_are_scaled(make):
    made, network = make(torch.float16), nn.Linear(4, 1, bias=False)
    with made.autocast():
        output = network(torch.ones(1, 4))
    made.descend(dcgan.adamw(network, 1e-3), output.float().mean() * 1e-8)  # 0 in float16
    torch.testing.assert_close(network.weight.grad, torch.full((1, 4), 1e-8), rtol=0.1, atol=0)


def restored(made, again):
    """`again` with the state of `made`."""
    for name in dcgan.OBJECTS:
        dcgan.restore(getattr(again, name), copy.deepcopy(getattr(made, name).state_dict()))
    again.images = made.images
    return again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_restored_so_the_next_steps_are_the_same(make, dtype):
    made, again = make(dtype, BETA1=0.5), make(dtype)
    made.advance(*batch())
    restored(made, again)
    for trainer in (made, again):
        for weight, moments in trainer.g_optimizer.state.items():
            assert {m.stride() for m in moments.values() if m.dim()} == {weight.stride()}
        trainer.advance(*batch(1))
    for name in dcgan.OBJECTS:
        assert same(getattr(again, name).state_dict(), getattr(made, name).state_dict()), name


def test_the_scale_is_restored_rates_and_betas_are_todays_and_precision_may_change(make):
    made, other = make(torch.float16), make(torch.float32)
    made.advance(*batch())
    made.scaler.update(1024.0)
    again = restored(made, make(torch.float16, LEARNING_RATE=0.25, BETA1=0.5))
    assert again.scaler.get_scale() == 1024
    [group] = again.g_optimizer.param_groups
    assert (group["lr"], group["betas"][0]) == (0.25, 0.5)
    for trainer in (restored(made, other), restored(other, again)):
        trainer.advance(*batch())
        assert all(map(math.isfinite, trainer.take_means().values()))


@pytest.mark.parametrize("share, images", [(0.05, 10**6), (0.1, 312), (1e-9, 8)])
def test_the_averages_half_life_is_the_documented_share_of_the_images(make, share, images):
    made = make(AVERAGE_SHARE=share)
    for weight in made.average.parameters():
        nn.init.normal_(weight, 0, 9)
    before = copy.deepcopy(made.average)
    made.images = images
    made.advance(*batch())
    keep = 0.5 ** (8 / (share * (images + 8)))
    pairs = zip(before.parameters(), made.generator.parameters())
    wanted = [keep * old + (1 - keep) * new.detach() for old, new in pairs]
    torch.testing.assert_close(list(made.average.parameters()), wanted, rtol=1e-5, atol=1e-6)


def test_the_averages_statistics_are_those_of_its_own_activations_whatever_they_were(make):
    average, labels = make(attributes=1).average, torch.tensor([[0.0], [1.0]])
    latents = torch.cat([torch.randn(1_000, TINY["LATENT_SIZE"]), labels.repeat(500, 1)], 1)
    images = []
    for wrong in (0.0, 9.0):
        for layer in layers(average, nn.BatchNorm2d):
            layer.running_mean.fill_(wrong)
        dcgan.refresh_batchnorm(average, labels)
        images.append(average(latents))
    assert torch.equal(*images)
    torch.testing.assert_close(images[0], average.train()(latents), rtol=0, atol=0.1)


# --------------------------------------------------------------------- what a student edits in it

OPTIMIZER = "torch.optim.AdamW(weights, rate, (BETA1, BETA2), **options)"
DOWN = "nn.Conv2d(outer, inner, 4, 2, 1, bias=outer == 3)"
UP = "nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=outer == 3)"
EDITS = {  # what is replaced by what
    "RMSprop": {OPTIMIZER: "torch.optim.RMSprop(weights, rate)"},
    "GroupNorm": {"nn.BatchNorm2d(inner), ": "nn.GroupNorm(4, inner), "}
    | {"nn.BatchNorm2d(inner)]": "nn.GroupNorm(4, inner)]"},
    "spectral_norm": {DOWN: f"nn.utils.parametrizations.spectral_norm({DOWN})"},
    "convolution": {DOWN: f"{DOWN}, nn.Conv2d(inner, inner, 3, padding=1)"},
    "Linear": {"nn.Conv2d(widths[-1], 1 +": "nn.Linear(16 * widths[-1], 1 +"}
    | {" + attributes, 4)": " + attributes)", "last, nn.Flatten())": "nn.Flatten(), last)"},
    "Dropout": {"nn.LeakyReLU(0.2, inplace=True)": "nn.LeakyReLU(0.2), nn.Dropout(0.3)"},
    "Upsample": {UP: "nn.Upsample(scale_factor=2), nn.Conv2d(inner, outer, 3, padding=1)"},
    "loss": {'"loss_d", "loss_g")': '"loss_d", "loss_g", "loss_both")'}
    | {".mean(), loss_d, loss_g]": ".mean(), loss_d, loss_g, loss_d + loss_g]"},
}


@pytest.fixture
def edited(tiny):
    """A function: dcgan.py after an edit of EDITS, as a module with the tiny settings."""

    def module(edit):
        source = SCRIPT.read_text(encoding="utf-8")
        for old, new in EDITS[edit].items():
            assert source.count(old) == 1, f"dcgan.py no longer has: {old}"
            source = source.replace(old, new)
        made = types.ModuleType("edited")
        exec(compile(source, "edited.py", "exec"), vars(made))
        vars(made).update(tiny.setting_values(), MAX_IMAGES=24, DISTANCE_IMAGES=64)
        made.Run.draw_pictures = made.save_picture = lambda *about, **options: None
        return made

    return module


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_trains_resumes_as_if_not_stopped_and_generates(edited, edit):
    module, states = edited(edit), []
    for module.OUTPUT_DIR, ends in (("once", [2]), ("twice", [1, 2])):
        for module.EPOCHS in ends:  # of three steps each
            module.train()
        state = module.read_checkpoint(module.output_path("checkpoint.pt"))
        states.append([state[name] for name in module.OBJECTS if edit != "Dropout"])
    assert same(*states) and state["images"] == 48
    images = module.generate_images(3, seed=1)
    assert images.shape == (3, 3, 32, 32) and images.std() > 0.001


def test_layers_of_other_types_keep_pytorchs_first_weights(edited):
    trainer = edited("GroupNorm").Trainer(CPU, torch.float32, 0)
    gains = [layer.weight for layer in trainer.generator if isinstance(layer, nn.GroupNorm)]
    assert torch.cat(gains).tolist() == [1] * (16 + 8 + 4)


def test_one_more_loss_in_the_tables_is_in_the_metrics_the_bar_and_the_curves(edited, monkeypatch):
    module, bar, curves = edited("loss"), [], []
    monkeypatch.setattr(module.tqdm, "set_postfix", lambda *about, **_: bar.append(about[1]))
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: curves.extend(figure.axes))
    module.train()
    for row in table("output/metrics.csv"):
        assert float(row["loss_both"]) == approx(float(row["loss_d"]) + float(row["loss_g"]), 1e-4)
    module.draw_losses(Path("losses.png"), [{"images": 8, "loss_both": 2}], [])
    assert "loss_both" in bar[0] and "loss_both" in curves[0].get_legend_handles_labels()[1]


@pytest.mark.parametrize("edit, said", [("RMSprop", "optimizer"), ("convolution", "changed")])
def test_a_checkpoint_of_the_file_before_its_edit_is_refused(edited, copied, capsys, edit, said):
    status = edited(edit).main(flags(**FINISHED | {"EPOCHS": 4, "MAX_IMAGES": None}))
    assert status == 2 and one_line(capsys.readouterr().err, said)


def test_a_run_goes_on_when_one_more_loss_is_measured(edited, copied):
    assert edited("loss").main(flags(**FINISHED | {"EPOCHS": 4, "MAX_IMAGES": None})) == 0
    assert float(table("output/metrics.csv")[-1]["loss_both"]) > 0
