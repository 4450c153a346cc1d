"""tools/analyze.py on every state of a run, and on what it must refuse."""

import json
import shutil

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from pages import Page, read_png
from tiny_detection import detection_config, train_fp32, write_coco
from tiny_runs import (
    ARCHITECTURES,
    ROOT,
    build_runner,
    direct_config,
    fp32_config,
    gplq_config,
    load_tool,
    read_summary,
    run,
    run_ranks,
)

from gplq_mm.analysis import mean_bits
from gplq_mm.analysis.report import shorten
from gplq_mm.deploy import save
from gplq_mm.engine import CalibrationHook
from gplq_mm.layers import quant_layers
from gplq_mm.models import Stage
from gplq_mm.ptq import RoundToNearest, round_weights
from gplq_mm.quant import QuantPolicy

WEIGHTS = {'weights', 'activations', 'both'}


def config_file(folder, cfg):
    path = folder / 'my_config.py'
    cfg.experiment_name = folder.name
    cfg.dump(path)
    return path


def analyze(folder, cfg, checkpoint, *options) -> dict:
    """Runs the tool; returns the content of analysis.json."""
    out = folder / 'out'
    arguments = [config_file(folder, cfg), checkpoint, '--out', out, '--images', '16', *options]
    load_tool('analyze').main([str(argument) for argument in arguments])
    return json.loads((out / 'analysis.json').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory, undisturbed):
    """Folder and analysis of the ViT's result, with a budget for weights and activations."""
    folder = tmp_path_factory.mktemp('analysis')
    cfg = gplq_config(folder / 'w', folder / 'gone.pth')
    options = ('--weight-bits', '4', '--act-bits', '4.5')
    return folder, analyze(folder, cfg, undisturbed['vit'] / 'w4a4.pth', *options)


def test_files(whole):
    out = whole[0] / 'out'
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert {'analysis.json', 'report.html', 'suggested_policy.py', 'suggested_policy.json'} < names
    pictures = sorted(out.glob('*.png'))
    assert len(pictures) == 10
    for path in pictures:
        read_png(path.read_bytes())
    page = Page((out / 'report.html').read_text())
    assert len(page.pictures()) == len(pictures)
    assert not list(out.glob('.*'))


def test_numbers(whole, undisturbed):
    analysis = whole[1]
    assert analysis['state'] == 'w4a4'
    assert analysis['kind'] == 'classifier'
    assert analysis['notes'] == []
    assert analysis['images']['num_images'] == 16
    for name, layer in analysis['layers'].items():
        attention = layer['kind'] == 'attention'
        assert set(layer['errors']) == ({'activations'} if attention else WEIGHTS), name
        cost = analysis['sensitivity']['cost'][name]
        assert set(cost) == ({'activations'} if attention else {'activations', 'weights'})
        assert all(value >= 0 for value in cost.values())
    assert sum(layer['kind'] == 'attention' for layer in analysis['layers'].values()) == 2
    assert analysis['sensitivity']['metric'] == 'kl'
    assert analysis['sensitivity']['all_cost'] > 0
    summary = read_summary(undisturbed['vit'])
    rows = [row['metrics']['top1'] for row in analysis['run']['rows']]
    assert rows == list(summary['top1'].values())
    page = Page((whole[0] / 'out' / 'report.html').read_text())
    assert page.tables[0][-1][:3] == ['Stage 2: weights', 'W4A4', f'{rows[-1]:.2f}']


