"""Whatever a file holds: the model that was saved, or one clear error. Never anything else."""

import copy
import json

import pytest
import safetensors.torch
import torch
from builders import images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from packed_models import fill_compensations, quantized_classifier, run_config

from gplq_mm.deploy import DeployError, load, save
from gplq_mm.deploy.packed_file import KEY, VERSION, read_file, write_file
from gplq_mm.layers import quant_layers

FUZZ = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FC = 'backbone.layers.0.ffn.layers.1'
PATCHES = 'backbone.patch_embed.projection'


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """Bytes of a file, its output on some images, and where to write variants."""
    torch.manual_seed(0)
    model = quantized_classifier('vit', compensation=dict(type='QwT'))
    fill_compensations(model)
    folder = tmp_path_factory.mktemp('damaged')
    save(model, run_config('vit'), folder / 'good.safetensors', {'classes': tuple('abcde')})
    path = folder / 'good.safetensors'
    return path.read_bytes(), load(path)(images(2)), folder / 'bad.safetensors'


def loads_or_refuses(data: bytes, expected: torch.Tensor, path) -> bool:
    """Whether the file loads; then it must be the model that was saved."""
    path.write_bytes(data)
    try:
        model = load(path)
    except DeployError:
        return False
    assert torch.equal(model(images(2)), expected)
    return True


def refused(path, message: str) -> None:
    with pytest.raises(DeployError, match=message):
        load(path)


# -- accidents --------------------------------------------------------------------------------


@FUZZ
@given(st.data())
def test_truncated(packed, data):
    content, expected, path = packed
    length = data.draw(st.integers(0, len(content) - 1))
    assert not loads_or_refuses(content[:length], expected, path)


@FUZZ
@given(st.data())
def test_changed_bytes(packed, data):
    content, expected, path = packed
    bad = bytearray(content)
    header = 8 + int.from_bytes(content[:8], 'little')
    # Header and tensors are equally likely, whatever their lengths.
    place = st.one_of(st.integers(0, header), st.integers(header, len(content) - 1))
    for index in data.draw(st.lists(place, min_size=1, max_size=4)):
        bad[index] = data.draw(st.integers(0, 255))
    loaded = loads_or_refuses(bytes(bad), expected, path)
    # White space in the header is all that may change unnoticed.
    assert not loaded or bytes(bad[header:]) == content[header:]


@FUZZ
@given(st.binary(max_size=300))
@example(b'')
@example(b'\x00' * 8)
@example(b'\xff' * 64)
@example(b'PK\x03\x04')
@example((2).to_bytes(8, 'little') + b'{}')
@example((2).to_bytes(8, 'little') + b'[]')
@example((4).to_bytes(8, 'little') + b'null')
def test_anything(packed, content):
    _, expected, path = packed
    assert not loads_or_refuses(content, expected, path)


def test_appended_bytes(packed):
    content, expected, path = packed
    assert not loads_or_refuses(content + b'\0', expected, path)


def test_missing_file(tmp_path):
    with pytest.raises(DeployError, match=r'nowhere\.safetensors does not exist'):
        load(tmp_path / 'nowhere.safetensors')
    with pytest.raises(DeployError, match='does not exist'):
        load(tmp_path)


def test_checkpoint_instead_of_a_packed_file(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'w4a4.pth')
    with pytest.raises(DeployError, match=r'is a checkpoint.*tools/deploy\.py'):
        load(tmp_path / 'w4a4.pth')


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
def test_foreign_safetensors(tmp_path, metadata):
    path = tmp_path / 'foreign.safetensors'
    safetensors.torch.save_file({'weight': torch.ones(2)}, path, metadata)
    with pytest.raises(DeployError, match='gplq_mm did not write'):
        load(path)


def with_document(content: bytes, **changes) -> bytes:
    """The file with other values in its JSON document; tensors and lengths stay right."""
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header['__metadata__'][KEY])
    document.update(changes)
    header['__metadata__'][KEY] = json.dumps(document)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + content[8 + length :]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(version=VERSION + 1), f'version {VERSION + 1}.*Update gplq_mm'),
        (dict(version=0), 'version 0.*Deploy the checkpoint again'),
        (dict(version='1'), 'not of the format'),
        (dict(format='other'), 'not of the format'),
        (dict(header=3), 'checksum'),
        (dict(header={}), 'checksum'),
        (dict(sha256='0' * 64), 'checksum'),
        (dict(sha256=None), 'checksum'),
    ],
)
def test_document(packed, changes, message):
    content, _, path = packed
    path.write_bytes(with_document(content, **changes))
    with pytest.raises(DeployError, match=message):
        load(path)


