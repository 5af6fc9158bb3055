"""The networks, their loss, one training step, and the average of the generator."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, batch
from torch import nn

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
CPU = torch.device("cpu")


def shapes(network, *inputs):
    """The shapes that leave each convolution."""
    seen = []
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            module.register_forward_hook(lambda *about: seen.append(tuple(about[-1].shape[1:])))
    return network(*inputs), seen


def frozen(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(before, network, names=None):
    now = network.state_dict()
    return all(torch.equal(before[name], now[name]) for name in names or before)


def trainer(dcgan, dtype=torch.float32, **constants):
    for name, value in constants.items():
        setattr(dcgan, name, value)
    return dcgan.Trainer(CPU, dtype)


# ------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_layers_double_from_4_x_4_to_the_image_and_back(tiny, size):
    images, up = shapes(tiny.Generator(size, 10, 4).eval(), torch.randn(2, 10, 1, 1))
    logits, down = shapes(tiny.Discriminator(size, 4).eval(), images)
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1 and logits.shape == (2,)
    inner = up[:-1]
    assert [side for _, side, _ in up] == [2**level for level in range(2, size.bit_length())]
    assert inner[-1][0] == 4 and max(width for width, *_ in inner) == min(32, size // 2)
    for (before, *_), (after, *_) in itertools.pairwise(inner):
        assert before in (after, 2 * after)
    assert down == [*inner[::-1], (1, 1, 1)]


def test_the_defaults_are_the_papers_networks():
    import dcgan

    generator = dcgan.Generator(dcgan.IMAGE_SIZE, dcgan.LATENT_SIZE, dcgan.G_FEATURES)
    discriminator = dcgan.Discriminator(dcgan.IMAGE_SIZE, dcgan.D_FEATURES)
    images, up = shapes(generator, torch.randn(2, 100, 1, 1))
    _, down = shapes(discriminator, images)
    assert up == [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (3, 64, 64)]
    assert down == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (1, 1, 1)]
    count = [sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)]
    # the well-known counts, and biases where no BatchNorm follows
    assert count == [3_576_704 + 3, 2_765_568 + 64 + 1]


@pytest.mark.parametrize("size", [32, 256])
def test_details_are_the_papers(tiny, size):
    generator, discriminator = tiny.Generator(size, 10, 4), tiny.Discriminator(size, 4)
    for network in (generator, discriminator):
        layers = [layer for layer in network.modules() if not list(layer.children())]
        for layer, following in itertools.pairwise([*layers, None]):
            if isinstance(layer, CONVOLUTIONS):
                normed = isinstance(following, nn.BatchNorm2d)
                assert layer.kernel_size == (4, 4) and (layer.bias is None) == normed
                inner = 1 not in (layer.in_channels, layer.out_channels) and layer.in_channels != 10
                assert not inner or (layer.stride, layer.padding) == ((2, 2), (1, 1))
            if isinstance(layer, nn.LeakyReLU):
                assert layer.negative_slope == 0.2
        first, *_, last = [layer for layer in layers if isinstance(layer, CONVOLUTIONS)]
        assert (last if network is generator else first).bias is not None and last.bias is not None
    kinds = [{type(layer) for layer in network.modules()} for network in (generator, discriminator)]
    assert {nn.ReLU, nn.Tanh} <= kinds[0] and nn.LeakyReLU not in kinds[0]
    # logits, not probabilities
    assert nn.LeakyReLU in kinds[1] and not {nn.ReLU, nn.Sigmoid} & kinds[1]


def test_first_weights_are_normal_with_deviation_0_02(tiny):
    made = trainer(tiny, IMAGE_SIZE=64, LATENT_SIZE=100, G_FEATURES=64, D_FEATURES=64)
    for network in (made.generator, made.discriminator):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        gains = torch.cat([module.weight.detach() for module in norms])
        for module in network.modules():
            if isinstance(module, CONVOLUTIONS):
                spread = module.weight.detach() / 0.02
                loose = 6 / math.sqrt(spread.numel())
                assert spread.mean().item() == pytest.approx(0, abs=loose)
                assert spread.std().item() == pytest.approx(1, abs=loose)
                within = (spread.abs() < 1).float().mean().item()
                assert within == pytest.approx(0.6827, abs=loose)  # not uniform
            if getattr(module, "bias", None) is not None:
                assert not module.bias.any()
        assert gains.mean().item() == pytest.approx(1, abs=0.004)
        assert gains.std().item() == pytest.approx(0.02, rel=0.15)
    assert equal(frozen(made.generator), trainer(tiny).generator)  # SEED decides
    assert not equal(frozen(made.generator), trainer(tiny, SEED=1).generator)


# --------------------------------------------------------------------------------------------- loss


def assert_gradients(network, wanted):
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_loss_keeps_its_gradient_where_the_discriminator_is_sure_and_wrong(tiny):
    for target in (0.0, 1.0):
        logits = torch.tensor([-100.0, -17.0, 0.0, 17.0, 100.0], requires_grad=True)
        loss = tiny.bce(logits, target)
        loss.backward()
        torch.testing.assert_close(loss, F.softplus(logits * (1 - 2 * target)).mean())
        assert torch.allclose(logits.grad, (logits.sigmoid() - target) / 5)
        assert (logits.grad.abs()[[0, 1] if target else [3, 4]] > 0.19).all()


def test_a_step_descends_the_papers_losses_with_non_saturating_generator(tiny):
    # Both networks stand still: all can be computed again.
    made = trainer(tiny, LEARNING_RATE=0, REAL_LABEL=0.9)
    generator, discriminator = copy.deepcopy(made.generator), copy.deepcopy(made.discriminator)
    faces, flips, latents = batch()
    made.step(faces, flips, latents)

    reals = torch.where(flips, faces.flip(3), faces) / 127.5 - 1
    fakes = generator(latents)
    real, fake = discriminator(reals), discriminator(fakes.detach())
    loss_d = F.binary_cross_entropy(real.sigmoid(), torch.full((8,), 0.9))
    loss_d = loss_d - (1 - fake.sigmoid()).log().mean()
    loss_d.backward()
    of_d = [p.grad.clone() for p in discriminator.parameters()]
    loss_g = -discriminator(fakes).sigmoid().log().mean()
    loss_g.backward()
    wanted = [loss_d, loss_g, real.sigmoid().mean(), fake.sigmoid().mean(), torch.tensor(1.0)]
    torch.testing.assert_close(made.totals, torch.stack(wanted).detach(), rtol=1e-4, atol=1e-5)
    assert_gradients(made.discriminator, of_d)
    assert_gradients(made.generator, [p.grad for p in generator.parameters()])


def test_the_penalty_is_the_squared_gradient_of_each_logit_by_its_own_image(tiny):
    made = trainer(tiny, LEARNING_RATE=0, R1_GAMMA=3.0)
    discriminator = copy.deepcopy(made.discriminator)
    faces, flips, latents = batch()
    fakes = copy.deepcopy(made.generator)(latents).detach()
    made.step(faces, flips, latents, with_penalty=True)

    reals = torch.where(flips, faces.flip(3), faces) / 127.5 - 1
    loss = F.softplus(-discriminator(reals)).mean() + F.softplus(discriminator(fakes)).mean()
    torch.testing.assert_close(made.totals[0], loss.detach())  # the penalty is not shown
    discriminator.eval()
    for image in reals.split(1):
        image.requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(image), image, create_graph=True)
        loss = loss + tiny.R1_INTERVAL * 3.0 / 2 * slope.square().sum() / len(reals)
    wanted = torch.autograd.grad(loss, list(discriminator.parameters()))
    assert_gradients(made.discriminator, wanted)


@pytest.mark.parametrize("gamma, penalties", [(0.1, 2), (0, 0)])
def test_the_penalty_comes_in_every_so_many_steps_also_after_resuming(
    tiny, monkeypatch, gamma, penalties
):
    made = trainer(tiny, R1_GAMMA=gamma)
    monkeypatch.setattr(tiny, "R1_INTERVAL", 4)
    made.images = 7 * tiny.BATCH_SIZE  # as a checkpoint may have left it
    steps, penalty = [], made.gradient_penalty

    def noted(*inputs):
        steps.append(made.images // tiny.BATCH_SIZE)
        return penalty(*inputs)

    monkeypatch.setattr(made, "gradient_penalty", noted)
    for number in range(7):
        made.advance(*batch(number))
    assert steps == [8, 12][:penalties]


# ------------------------------------------------------------------------------------- augmentation


def test_changes_move_images_and_their_colours_as_far_as_they_say(tiny):
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    def changed(**values):
        names = ("brightness", "saturation", "contrast", "down", "right")
        return tiny.augment(images, torch.tensor([[values.get(name, 0.0) for name in names]] * 2))

    torch.testing.assert_close(changed(), images)
    torch.testing.assert_close(changed(brightness=-1), images - 0.5)
    torch.testing.assert_close(
        changed(saturation=-1), images.mean(1, keepdim=True).expand(images.shape)
    )
    half = changed(contrast=-1)
    torch.testing.assert_close(half.std((1, 2, 3)), images.std((1, 2, 3)) / 2)
    torch.testing.assert_close(half.mean((1, 2, 3)), images.mean((1, 2, 3)))
    moved = changed(down=1, right=-0.5)  # by 4 and -2 of 32 pixels
    torch.testing.assert_close(moved[..., 4:, :-2], images[..., :-4, 2:])
    assert not moved[..., :4, :].any() and not moved[..., -2:].any()


def test_each_image_has_its_own_changes_and_gradients_find_their_way_back(tiny):
    images = torch.rand(8, 3, 32, 32, dtype=torch.double, requires_grad=True)
    changes = torch.rand(8, 5, dtype=torch.double) * 2 - 1
    whole = tiny.augment(images, changes)
    for index in range(8):
        alone = tiny.augment(images[index : index + 1], changes[index : index + 1])
        torch.testing.assert_close(whole[index], alone[0])
    weights = torch.rand_like(whole)
    (slope,) = torch.autograd.grad((whole * weights).sum(), images)
    direction = torch.rand_like(images) - 0.5
    difference = tiny.augment(images + direction, changes) - whole  # it is linear in the images
    torch.testing.assert_close((slope * direction).sum(), (difference * weights).sum())


def test_the_discriminator_sees_reals_and_fakes_changed_and_the_generator_learns_through_it(tiny):
    made = trainer(tiny, LEARNING_RATE=0)
    generator, discriminator = copy.deepcopy(made.generator), copy.deepcopy(made.discriminator)
    faces, flips, latents = batch()
    changes = torch.rand(8, 2, 5) * 2 - 1
    made.step(faces, flips, latents, changes=changes)

    reals = torch.where(flips, faces.flip(3), faces) / 127.5 - 1
    fakes = tiny.augment(generator(latents), changes[:, 1])
    real, fake = discriminator(tiny.augment(reals, changes[:, 0])), discriminator(fakes.detach())
    loss_d = F.softplus(-real).mean() + F.softplus(fake).mean()
    loss_d.backward()
    of_d = [p.grad.clone() for p in discriminator.parameters()]
    loss_g = F.softplus(-discriminator(fakes)).mean()
    loss_g.backward()
    torch.testing.assert_close(made.totals[:2], torch.stack([loss_d, loss_g]).detach())
    assert_gradients(made.discriminator, of_d)
    assert_gradients(made.generator, [p.grad for p in generator.parameters()])


# --------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("size", [32, 128])
def test_gradient_reaches_every_parameter(tiny, size):
    made = trainer(tiny, IMAGE_SIZE=size)
    made.step(*batch(size=size))
    for network in (made.generator, made.discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad and parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("moving", ["generator", "discriminator"])
def test_the_step_of_one_network_leaves_the_other_alone(tiny, moving):
    rates = (1e-3, 0) if moving == "generator" else (0, 1e-3)
    made = trainer(tiny, LEARNING_RATE=rates[0], D_LEARNING_RATE=rates[1])
    before = {name: frozen(getattr(made, name)) for name in ("generator", "discriminator")}
    for number in range(3):
        made.step(*batch(number))
    for name, tensors in before.items():
        network = getattr(made, name)
        for parameter, _ in network.named_parameters():
            assert equal(tensors, network, [parameter]) == (name != moving), (name, parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_penalty", [False, True])
def test_a_step_touches_nothing_else(tiny, dtype, with_penalty):
    made = trainer(tiny, dtype)
    inputs, average = batch(), frozen(made.average)
    state, images = torch.get_rng_state(), made.images
    kept = [tensor.clone() for tensor in inputs]
    made.step(*inputs, with_penalty=with_penalty)
    assert all(torch.equal(*pair) for pair in zip(inputs, kept)) and equal(average, made.average)
    assert torch.equal(state, torch.get_rng_state()) and made.images == images
    assert made.generator.training and made.discriminator.training and not made.average.training
    for network in (made.generator, made.discriminator):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in made.average.parameters())
    statistics = [m for m in made.discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    # real, fake, and fake again for the generator
    assert {module.num_batches_tracked.item() for module in statistics} == {3}


def test_a_learning_rate_that_is_changed_counts_from_the_next_step(tiny):
    made = trainer(tiny)
    made.advance(*batch())
    made.generator_optimizer.adamw.param_groups[0]["lr"].zero_()
    before = frozen(made.generator)
    made.advance(*batch(1))
    names = [name for name, _ in made.generator.named_parameters()]
    assert equal(before, made.generator, names)


def test_steps_follow_from_the_seed_and_the_batches_alone(tiny):
    made = trainer(tiny)
    torch.rand(99)
    again = trainer(tiny)
    for number in range(3):
        made.advance(*batch(number))
        torch.rand(99)
        again.advance(*batch(number))
    for name in ("generator", "discriminator", "average"):
        assert equal(frozen(getattr(made, name)), getattr(again, name))


def test_weights_and_what_the_optimizers_keep_are_channels_last(tiny):
    made = trainer(tiny)
    made.advance(*batch())
    for network in ("generator", "discriminator"):
        optimizer = getattr(made, f"{network}_optimizer").adamw
        for parameter in getattr(made, network).parameters():
            moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            for tensor in (parameter, *moments) if parameter.dim() == 4 else ():
                assert tensor.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------ average


@pytest.mark.parametrize("share, images", [(0.01, 10**4), (0.05, 10**6), (0.05, 312), (0, 10**6)])
def test_the_average_covers_the_weights_with_the_documented_half_life(tiny, share, images):
    made = trainer(tiny, AVERAGE_SHARE=share)
    with torch.no_grad():
        for parameter in made.average.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 9)
    made.images = images
    wanted = {name: tensor.clone() for name, tensor in made.average.named_parameters()}
    for number in range(4):
        made.advance(*batch(number))
        documented = share * (images + 8 * (number + 1))
        keep = 0.5 ** (8 / documented) if documented else 0
        for name, tensor in made.generator.named_parameters():
            wanted[name] = keep * wanted[name] + (1 - keep) * tensor
    assert made.images == images + 32
    for name, tensor in made.average.named_parameters():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_averages_statistics_are_those_of_its_own_activations_and_follow_from_its_weights(tiny):
    made = trainer(tiny, G_FEATURES=16)
    for number in range(4):
        made.advance(*batch(number))
    refreshed = copy.deepcopy(tiny.refresh_batchnorm(made.average))
    torch.rand(7)
    for module in made.average.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(9)
            module.running_var.fill_(9)
    tiny.refresh_batchnorm(made.average)
    assert equal(frozen(refreshed), made.average) and not refreshed.training
    norms = [module for module in refreshed.modules() if isinstance(module, nn.BatchNorm2d)]
    seen = []
    for module in norms:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    refreshed(torch.randn(2_000, TINY["LATENT_SIZE"], 1, 1))
    for module, output in zip(norms, seen, strict=True):  # normalised: only gain and bias are left
        spread = output.std((0, 2, 3)) / module.weight
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=0.15)
