"""Activations with chosen levels, packed: the same integers, in memory, in a file, in ONNX."""

import pytest
import torch
from builders import images
from packed_models import LEVELS_POLICY, quantized_classifier, run_config

import gplq_mm
from gplq_mm.deploy import DeployError, convert, load, save
from gplq_mm.deploy.packed_file import read_file, write_file
from gplq_mm.deploy.save import write_model
from gplq_mm.deploy.verify import compare
from gplq_mm.layers import Int4Attention, Int4WeightLayer, QuantAttention, compiled_products
from gplq_mm.quant import ActQuantizer

FC = 'backbone.layers.0.ffn.layers.1'
ATTENTION = 'backbone.layers.0.attn'


@pytest.fixture(scope='module', params=['vit', 'swin'])
def simulated(request):
    torch.manual_seed(0)
    model = quantized_classifier(request.param, LEVELS_POLICY)
    # Fewer levels than codes, in one place.
    layer = next(q for q in model.modules() if isinstance(q, ActQuantizer) and q.format.has_levels)
    layer.set_grid(layer.scale, layer.offset, torch.tensor([[3, 17, 60]], dtype=torch.uint8))
    layer.freeze()
    return request.param, model


@pytest.fixture(scope='module')
def vit_file(tmp_path_factory):
    """Bytes of the file of a ViT, and where to write variants."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('levels')
    model = quantized_classifier('vit', LEVELS_POLICY)
    save(model, run_config('vit'), folder / 'good.safetensors')
    return folder / 'good.safetensors', folder / 'bad.safetensors'


def test_integers_are_those_of_the_simulation(simulated):
    _, model = simulated
    deployed = convert(model)
    assert not any(isinstance(module, QuantAttention) for module in deployed.modules())
    x = images(3, seed=7)
    agreement = compare(model, deployed, lambda model: model(x))
    agreement.require(tolerance=0.1)
    assert agreement.compared == agreement.layers


@torch.no_grad()
def test_the_kernels_lend_the_simulation_their_products(simulated):
    _, model = simulated
    x = images(3, seed=8)
    expected = model(x)
    with compiled_products(model):
        assert torch.equal(model(x), expected)


def test_what_the_ops_are_given(simulated):
    deployed = convert(simulated[1])
    for module in deployed.modules():
        if isinstance(module, Int4WeightLayer) and module.bits[1] == 4:
            assert module.grid[:2] == [0, 63]
            assert module.table.shape == (64,)
            assert len(module.table.unique()) <= 16
        elif isinstance(module, Int4WeightLayer):
            # The first layer and the head.
            assert module.table.shape == (0,)
        elif isinstance(module, Int4Attention):
            for name in ('q', 'k', 'v', 'probs'):
                assert getattr(module, f'{name}_table').shape == (module.num_heads, 64)


def test_levels_are_counted_by_the_width_of_their_codes(simulated):
    x = images(2)
    found, packed = (gplq_mm.coverage(m, x) for m in (simulated[1], convert(simulated[1])))
    assert found.widths == packed.widths
    assert {'a4', 'w4a4', 'w8a8'} == set(packed.widths)


def test_a_file_holds_the_levels_and_gives_back_the_model(simulated, tmp_path):
    kind, model = simulated
    path, again = tmp_path / 'levels.safetensors', tmp_path / 'again.safetensors'
    save(model, run_config(kind), path)
    header, tensors = read_file(path)
    assert not any(name.endswith('.table') for name in tensors)
    shapes = {tuple(t.shape) for name, t in tensors.items() if name.endswith('.levels')}
    assert shapes == {(1, 16), (1, 3), (2, 16)} or kind == 'swin'
    loaded, direct = load(path), convert(model)
    first, second = loaded.state_dict(), direct.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    x = images(4, seed=9)
    assert torch.equal(loaded(x), direct(x))
    write_model(loaded, header, again)
    header_again, tensors_again = read_file(again)
    assert header_again == header
    assert tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors_again[name], tensors[name]) for name in tensors)


def changed(vit_file, name: str, value):
    good, bad = vit_file
    header, tensors = read_file(good)
    tensors[name] = value(tensors[name])
    write_file(bad, header, tensors)
    return bad


def set_level(place: int, level: int):
    def value(levels):
        levels = levels.clone()
        levels[-1, place] = level
        return levels

    return value


BAD = {
    'repeated': (f'{FC}.input.levels', lambda t: t[:, [0, 0]], 'increase, and none may repeat'),
    'unordered': (f'{FC}.input.levels', lambda t: t.flip(1), 'must increase'),
    'unordered in a head': (f'{ATTENTION}.q.levels', set_level(0, 63), 'must increase.*got .63,'),
    'too large': (f'{FC}.input.levels', set_level(-1, 64), r'lie in 0\.\.63, got \d+\.\.64'),
    'more than codes': (
        f'{FC}.input.levels',
        lambda _: torch.arange(17, dtype=torch.uint8)[None],
        r'4 bits has 1 to 16 levels a row, got shape \(1, 17\)',
    ),
    'none': (f'{FC}.input.levels', lambda t: t[:, :0], '1 to 16 levels a row'),
    'of another head': (f'{ATTENTION}.q.levels', lambda t: t[:1], r'needs uint8 \(2, 16\)'),
    'of another type': (f'{FC}.input.levels', lambda t: t.int(), 'is int32'),
    'of no shape': (f'{FC}.input.levels', lambda t: t[0], r'needs uint8 \(1, 16\)'),
}


@pytest.mark.parametrize(('name', 'value', 'message'), BAD.values(), ids=BAD)
def test_a_damaged_codebook_is_one_error(vit_file, name, value, message):
    path = changed(vit_file, name, value)
    with pytest.raises(DeployError, match=message) as error:
        load(path)
    assert str(error.value).count('deploy the checkpoint again'.capitalize()) <= 1
    assert name in str(error.value)


def test_a_missing_codebook_is_named(vit_file):
    good, bad = vit_file
    header, tensors = read_file(good)
    del tensors[f'{ATTENTION}.probs.levels']
    write_file(bad, header, tensors)
    with pytest.raises(DeployError, match=r'lacks the tensor .*attn\.probs\.levels'):
        load(bad)


def test_levels_beside_integers_are_a_surplus(vit_file):
    good, bad = vit_file
    header, tensors = read_file(good)
    header['layers'][FC]['activation']['format'] = 'integer'
    write_file(bad, header, tensors)
    with pytest.raises(DeployError, match=r'does not have, .*\.levels'):
        load(bad)
