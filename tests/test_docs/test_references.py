"""What pages name exists: files, flags, settings, targets, messages, keys."""

import ast
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from doc_pages import (
    DOCS,
    LINK,
    PAGES,
    ROOT,
    anchors,
    blocks,
    name_of,
    prose,
    shell_commands,
    spans,
    strings_of,
)
from mmengine.config import Config

from gplq_mm.engine import GPLQTrainLoop, QuantTrainLoop, RunRecord
from gplq_mm.engine.run_record import write_summary
from gplq_mm.layers import QwT
from gplq_mm.layers.family import headlines
from gplq_mm.models import GPLQ, PCAMimicLoss
from gplq_mm.ptq import GPTQ, RoundToNearest
from gplq_mm.quant import ActSpec, QuantPolicy, WeightSpec
from tools.zoo import command as zoo

every_page = pytest.mark.parametrize('page', PAGES, ids=name_of)


@every_page
def test_python_parses(page):
    for block in blocks(page):
        if block.language == 'python':
            ast.parse('\n' * (block.line - 1) + block.text, name_of(page))


@every_page
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r'https?:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f'{link}: there is no such file'
        if anchor:
            assert anchor in anchors(target), f'{link}: there is no such heading'


# A file of the repository; names with placeholders (CONFIG, ${name}, *, {a,b}) are none.
FILE = re.compile(r'(?<![\w./{}$*-])(?:configs|tools|tests|benchmarks|docs)/[\w./-]+\.\w+\b')


@every_page
def test_files_exist(page):
    texts = [*spans(page), *(block.text for block in blocks(page))]
    named = {path for text in texts for path in FILE.findall(text)}
    own = {path for path in named if path.startswith('configs/mine/') or 'CONFIG' in path}
    assert not [path for path in named - own if not (ROOT / path).is_file()]


