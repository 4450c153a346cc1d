"""Outputs by the content of an image: found only if they are the ones that would be computed."""

import copy

import pytest
import torch
from builders import build_float, build_quantized, images
from torch import nn

from gplq_mm.layers import quantizers_disabled
from gplq_mm.models import FeatureCache, FeatureStoreError, FeatureStoreUnavailableError
from gplq_mm.models.feature_cache import fingerprint, image_key
from gplq_mm.models.frozen import autocast_dtype, frozen_outputs, has_fast_bf16, resolve_dtype

CPU = torch.device('cpu')


class Network(nn.Module):
    """Counts the images that it computes."""

    def __init__(self, weight: float = 2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 4), weight))
        self.register_buffer('shift', torch.ones(4), persistent=False)
        self.seen = 0
        self.eval().requires_grad_(False)

    def forward(self, x):
        self.seen += len(x)
        return (x.mean((2, 3)) @ self.weight + self.shift, [x.amax((1, 2, 3))])


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / 'features.sqlite', {'type': 'Network'})


def look_up(cache, network, batch, **options):
    return cache.outputs(network, network, batch, **options)


def assert_same(one, two) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_an_image_is_computed_once(cache):
    network, batch = Network(), images(6)
    first = look_up(cache, network, batch)
    assert_same(first, network(batch))
    network.seen = 0
    # In another order, in other company, and twice.
    order = [4, 0, 0, 5]
    again = look_up(cache, network, batch[order])
    assert network.seen == 0
    assert_same(again, network(batch[order]))
    assert type(again) is tuple
    assert type(again[1]) is list
    assert (cache.lookups, cache.hits) == (10, 4)


def test_only_what_is_missing_is_computed(cache):
    network, batch = Network(), images(6)
    look_up(cache, network, batch[:3])
    network.seen = 0
    mixed = batch[[5, 0, 4, 2]]
    assert_same(look_up(cache, network, mixed), network(mixed))
    assert network.seen == 2 + 4
    assert (cache.lookups, cache.hits) == (7, 2)


def test_another_run_finds_the_outputs(cache):
    network, batch = Network(), images()
    wanted = look_up(cache, network, batch)
    cache.close()
    again, twin = FeatureCache(cache.store.path, {'type': 'Network'}), Network()
    assert_same(look_up(again, twin, batch), wanted)
    assert (twin.seen, again.hits) == (0, 4)
    assert_same(look_up(copy.deepcopy(again), twin, batch), wanted)
    assert twin.seen == 0


@pytest.mark.parametrize(
    'change',
    [
        lambda image: image.index_put((torch.tensor(1),), torch.tensor(0.5)),
        lambda image: image.double(),
        lambda image: image.reshape(3, 16, 64),
        lambda image: image.flip(2),
    ],
)
def test_the_key_is_the_whole_image(change):
    image = images(1)[0]
    assert image_key(image) == image_key(image.clone())
    assert image_key(change(image)) != image_key(image)
    # A view of the same values has the same key.
    assert image_key(image.transpose(1, 2).contiguous().transpose(1, 2)) == image_key(image)


def test_every_weight_counts():
    network, taken = Network(), {'heads': 2}
    known = {fingerprint(network, taken, torch.float32, CPU)}
    assert fingerprint(Network(), {**taken, 'init_cfg': 1}, torch.float32, CPU) in known

    def new(*args) -> bool:
        count = len(known)
        known.add(fingerprint(*args))
        return len(known) > count

    assert new(network, {'heads': 3}, torch.float32, CPU)
    assert new(network, taken, torch.bfloat16, CPU)
    assert new(network, taken, torch.float32, torch.device('cuda'))
    network.weight[2, 3] += 2**-20
    assert new(network, taken, torch.float32, CPU)
    network.shift[0] = 0
    assert new(network, taken, torch.float32, CPU)


def test_another_network_is_not_answered_from_the_file(cache):
    batch = images()
    look_up(cache, Network(), batch)
    other = Network(3.0)
    assert_same(look_up(cache, other, batch), other(batch))
    assert cache.hits == 0


def test_a_network_that_changes_is_noticed(cache):
    network, batch = Network(), images()
    first = look_up(cache, network, batch)
    network.load_state_dict(Network(3.0).state_dict())
    assert_same(look_up(cache, network, batch), network(batch))
    network.weight = nn.Parameter(torch.full((3, 4), 4.0), requires_grad=False)
    assert_same(look_up(cache, network, batch), network(batch))
    assert cache.hits == 0
    network.load_state_dict(Network().state_dict())
    assert_same(look_up(cache, network, batch), first)
    assert cache.hits == 4


def test_quantizers_that_are_switched_off_count(cache):
    fast = dict(activation=dict(observer='minmax'), weight=dict(observer='minmax'))
    network, batch = build_quantized('vit', fast), images()

    def compute(x):
        return network(x)

    quantized = cache.outputs(network, compute, batch)
    with quantizers_disabled(network):
        latent = cache.outputs(network, compute, batch)
    assert cache.hits == 0
    assert not torch.equal(quantized, latent)
    assert torch.equal(cache.outputs(network, compute, batch), quantized)
    assert cache.hits == 4


def test_precisions_do_not_mix(cache):
    network, batch = Network(), images()
    exact = look_up(cache, network, batch)[0]
    short = look_up(cache, network, batch, dtype=torch.bfloat16)[0]
    assert exact.dtype == torch.float32
    assert cache.hits == 0
    assert 0 < (short.float() - exact).abs().max() < 0.1
    assert_same(look_up(cache, network, batch, dtype=torch.bfloat16)[0], short)


# -- training -----------------------------------------------------------------------------