def test_a_suggested_policy_builds_calibrates_and_meets_its_budget(
    whole, float_checkpoints, tmp_path
):
    folder, analysis = whole
    suggestion = analysis['suggestion']
    policy = json.loads((folder / 'out' / 'suggested_policy.json').read_text())
    cfg = Config.fromfile(folder / 'out' / 'suggested_policy.py')
    assert cfg.model.policy.to_dict() == policy == suggestion['policy']
    QuantPolicy(**policy)
    # It is the run's config with another policy, so it makes a run.
    cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name
    cfg.model.pretrained = str(float_checkpoints['vit'])
    runner = run(cfg)
    values = {name: value['values'] for name, value in analysis['activations'].items()}
    bits = mean_bits(runner.model.architecture, values)
    assert 3.5 < bits['weights'] <= 4
    assert 4 < bits['activations'] <= 4.5
    for name, layer in quant_layers(runner.model.architecture).items():
        assert layer.weight_quantizer.spec.bits == suggestion['weights']['bits'][name]
        assert layer.act_quantizer.spec.bits == suggestion['activations']['bits'][name]
    assert 'w4a4' in read_summary(tmp_path)['top1']


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('state', ['w32a4', 'calibrated'])
def test_before_stage_two(tmp_path, undisturbed, arch, state):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth', arch)
    analysis = analyze(tmp_path, cfg, undisturbed[arch] / f'{state}.pth')
    assert analysis['state'] == state
    assert all(set(layer['errors']) == {'activations'} for layer in analysis['layers'].values())
    assert any('--round-weights' in note for note in analysis['notes'])
    assert analysis['suggestion']['weights'] is None
    chosen = analysis['suggestion']['activations']
    assert chosen['cost'] <= chosen['cost_now'] * 1.5


def test_weights_are_rounded_when_asked(tmp_path, undisturbed):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    analysis = analyze(tmp_path, cfg, undisturbed['vit'] / 'w32a4.pth', '--round-weights')
    assert any('rounded to nearest' in note for note in analysis['notes'])
    kinds = [layer for layer in analysis['layers'].values() if layer['kind'] != 'attention']
    assert all(set(layer['errors']) == WEIGHTS for layer in kinds)
    assert analysis['suggestion']['weights'] is not None