def test_header_that_names_more_data_than_there_is(packed):
    content, _, path = packed
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    entry = header[f'{FC}.codes']
    entry['shape'][0] *= 1000
    entry['data_offsets'][1] = entry['data_offsets'][0] + 1000 * 32 * 32
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + length :])
    with pytest.raises(DeployError, match='damaged, truncated or no safetensors file'):
        load(path)


@pytest.mark.parametrize('number', [b'NaN', b'Infinity', b'1e999'])
def test_numbers_that_are_none(packed, number):
    content, _, path = packed
    bad = with_document(content, header={'a': 1234567})
    bad = bad.replace(b'1234567', number)
    length = int.from_bytes(bad[:8], 'little') + len(number) - 7
    path.write_bytes(length.to_bytes(8, 'little') + bad[8:])
    refused(path, 'damaged header|checksum')


# -- files made to deceive: the checksum is right ---------------------------------------------


@pytest.fixture
def forge(packed):
    """``forge(change)`` applies ``change(header, tensors)`` and returns the path of the result."""
    content, _, path = packed
    path.write_bytes(content)
    header, tensors = read_file(path)

    def write(change):
        forged_header, forged = copy.deepcopy(header), dict(tensors)
        change(forged_header, forged)
        write_file(path, forged_header, forged)
        return path

    return write