def epoch(cache, network, *batches) -> None:
    cache.begin_epoch()
    for batch in batches:
        look_up(cache, network, batch)
    cache.end_epoch()


@pytest.fixture
def told(monkeypatch):
    """What is written to the log."""
    lines = []
    monkeypatch.setattr(
        'gplq_mm.models.feature_cache.print_log', lambda text, **_options: lines.append(text)
    )
    return lines


def test_a_random_pipeline_is_told_once_and_no_longer_stored(cache, told):
    network, validation = Network(), images(3, seed=99)
    for number in range(4):
        epoch(cache, network, images(4, seed=2 * number), images(4, seed=2 * number + 1))
        look_up(cache, network, validation)
        assert len(told) == (number > 0)
    assert 'random' in told[0]
    stored = cache.store.count(cache.store.network(fingerprint(network, cache.taken, *FP32)))
    assert stored == 8 + 3
    # Neither hashed nor looked up any more; validation still is.
    assert (cache.lookups, cache.hits) == (16 + 4 * 3, 3 * 3)


FP32 = (torch.float32, CPU)


def test_a_deterministic_pipeline_goes_on(cache, told):
    network = Network()
    for _ in range(4):
        epoch(cache, network, images(4), images(4, seed=1))
    assert not told
    assert (network.seen, cache.hits) == (8, 24)


def test_images_that_are_new_in_a_later_epoch_are_stored(cache, told):
    """A first epoch that was resumed has seen only some of them."""
    network = Network()
    epoch(cache, network, images(4))
    for _ in range(2):
        epoch(cache, network, images(4), images(4, seed=1))
    epoch(cache, network, images(4), images(4, seed=1))
    assert not told
    assert network.seen == 8


def test_random_epochs_that_an_earlier_run_has_begun_with_end_the_same(cache, told):
    network = Network()
    epoch(cache, network, images(4))
    again = FeatureCache(cache.store.path, cache.taken)
    for number in range(3):
        epoch(again, network, images(4, seed=number))
    assert again.hits == 4
    assert len(told) == 1
    stored = cache.store.count(cache.store.network(fingerprint(network, cache.taken, *FP32)))
    assert stored == 4


def test_a_full_disk_ends_storing_and_not_the_run(cache, told, monkeypatch):
    network = Network()
    look_up(cache, network, images())

    def full(*_args):
        raise FeatureStoreUnavailableError('the disk is full')

    monkeypatch.setattr(cache.store, 'put', full)
    for _ in range(2):
        other = images(4, seed=5)
        assert_same(look_up(cache, network, other), network(other))
    assert len(told) == 1
    assert 'the disk is full' in told[0]
    assert_same(look_up(cache, network, images()), network(images()))
    assert cache.hits == 4


def test_a_damaged_file_ends_the_run(cache):
    network = Network()
    look_up(cache, network, images())
    cache.close()
    cache.store.path.write_bytes(cache.store.path.read_bytes()[:20000])
    with pytest.raises(FeatureStoreError, match=r'is damaged .* remove it'):
        look_up(FeatureCache(cache.store.path, cache.taken), network, images())


@pytest.mark.parametrize(
    ('compute', 'text'),
    [
        (lambda x: x.mean(), r'shape \(\) for 4 image'),
        (lambda x: (x, x.mean(0)), r'shape \(3, 32, 32\) for 4 image'),
        (lambda x: (x, None), 'gives a NoneType'),
        (lambda x: x.repeat(1, 1, 10, 10), 'take 1.2 MiB, .* not for maps of detectors'),
    ],
)
def test_outputs_that_cannot_be_kept(cache, compute, text):
    with pytest.raises(FeatureStoreError, match=text):
        cache.outputs(Network(), compute, images())


# -- how a frozen network computes --------------------------------------------------------


def test_frozen_outputs_are_constants_for_any_loss():
    network = build_float('vit')
    constant = frozen_outputs(network, images())
    assert not constant.is_inference()
    assert not constant.requires_grad
    weight = torch.randn_like(constant).requires_grad_()
    # A product saves its other operand for the gradient.
    (weight * constant).sum().backward()
    assert torch.equal(weight.grad, constant)
    with torch.no_grad():
        assert torch.equal(constant, network(images()))


def test_precision_is_what_is_asked_for_and_not_the_region_s():
    network = build_float('vit')
    exact = frozen_outputs(network, images())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert autocast_dtype(CPU) == torch.bfloat16
        assert torch.equal(frozen_outputs(network, images()), exact)
    short = frozen_outputs(network, images(), torch.bfloat16)
    assert autocast_dtype(CPU) == torch.float32
    assert short.dtype == torch.bfloat16
    assert 0 < (short.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(('amx', 'avx'), [(True, False), (False, True), (False, False)])
def test_a_cpu_has_fast_bfloat16_by_its_instructions(monkeypatch, amx, avx):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    assert has_fast_bf16(CPU) == (amx or avx)
    wanted = torch.bfloat16 if amx or avx else torch.float32
    assert resolve_dtype('auto', CPU) == wanted
    assert resolve_dtype('float32', CPU) == torch.float32
    assert resolve_dtype('bfloat16', CPU) == torch.bfloat16


@pytest.mark.parametrize(('capability', 'fast'), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_fast_bfloat16_from_sm_80_on(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _device: capability)
    assert has_fast_bf16(torch.device('cuda')) == fast
    assert not has_fast_bf16(torch.device('mps'))


def test_what_torch_tells_of_this_cpu_is_an_answer():
    assert has_fast_bf16(CPU) in (True, False)


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="'float16' must be one of auto, float32, bfloat16"):
        resolve_dtype('float16', CPU)
