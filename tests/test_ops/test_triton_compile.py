"""The Triton kernels compiled, without a GPU, for the devices they are meant for."""

import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from packed_layers import NO_TABLE
from triton_targets import SHARED, CompileOnly

from gplq_mm.quant.packing import pack_multiplier_panels, pack_panels

pytestmark = pytest.mark.skipif(find_spec('triton') is None, reason='triton is not installed')

INT8_PRODUCT = {
    80: r'mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32',
    89: r'mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32',
    90: r'wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8',
}
# Bytes that converting layouts, and a scratch of the result, may add to the pipeline's buffers.
SLACK = 4096

GEMM_POINTERS = dict(
    a='*i8', w='*i8', multiplier='*u8', row_scale='*fp32', bias='*fp32', correction='*i32',
    gamma='*fp32', residual='*fp16', next_inverse='*fp32', next_shift='*fp32',
)  # fmt: skip
PLAIN = dict(
    GROUP_SIZE=1, A_PACKED=True, W_PACKED=False, GELU=False, GAMMA=False, ADD=False, OUT=0,
    NEXT_PACKED=False, NEXT_MIN=0, NEXT_MAX=0, NEXT_OFFSET=0, next_table=None,
)  # fmt: skip
# What the ops launch: name -> (type of the output, flags that differ from PLAIN).
GEMMS = {
    'linear': ('*fp16', {}),
    'accumulate': ('*i32', dict(OUT=1)),
    'linear of 8 bits': ('*bf16', dict(A_PACKED=False)),
    'linear of few rows': ('*fp16', dict(W_PACKED=True, GROUP_SIZE=32)),
    'fc1': ('*u8', dict(GELU=True, OUT=2, NEXT_PACKED=True, NEXT_MAX=15)),
    'fc1 before 8 bits': ('*i8', dict(GELU=True, OUT=2, NEXT_MAX=255, NEXT_OFFSET=128)),
    'fc2': ('*fp16', dict(GAMMA=True, ADD=True)),
}


@pytest.fixture(scope='module')
def kernels():
    import triton

    from gplq_mm.ops import triton_attention, triton_common, triton_gemm, triton_quantize

    if triton.knobs.runtime.interpret or triton_common.INTERPRETED:
        pytest.skip('TRITON_INTERPRET is set: kernels are interpreted in this process')
    return SimpleNamespace(
        attention_kernel=triton_attention.attention_kernel,
        expand_kernel=triton_gemm.expand_kernel,
        gemm_kernel=triton_gemm.gemm_kernel,
        quantize_kernel=triton_quantize.quantize_kernel,
    )