def set_tensor(name: str, value):
    def change(_, tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def fill(number):
    def value(tensor):
        tensor = tensor.clone()
        tensor.flatten()[0:1] = number
        return tensor

    return value


TENSORS = {
    'multiplier 0': (f'{FC}.multiplier', fill(0), 'multiplier leaves 1 to 15'),
    'multiplier of an 8-bit layer': (
        f'{PATCHES}.multiplier',
        fill(0x22),
        'multiplier leaves 1 to 1;',
    ),
    'permutation out of range': (f'{FC}.permutation', fill(64), 'every column once'),
    'permutation negative': (f'{FC}.permutation', fill(-1), 'every column once'),
    'permutation twice': (f'{FC}.permutation', lambda t: t * 0, 'every column once'),
    'codes too wide': (f'{PATCHES}.codes', fill(-128), r'leave \[-127, 127\]'),
    'codes of another type': (f'{FC}.codes', lambda t: t.to(torch.int8), 'is int8'),
    'codes of another shape': (f'{FC}.codes', lambda t: t[:, 1:].contiguous(), r'\(32, 31\)'),
    'scale NaN': (f'{FC}.row_scale', fill(float('nan')), 'NaN or infinity'),
    'scale half': (f'{FC}.row_scale', lambda t: t.half(), 'is float16'),
    'input scale 0': (f'{FC}.input.scale', fill(0.0), 'must be positive'),
    'input scale negative': (f'{FC}.input.scale', fill(-1.0), 'must be positive'),
    'offset infinite': (f'{FC}.input.offset', fill(float('inf')), 'NaN or infinity'),
    'attention grid': ('backbone.layers.0.attn.q.scale', fill(0.0), 'must be positive'),
    'norm of another shape': ('backbone.ln1.weight', torch.ones(3), r'float32 \(3,\).*\(32,\)'),
    'norm of another type': ('backbone.ln1.weight', torch.ones(32).double(), 'is float64'),
    'compensation': (
        'backbone.layers.0.compensation.weight',
        torch.zeros(32, 31).half(),
        r'\(32, 31\)',
    ),
}


@pytest.mark.parametrize(('name', 'value', 'message'), TENSORS.values(), ids=TENSORS)
def test_forged_tensor(forge, name, value, message):
    refused(forge(set_tensor(name, value)), message)


@pytest.mark.parametrize('name', [f'{FC}.codes', f'{FC}.input.offset', 'backbone.pos_embed'])
def test_missing_tensor(forge, name):
    refused(forge(lambda _, tensors: tensors.pop(name)), f'lacks the tensor {name}')


def add_surplus(_, tensors):
    tensors['surplus'] = torch.ones(1)


def test_surplus_tensor(forge):
    refused(forge(add_surplus), '1 tensors that the architecture does not have.*surplus')


def layer_entry(**changes):
    def change(header, _):
        header['layers'][FC].update(changes)

    return change


def spec_entry(part: str, **changes):
    def change(header, _):
        header['layers'][FC][part].update(changes)

    return change


def attention_entry(**changes):
    def change(header, _):
        header['attention']['backbone.layers.0.attn'].update(changes)

    return change


def rename_layer(header, _):
    header['layers']['backbone.layers.7.fc'] = header['layers'].pop(FC)


def section(key: str, value):
    def change(header, _):
        header[key] = value

    return change


HEADERS = {
    'no layers': (section('layers', {}), 'names no quantized layer'),
    'layers a list': (section('layers', []), 'no usable "layers"'),
    'layer unknown': (rename_layer, 'no layer backbone.layers.7.fc'),
    'layer without entry': (lambda h, _: h['layers'].pop(FC), r'lacks the tensor .*weight'),
    'kind': (layer_entry(kind='conv'), 'is no conv layer'),
    'kind unknown': (layer_entry(kind='lstm'), 'is no lstm layer'),
    'no spec': (layer_entry(activation=None), 'does not describe the quantizer'),
    'spec with more': (spec_entry('activation', more=1), 'does not describe the quantizer'),
    'bits': (spec_entry('weight', bits=9), 'integer from 2 to 8'),
    'other bits': (spec_entry('weight', bits=8), 'needs int8'),
    'fewer bits': (spec_entry('weight', bits=2), 'weight codes leave'),
    'group size': (spec_entry('weight', group_size=0), 'positive integer'),
    'raw': (spec_entry('weight', layout='raw'), 'multiplier'),
    'float groups': (spec_entry('weight', group_scale='float'), "group_scale='float'"),
    'group scale': (spec_entry('weight', group_scale='half'), 'integer, float'),
    'granularity': (spec_entry('activation', granularity='token'), 'no quantizer of this site'),
    'format': (spec_entry('activation', format='log_sqrt2'), 'does not go with format'),
    'format unknown': (spec_entry('activation', format='os.system'), 'is not one of'),
    'observer unknown': (spec_entry('activation', observer='os.system'), 'is not one of'),
    'operand missing': (
        section('attention', {'backbone.layers.0.attn': {'q': None}}),
        'no known attention',
    ),
    'attention of a layer': (
        section('attention', {FC: dict.fromkeys(('q', 'k', 'v', 'probs'))}),
        'no known attention',
    ),
    'operand without a spec': (attention_entry(q=None), r'tensors that the architecture does not'),
    'compensation type': (
        section('compensation', {'backbone.layers.0': {'type': 'os.system', 'axis': -1}}),
        'none of the types',
    ),
    'compensation axis': (
        section('compensation', {'backbone.layers.0': {'type': 'QwT', 'axis': 7}}),
        'axis 7',
    ),
    'compensation of nothing': (
        section('compensation', {'backbone.layers.9': {'type': 'QwT', 'axis': -1}}),
        'no layer backbone.layers.9',
    ),
    'compensation without layers': (
        section('compensation', {'backbone.ln1': {'type': 'QwT', 'axis': -1}}),
        'a block with layers',
    ),
    'no architecture': (section('architecture', None), 'no usable "architecture"'),
    'scope': (section('scope', 'os'), 'scope'),
    'no scope': (section('scope', 3), 'no usable "scope"'),
    'pipeline': (section('test_pipeline', {'type': 'Resize'}), 'no list'),
}


@pytest.mark.parametrize(('change', 'message'), HEADERS.values(), ids=HEADERS)
def test_forged_header(forge, change, message):
    refused(forge(change), message)


def architecture(path: str, value):
    def change(header, _):
        *parents, last = path.split('.')
        node = header['architecture']
        for parent in parents:
            node = node[parent]
        node[last] = value

    return change


ARCHITECTURES = {
    'unknown type': ('backbone.type', 'NoSuchBackbone', 'in none of the registries'),
    'import path': ('backbone.type', 'os.system', 'in none of the registries'),
    'function of a package': ('type', 'mmpretrain.get_model', 'in none of the registries'),
    'path of a class': ('backbone.type', 'mmpretrain.models.ViT', 'no name of a registered class'),
    'type no string': ('backbone.type', 3, 'no name of a registered class'),
    'code': ('head.topk', '__import__("os")', 'more than a word'),
    'url': ('backbone.arch', 'https://example.org/x.pth', 'more than a word'),
    'file': ('backbone.arch', 'x.py', 'more than a word'),
    'checkpoint': ('pretrained', 'x', "'pretrained' is not taken"),
    'init_cfg': ('backbone.init_cfg', {'type': 'Pretrained'}, "'init_cfg' is not taken"),
    'scope inside': ('backbone._scope_', 'os', 'no name of an option'),
    'other files': (
        'backbone',
        {'type': 'mmpretrain.TIMMBackbone', 'model_name': 'resnet18'},
        'may hold classes that read other files',
    ),
    'model hub': (
        'head',
        {'type': 'mmdet.ATSSVLFusionHead', 'lang_model_name': 'bert-base-uncased'},
        'may hold classes that read other files',
    ),
    'quantized twice': (
        'backbone',
        {'type': 'gplq_mm.QuantBackbone'},
        'may hold classes that read',
    ),
    'huge number': ('backbone.patch_size', 2**40, 'too large'),
    'more classes': ('head.num_classes', 7, r'needs'),
    'unknown option': ('backbone.speed', 3, 'cannot be built'),
    'wrong value': ('backbone.arch.num_heads', 'two', 'cannot be built'),
}


@pytest.mark.parametrize(('path', 'value', 'message'), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_forged_architecture(forge, path, value, message):
    refused(forge(architecture(path, value)), message)


@pytest.mark.parametrize(
    'transform',
    [
        {'type': 'os.system', 'command': 'true'},
        {'type': 'torchvision/ConvertImageDtype', 'dtype': 'float32, __import__("os")'},
        {'type': 'ImageClassifier'},
        {'type': 'mmdet.RandomSamplingNegPos', 'tokenizer_name': 'gpt2'},
        {'type': 'mmdet.ImageAug', 'pipeline': [{'name': 'SaveDebugImageEveryNBatches'}]},
    ],
)
def test_forged_pipeline(forge, transform):
    refused(forge(section('test_pipeline', [transform])), r'test_pipeline\[0\]')


# As files were written first: without the fields of specs that came later.
EARLIER = {
    'activation': {
        **dict(bits=4, zero_point='float', signed=True, granularity='channel', observer='minmax'),
        **dict(percentile=[0.01, 0.99], quantizer='uniform', tokens=None, row_relative=False),
    },
    'weight': dict(bits=4, layout='folded', group_size=32, observer='minmax', percentile=0.999),
}


def test_specs_of_an_earlier_file(forge, packed):
    def change(header, _):
        assert header['layers'][FC] != {'kind': 'linear', **EARLIER}
        header['layers'][FC].update(EARLIER)

    assert torch.equal(load(forge(change))(images(2)), packed[1])


def test_nested_without_end(forge):
    value: list = []
    for _ in range(400):
        value = [value]
    refused(forge(architecture('backbone.arch', value)), 'deep')


words = st.text(max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def places(node, path=()):
    """Paths of all values inside nested JSON data."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@FUZZ
@given(st.data())
def test_edited_headers(packed, data):
    """Any value of the header replaced or removed, the checksum made right."""
    content, expected, path = packed
    path.write_bytes(content)
    header, tensors = read_file(path)
    sections = set()
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(list(places(header))))
        sections.add(where[0])
        *parents, last = where
        node = header
        for parent in parents:
            node = node[parent]
        if data.draw(st.booleans()):
            node[last] = data.draw(plain)
        else:
            del node[last]
    write_file(path, header, tensors)
    try:
        model = load(path)
    except DeployError:
        return
    # What decides nothing may be anything (names of classes, versions).
    if not sections & {'architecture', 'layers', 'attention', 'compensation'}:
        assert torch.equal(model(images(2)), expected)
    # Another architecture of the same tensors is another model, yet a whole one.
    assert not quant_layers(model)
    assert model.deploy_report.layers