def test_a_float_checkpoint_is_calibrated(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    analysis = analyze(tmp_path, cfg, float_checkpoints['vit'], '--weight-bits', '3.5')
    assert analysis['state'] == 'fp32'
    assert 'calibrated for this analysis on 32 images' in analysis['notes'][0]
    assert analysis['suggestion']['activations'] is None
    assert analysis['suggestion']['weights']['budget'] == '3.50 bits a weight'
    # No run lies beside it: the page says so, and shows the rest.
    assert any('summary.json' in note for note in analysis['notes'])
    page = Page((tmp_path / 'out' / 'report.html').read_text())
    assert 'no summary.json' in page.text
    assert len(page.tables) == 2
    assert (tmp_path / 'out' / 'sensitivity.png').is_file()
    assert not (tmp_path / 'out' / 'losses.png').exists()


def test_direct_qat(tmp_path, float_checkpoints):
    cfg = direct_config(tmp_path / 'w', float_checkpoints['vit'], train_cfg__max_iters=2)
    cfg.experiment_name = f'{tmp_path.name}_run'
    run(cfg)
    for state in ('calibrated', 'w4a4'):
        analysis = analyze(tmp_path, cfg, tmp_path / 'w' / f'{state}.pth', '--images', '8')
        layers = analysis['layers'].values()
        assert all(set(v['errors']) == WEIGHTS for v in layers if v['kind'] != 'attention')


def test_without_sensitivity(tmp_path, undisturbed, capsys):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    analysis = analyze(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth', '--no-sensitivity')
    assert analysis['sensitivity'] is None
    assert analysis['suggestion'] is None
    assert not (tmp_path / 'out' / 'suggested_policy.py').exists()
    Page((tmp_path / 'out' / 'report.html').read_text())
    assert 'smallest SQNR' in capsys.readouterr().out


def test_a_second_analysis_leaves_nothing_of_the_first(tmp_path, undisturbed):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    analyze(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth')
    assert (tmp_path / 'out' / 'suggested_policy.py').exists()
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    analyze(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth', '--no-sensitivity')
    names = {path.name for path in (tmp_path / 'out').glob('*')}
    assert not names & {'suggested_policy.py', 'suggested_policy.json', 'sensitivity.png'}


def test_default_folder_and_worst_layers(tmp_path, undisturbed, capsys):
    for name in ('w4a4.pth', 'summary.json'):
        shutil.copy(undisturbed['vit'] / name, tmp_path)
    path = config_file(tmp_path, gplq_config(tmp_path / 'w', tmp_path / 'gone.pth'))
    load_tool('analyze').main([str(path), str(tmp_path / 'w4a4.pth'), '--images', '8'])
    printed = capsys.readouterr().out
    analysis = json.loads((tmp_path / 'analysis-w4a4' / 'analysis.json').read_text())
    cost = analysis['sensitivity']['cost']
    worst = max(cost, key=lambda name: sum(cost[name].values()))
    places = [printed.index(shorten(name)) for name in cost if shorten(name) in printed]
    assert printed.index(shorten(worst)) == min(places)
    assert str(tmp_path / 'analysis-w4a4' / 'report.html') in printed


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_budget_in_megabytes_is_that_of_the_packed_file(
    tmp_path, undisturbed, float_checkpoints, arch
):
    cfg = gplq_config(tmp_path / 'w', float_checkpoints[arch], arch)
    megabytes = {'vit': 0.028, 'swin': 0.031}[arch]
    budget = ('--budget-mb', str(megabytes))
    analysis = analyze(tmp_path, cfg, undisturbed[arch] / 'w4a4.pth', *budget)
    chosen = analysis['suggestion']['weights']
    assert set(chosen['bits'].values()) == {4, 8}
    new = Config.fromfile(tmp_path / 'out' / 'suggested_policy.py')
    settings = {**new.model, 'data_preprocessor': new.data_preprocessor, 'teacher': False}
    model = MODELS.build(settings)
    model.init_weights()
    runner = build_runner(cfg)
    hook = CalibrationHook(16, 16)
    hook.calibrate(model, hook.images(runner))
    model.freeze_activations()
    round_weights(model.architecture, RoundToNearest())
    model.advance(Stage.WEIGHT_PTQ)
    sizes = save(model, new, tmp_path / 'packed.safetensors')
    total = sum(sizes.parts.values()) / 1e6
    assert 0.9 * megabytes < total <= megabytes
    assert chosen['size'] == f'{total:.3f} MB'


@pytest.mark.parametrize('change', ['repq', 'no_policy', 'feature_layer', 'direct'])
def test_other_configs(tmp_path, float_checkpoints, change):
    """What is special in them is no obstacle, from the float checkpoint on."""
    build_config = direct_config if change == 'direct' else gplq_config
    cfg = build_config(tmp_path / 'w', float_checkpoints['vit'])
    if change == 'repq':
        cfg.model.policy = dict(preset='repq')
    elif change == 'no_policy':
        cfg.model.pop('policy')
    elif change == 'feature_layer':
        cfg.model.feature_layer = 'backbone.layers.1.ffn.layers.1'
        cfg.model.distill = None
        cfg.model.mimic = dict(num_components=4, dim=32)
    analysis = analyze(tmp_path, cfg, float_checkpoints['vit'], '--act-bits', '5')
    assert analysis['sensitivity']['all_cost'] > 0
    assert analysis['suggestion']['activations']['bits']
    Config.fromfile(tmp_path / 'out' / 'suggested_policy.py')


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detector')
    write_coco(folder, 'train', 12, seed=0)
    write_coco(folder, 'val', 6, seed=1)
    train_fp32(folder, folder / 'float.pth', steps=20)
    return folder


def test_detector_with_images_of_several_sizes(tmp_path, detector):
    cfg = detection_config(tmp_path / 'w', detector, detector / 'float.pth')
    analysis = analyze(
        tmp_path, cfg, detector / 'float.pth', '--images', '3', '--weight-bits', '4.2'
    )
    assert analysis['kind'] == 'detector'
    assert analysis['images']['num_images'] == 3
    assert analysis['sensitivity']['metric'] == 'relative_squared_error'
    assert set(analysis['sensitivity']['all']) == {'maps', 'dense_head', 'roi_head'}
    sites = analysis['sensitivity']['sites']
    # The maps know nothing of heads, and the box head's outputs nothing of the mask head.
    for name, groups in (
        ('rpn_head.rpn_cls', {'dense_head'}),
        ('roi_head.mask_head.conv_logits', {'roi_head'}),
        ('backbone.stages.0.blocks.0.attn.w_msa.qkv', {'maps', 'dense_head', 'roi_head'}),
    ):
        found = {group for group, error in sites[name]['weights'].items() if error > 0}
        assert found == groups, name
    assert analysis['suggestion']['weights']['budget'] == '4.20 bits a weight'
    assert read_png((tmp_path / 'out' / 'sensitivity.png').read_bytes())


@pytest.mark.slow
def test_two_ranks_find_what_one_does(tmp_path, undisturbed):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    path = config_file(tmp_path, cfg)
    results = []
    for ranks, launcher in ((1, 'none'), (2, 'pytorch')):
        out = tmp_path / str(ranks)
        arguments = [path, undisturbed['vit'] / 'w4a4.pth', '--out', out, '--images', '15']
        arguments = [str(a) for a in (*arguments, '--launcher', launcher)]
        process = run_ranks(ranks, tmp_path, ROOT / 'tools' / 'analyze.py', *arguments)
        assert process.returncode == 0, process.stderr[-3000:]
        results.append(json.loads((out / 'analysis.json').read_text()))
    one, two = results
    for name, layer in one['layers'].items():
        for case, errors in layer['errors'].items():
            assert errors == pytest.approx(two['layers'][name]['errors'][case], rel=1e-3)
        cost = one['sensitivity']['cost'][name]
        assert cost == pytest.approx(two['sensitivity']['cost'][name], rel=1e-2)
    for name, value in one['activations'].items():
        assert value['values'] == two['activations'][name]['values']
        assert value['clip_rate'] == pytest.approx(two['activations'][name]['clip_rate'], abs=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--weight-bits', '1.5'), r'1\.50 bits a weight is out of reach.*2\.00 bits.*8\.00 bits'),
        (('--weight-bits', 'nan'), 'out of reach'),
        (('--act-bits', '1'), r'1\.00 bits an activation is out of reach.*2\.00 bits.*8\.00'),
        (('--budget-mb', '0.001'), r'0\.001 MB is out of reach.*MB to .*MB'),
        (('--widths', '4', '8', '--weight-bits', '3'), r'4\.00 bits a weight to 8\.00'),
    ],
)
def test_budget_out_of_reach(tmp_path, undisturbed, options, message):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'report.html').write_text('an earlier one')
    with pytest.raises(SystemExit, match=f'BudgetError: .*{message}'):
        analyze(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth', *options)
    assert (out / 'report.html').read_text() == 'an earlier one'


@pytest.mark.parametrize(
    'options',
    [
        ('--images', '0'),
        ('--widths', '1', '4'),
        ('--widths', '9'),
        ('--weight-bits', '4', '--budget-mb', '1'),
        ('--no-sensitivity', '--act-bits', '4'),
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(SystemExit) as error:
        load_tool('analyze').parse_args(['config.py', 'w4a4.pth', *options])
    assert error.value.code == 2


def test_wrong_checkpoints(tmp_path, undisturbed, float_checkpoints):
    cfg = gplq_config(tmp_path / 'w', tmp_path / 'gone.pth')
    for path, message in (
        (tmp_path / 'absent.pth', 'does not exist'),
        (undisturbed['swin'] / 'w4a4.pth', 'of another architecture'),
        (float_checkpoints['swin'], 'of another architecture'),
    ):
        with pytest.raises(SystemExit, match=f'CheckpointError: .*{message}'):
            analyze(tmp_path, cfg, path)
    cfg.model.policy.weight = dict(bits=3)
    with pytest.raises(SystemExit, match=r'CheckpointError: .*another policy'):
        analyze(tmp_path, cfg, undisturbed['vit'] / 'w4a4.pth')
    assert not (tmp_path / 'out' / 'analysis.json').exists()


def test_config_of_a_float_model(tmp_path, float_checkpoints):
    with pytest.raises(SystemExit, match=r'SettingError: .*config of a GPLQ run'):
        analyze(tmp_path, fp32_config('vit'), float_checkpoints['vit'])