def compile_kernel(kernel, capability, pointers, numbers, constants, divisible=(), **options):
    """Compiles with pointers aligned to 16 bytes and ``divisible`` numbers multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gplq_mm.ops.triton_common import LAUNCH

    names = kernel.arg_names
    types = {**pointers, **numbers, **dict.fromkeys(constants, 'constexpr')}
    assert set(types) == set(names)
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [['tt.divisibility', 16]] for name in (*pointers, *divisible)},
    )
    target = GPUTarget('cuda', capability, 32)
    return triton.compile(source, target=target, options={**LAUNCH, **options})


def compile_gemm(kernels, capability, out, flags, config):
    return compile_kernel(
        kernels.gemm_kernel,
        capability,
        {**GEMM_POINTERS, 'out': out},
        dict.fromkeys(('M', 'N', 'half', 'groups', 'M_BUCKET'), 'i32'),
        {**PLAIN, **flags, **config.kwargs},
        ('N', 'half'),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def configs_for(capability: int, flags: dict, rows: int) -> list:
    from gplq_mm.ops.triton_tuning import GEMM_CONFIGS, eligible_configs

    flags = {**PLAIN, **flags}
    return eligible_configs(
        list(GEMM_CONFIGS),
        384,
        flags['GROUP_SIZE'],
        rows,
        flags['A_PACKED'],
        flags['W_PACKED'],
        SHARED[capability],
    )


# 8.9 differs from 8.0 in its shared memory only.
@pytest.mark.parametrize(
    ('capability', 'name'), [*((c, name) for c in (80, 90) for name in GEMMS), (89, 'linear')]
)
def test_products_run_on_int8_tensor_cores(kernels, capability, name):
    out, flags = GEMMS[name]
    rows = 256 if flags.get('W_PACKED') else 4096
    config = configs_for(capability, flags, rows)[0]
    compiled = compile_gemm(kernels, capability, out, flags, config)
    products = re.findall(r'^.*\bw?g?mma\b.*$', compiled.asm['ptx'], re.MULTILINE)
    ptx = compiled.asm['ptx']
    assert re.search(INT8_PRODUCT[capability], ptx), products[:3]
    assert not re.search(r'mma\S*\.(f16|f32|bf16|tf32)', ptx)
    assert compiled.metadata.shared <= SHARED[capability]
    # Rounding once or twice is written in the kernel, never the compiler's choice.
    assert not re.search(r'\bmad\.\w*\.?f32', ptx)


@pytest.mark.slow
@pytest.mark.parametrize('capability', SHARED)
@pytest.mark.parametrize('name', ['linear', 'linear of 8 bits', 'linear of few rows'])
@pytest.mark.parametrize('rows', [1, 64, 256, 4096])
def test_every_eligible_config_fits_the_device(kernels, capability, name, rows):
    from gplq_mm.ops.triton_tuning import shared_bytes

    out, flags = GEMMS[name]
    for config in configs_for(capability, flags, rows):
        compiled = compile_gemm(kernels, capability, out, flags, config)
        assert compiled.metadata.shared <= SHARED[capability]
        flags_ = {**PLAIN, **flags}
        estimate = shared_bytes(config, flags_['A_PACKED'], flags_['W_PACKED'])
        block = config.kwargs
        result = 4 * block['BLOCK_M'] * block['BLOCK_N']
        assert compiled.metadata.shared <= max(estimate, result) + SLACK


@pytest.mark.parametrize('half', [64, 96 * 4, 1536])
@pytest.mark.parametrize('group_size', [16, 32, 48, 64, 128, 3072])
@pytest.mark.parametrize('rows', [1, 16, 64, 256, 65536])
def test_there_is_a_config_for_every_shape(kernels, half, group_size, rows):
    from gplq_mm.ops.triton_tuning import GEMM_CONFIGS, eligible_configs

    for w_packed in (True, False):
        if w_packed and group_size % 32:
            continue
        for a_packed in (True, False):
            kept = eligible_configs(
                list(GEMM_CONFIGS), half, group_size, rows, a_packed, w_packed, SHARED[89]
            )
            assert 1 <= len(kept) <= 8
            assert all(half % config.kwargs['BLOCK_K'] == 0 for config in kept)


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('kind', ['gather', 'norm', 'image', 'codes', 'levels'])
def test_quantize_compiles(kernels, capability, kind):
    levels = kind == 'levels'
    compiled = compile_kernel(
        kernels.quantize_kernel,
        capability,
        dict(
            x='*fp16', out='*i8', source='*i32', inverse='*fp32', shift='*fp32',
            norm_weight='*fp32', norm_bias='*fp32', **({'table': '*u8'} if levels else {}),
        ),
        {
            'eps': 'fp32',
            **dict.fromkeys(
                (
                    'rows', 'columns', 'half', 'out_columns', 'steps', 'row_stride', 'stride_c',
                    'stride_h', 'stride_w', 'height', 'width', 'out_h', 'out_w',
                ),
                'i32',
            ),
        },
        dict(
            CODE_MIN=0, CODE_MAX=63 if levels else 15, OFFSET=0,
            PACKED=kind not in ('codes', 'levels'), NORM=kind == 'norm',
            **({} if levels else {'table': None}),
            GATHER=kind != 'codes', ROWS=4, BLOCK=512,
            GEOMETRY=(16, 16, 16, 16, 0, 0, 1, 1) if kind == 'image' else None,
        ),
        ('columns', 'half', 'out_columns', 'row_stride'),
    )  # fmt: skip
    ptx = compiled.asm['ptx']
    assert 'fma.rn.f32' in ptx
    if kind != 'norm':
        # Nothing but the one multiply-add and the rounding sum touches a value.
        assert not re.search(r'\bmul\.\w*\.?f32', ptx)


@pytest.mark.parametrize('capability', SHARED)
def test_expand_compiles(kernels, capability):
    compile_kernel(
        kernels.expand_kernel,
        capability,
        dict(packed='*i8', multiplier='*u8', out='*i8'),
        dict.fromkeys(('rows', 'half', 'groups', 'group_size'), 'i32'),
        dict(BLOCK=512),
        ('half', 'group_size'),
    )


# Keys and head size of DeiT, of Swin with windows of 7, and the most keys at Swin's.
@pytest.mark.parametrize('capability', [89, 90])
@pytest.mark.parametrize('levels', [False, True])
@pytest.mark.parametrize(('keys', 'queries', 'depth'), [(256, 32, 64), (64, 64, 32), (512, 16, 32)])
def test_attention_compiles(kernels, capability, keys, queries, depth, levels):
    tables = ('q_table', 'k_table', 'v_table', 'p_table')
    compiled = compile_kernel(
        kernels.attention_kernel,
        capability,
        dict(
            qkv='*fp16', out='*fp16', grids='*fp32', bias='*fp32', mask='*fp32', index='*i32',
            **(dict.fromkeys(tables, '*u8') if levels else {}),
        ),
        {
            'scale': 'fp32',
            **dict.fromkeys(
                ('tokens', 'heads', 'mask_count', 'in_rows', 'out_rows', 'steps'), 'i32'
            ),
        },
        dict(
            LIMITS=(0, 63 if levels else 15) * 4, ROW_RELATIVE=True, BIAS=True, MASK=True,
            INDEXED=True, WIDE=False, D=depth, BLOCK_D=depth, BLOCK_Q=queries, BLOCK_N=keys,
            **({} if levels else dict.fromkeys(tables)),
        ),
        num_warps=8 if queries * keys >= 8192 else 4,
        num_stages=1,
    )  # fmt: skip
    assert compiled.metadata.shared <= SHARED[capability]
    # Fewer than 64 rows are no operand of a warpgroup's product.
    product = INT8_PRODUCT[capability if queries >= 64 else 80]
    assert re.search(product, compiled.asm['ptx'])


@pytest.fixture
def without_device(kernels, monkeypatch, tmp_path):
    """Launches compile for sm_90 and run nothing; the product is tuned among two configs."""
    from gplq_mm.ops.triton_gemm import tuned_gemm
    from gplq_mm.ops.triton_tuning import GEMM_CONFIGS

    chosen = [GEMM_CONFIGS[i] for i in (4, 8)]
    monkeypatch.setattr(tuned_gemm, 'configs', chosen)
    with CompileOnly(monkeypatch, 90, tmp_path) as compiler:
        yield compiler
    tuned_gemm.cache.clear()


def plain_layer(columns: int, rows: int, group_size: int = 32):
    codes = torch.ones(rows, columns, dtype=torch.int8)
    groups = -(-columns // group_size)
    layer = [
        torch.ones(columns), torch.zeros(columns), pack_panels(codes, 4),
        pack_multiplier_panels(torch.ones(rows, groups, dtype=torch.uint8)),
        torch.arange(columns, dtype=torch.int32).flip(0), torch.ones(rows), torch.zeros(rows),
        torch.zeros(rows, dtype=torch.int32), NO_TABLE,
    ]  # fmt: skip
    return layer, [0, 15, group_size]


@pytest.mark.parametrize(('columns', 'rows', 'm'), [(768, 96, 300), (1, 1, 1)])
def test_linear_launches(without_device, columns, rows, m):
    from gplq_mm.ops import triton_gemm, triton_ops

    layer, grid = plain_layer(columns, rows)
    x = torch.zeros(m, columns, dtype=torch.bfloat16)
    triton_ops.int4_linear(x, layer, grid)
    expand = ['expand_kernel'] if m > triton_gemm.UNPACK_IN_LOOP_ROWS else []
    names = without_device.names
    assert names[0] == 'quantize_kernel'
    assert [name for name in names[1:] if name != 'gemm_kernel'] == expand
    assert names[-1] == 'gemm_kernel'


def test_other_launches(without_device):
    from gplq_mm.ops import triton_ops

    norm = torch.ones(48), torch.zeros(48)
    (layer1, grid1), (layer2, grid2) = plain_layer(48, 64), plain_layer(64, 48)
    x = torch.zeros(2, 5, 48, dtype=torch.float16)
    triton_ops.int4_mlp(x, *norm, 1e-6, layer1, grid1, layer2, grid2, torch.ones(48))
    conv, grid = plain_layer(48, 8)
    triton_ops.int4_conv2d(torch.zeros(1, 3, 8, 8), conv, grid, [4, 4, 4, 4, 0, 0, 1, 1])
    triton_ops.quantize_codes(x, *norm, [0, 255, 1], NO_TABLE)
    assert {'quantize_kernel', 'gemm_kernel'} == set(without_device.names)


@pytest.mark.parametrize(('windows', 'tokens', 'depth'), [(1, 1, 8), (4, 9, 16)])
def test_attention_launches(without_device, windows, tokens, depth):
    from gplq_mm.ops import triton_ops

    rows = torch.arange(windows * tokens, dtype=torch.int32).reshape(windows, tokens)
    qkv = torch.zeros(windows * tokens, 3 * 2 * depth, dtype=torch.bfloat16)
    mask, bias = torch.zeros(1, tokens, tokens), torch.zeros(2, tokens, tokens)
    grids, none = torch.ones(4, 2, 2), [NO_TABLE] * 4
    triton_ops.int4_attention(
        qkv, 2, 0.5, grids, [0, 15] * 4, none, True, bias, mask, rows, len(qkv)
    )
    rest = ([-8, 7] * 4, none, False, None, None, None, 0)
    triton_ops.int4_attention(qkv[None], 2, 0.5, grids, *rest)
    assert without_device.names == ['attention_kernel'] * 2