def flags_of(tool: Path) -> set[str]:
    """Options that the argument parser of a tool knows."""
    return {
        argument.value
        for node in ast.walk(ast.parse(tool.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'add_argument'
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith('--')
    } | ({'--train', '--val'} if tool.name == 'crop_boxes.py' else set())


# Where the arguments of tools/zoo.py are read.
ZOO = 'tools/zoo/command.py'
FLAG = re.compile(r'(?<!\S)--[a-z][\w-]*')


@every_page
def test_tools_know_the_flags(page):
    for command in shell_commands(page):
        tool = re.search(r'(?:tools|tests)/\w+\.(?:py|sh)', command)
        if tool is None:
            continue
        script = (
            tool.group().replace('dist_train.sh', 'train.py').replace('slurm_train.sh', 'train.py')
        )
        script = script.replace('dist_test.sh', 'test.py').replace('tools/zoo.py', ZOO)
        script = ROOT / script
        unknown = set(FLAG.findall(command[tool.end() :])) - flags_of(script)
        assert not unknown, f'{command}: {sorted(unknown)}'
    known = set().union(*(flags_of(path) for path in (ROOT / 'tools').glob('*.py')))
    known |= flags_of(ROOT / ZOO) | flags_of(ROOT / 'tests' / 'kill_run.py')
    known |= {'--no-deps', '--no-build-isolation'}
    inline = {flag for span in spans(page) for flag in FLAG.findall(span)}
    assert inline <= known


@every_page
def test_commands_of_the_zoo_are_understood(page):
    for command in shell_commands(page):
        if (found := re.search(r'tools/zoo\.py(.*)', command)) is None:
            continue
        words = shlex.split(found.group(1))
        args = zoo.parse_args(words)
        given = [word for word in words if word.endswith('.py')]
        # A flag that takes several values would swallow the configs behind it.
        assert [str(path) for path in args.configs if path.suffix == '.py'] == given


@every_page
def test_make_knows_the_targets(page):
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    texts = [*spans(page), *shell_commands(page)]
    named = {name for text in texts for name in re.findall(r'^make ([a-z][a-z-]*)', text)}
    assert named <= targets


def parameters(*functions) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


ACTIVATION = {field.name for field in fields(ActSpec)}
# Prefix of a setting -> names that may follow it; a config of ours is asked for all others.
SETTINGS = {
    'model': parameters(GPLQ) | {'backbone', 'head'},
    'model.policy': parameters(QuantPolicy),
    **{f'model.policy.{key}': ACTIVATION for key in ('activation', 'q', 'k', 'v', 'probs')},
    'model.policy.weight': {field.name for field in fields(WeightSpec)},
    'model.mimic': parameters(PCAMimicLoss),
    'model.compensation': {'type', *parameters(QwT)},
    'train_cfg': parameters(GPLQTrainLoop, QuantTrainLoop) | {'val_interval'},
    'train_cfg.weight_ptq': {'type', 'num_images', 'batch_size', 'seed'}
    | parameters(GPTQ, RoundToNearest),
    'env_cfg.dist_cfg': {'backend', 'timeout'},
    'train_dataloader': {'batch_size', 'batch_sampler', 'sampler', 'dataset', 'num_workers'},
}
# Below these the architecture or data set of a reader stands.
FREE = ('model.architecture', 'model.backbone', 'model.head', 'model.data_preprocessor')
FREE += ('val_dataloader.dataset', 'train_dataloader.dataset', 'visualizer')
# Attributes of a model, no settings.
ATTRIBUTES = {'model.deploy_report', 'model.deploy_header'}
ROOTS = 'model|train_cfg|optim_wrapper|train_dataloader|val_dataloader|env_cfg|visualizer'
SETTING = re.compile(rf'(?<![\w./-])(?:{ROOTS})(?:\.[a-z]\w*)+')


def is_setting(name: str, cfg: Config) -> bool:
    if name.startswith(FREE):
        return True
    prefix, _, last = name.rpartition('.')
    if prefix in SETTINGS:
        return last in SETTINGS[prefix]
    value = cfg
    for part in name.split('.'):
        if not hasattr(value, 'get') or value.get(part) is None:
            return False
        value = value[part]
    return True


@pytest.fixture(scope='module')
def cfg():
    return Config.fromfile(ROOT / 'configs/gplq/gplq_vit-tiny_w4a4_imagenette.py')


@every_page
def test_settings_exist(page, cfg):
    texts = [*spans(page), *shell_commands(page)]
    named = {name for text in texts for name in SETTING.findall(text)} - ATTRIBUTES
    assert not [name for name in sorted(named) if not is_setting(name, cfg)]


@pytest.mark.parametrize(
    'name',
    ['model.pretrain', 'model.policy.bits', 'optim_wrapper.quantizers.lr', 'train_cfg.epochs'],
)
def test_what_is_no_setting_is_noticed(name, cfg):
    assert SETTING.fullmatch(name)
    assert not is_setting(name, cfg)


# -- messages -------------------------------------------------------------------------------------


def quoted_messages() -> list[str]:
    """First column of the tables of the troubleshooting page."""
    text = (DOCS / 'troubleshooting.md').read_text()
    cells = (line.split(' | ')[0] for line in text.splitlines() if line.startswith('| `'))
    return [message for cell in cells for message in re.findall(r'`([^`]+)`', cell)]


@pytest.fixture(scope='module')
def source() -> list[str]:
    paths = [*(ROOT / 'gplq_mm').rglob('*.py'), *(ROOT / 'tools').rglob('*.py'), ROOT / 'setup.py']
    return [text for path in paths for text in strings_of(path)]


def occurs(message: str, source: list[str]) -> bool:
    pattern = re.compile('.*'.join(map(re.escape, message.split('...'))), re.DOTALL)
    return any(pattern.search(text) for text in source)


@pytest.mark.parametrize('message', quoted_messages())
def test_a_quoted_message_is_in_the_source(message, source):
    assert occurs(message, source)


def test_messages_are_found_and_others_are_not(source):
    assert len(quoted_messages()) > 50
    assert not occurs('there is no such message', source)
    # Across a value that is filled in only where the page says so.
    assert occurs('policy rule ... matches no layer', source)
    assert not occurs('policy rule matches no layer', source)


# -- summary.json ---------------------------------------------------------------------------------


def test_every_key_of_a_summary_is_explained(tmp_path):
    path = ROOT / 'gplq_mm' / 'engine' / 'loops' / 'quant_loop.py'
    extras = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'extra'
    ]
    (extra,) = extras
    keys = {key.value for key in extra.keys} | set(
        write_summary(tmp_path / 'summary.json', RunRecord(), {})
    )
    keys |= {name for name, _ in headlines().values()}
    text = (DOCS / 'diagnostics.md').read_text()
    table = text[text.index('## summary.json') : text.index('## Reading')]
    explained = {
        name
        for line in table.splitlines()
        if line.startswith('| `')
        for name in re.findall(r'`(\w+)`', line.split(' | ')[0])
    }
    assert explained == keys
