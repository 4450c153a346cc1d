"""What was measured: ``metafile.yml`` of every config folder, readable by mim.

A model of a metafile is one run of one config. Its key ``Measured`` holds everything that tables
are made from; ``Results`` and ``Metadata`` repeat of it what mim shows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .files import ZooError, dump_yaml, read_yaml, write_yaml

__all__ = [
    'MEASURED', 'STAGE', 'Zoo', 'complete_entry', 'final_stage', 'load_zoo', 'put_entry',
    'with_seed',
]  # fmt: skip

# Keys of Measured.
MEASURED = {
    'command', 'commit', 'date', 'machine', 'data', 'options', 'seconds', 'cpu_seconds',
    'seconds_by_step', 'peak_memory_mb', 'iterations', 'seed', 'images', 'stages', 'ptq_error',
    'weight_drift', 'pca', 'decisions',
}  # fmt: skip
REQUIRED = ('command', 'commit', 'machine', 'data', 'stages')
# Metric of a stage -> its name in mim's Results.
INDEX_NAMES = {
    'top1': 'Top 1 Accuracy',
    'top5': 'Top 5 Accuracy',
    'bbox_mAP': 'box AP',
    'segm_mAP': 'mask AP',
}
# Keys of a stage.
STAGE = {
    *INDEX_NAMES, 'bbox_mAP_50', 'bbox_mAP_75', 'segm_mAP_50', 'segm_mAP_75', 'relative_l2',
    'cosine', 'agreement', 'transfer', 'epoch', 'iteration',
}  # fmt: skip
STAGE_NAME = re.compile(r'fp32|latent_fp32|trained|(ptq_)?w\d+a\d+')
COMMIT = re.compile(r'[0-9a-f]{7,40}(-dirty)?')
ABSOLUTE_PATH = re.compile(r'[\s=\'":]/\w[^\s\'"]*')


def with_seed(name: str, seed: int | None) -> str:
    """Name of a model's run with another seed than its config's; what it begins with for None."""
    return f'{name}+seed-{"" if seed is None else seed}'


@dataclass(frozen=True)
class Zoo:
    """All measured models and all published figures of a checkout.

    Attributes:
        root: The checkout.
        models: Name -> entry of a metafile.
        published: Name -> source and rows of ``published.yml``.
    """

    root: Path
    models: dict[str, dict]
    published: dict[str, dict]

    def runs_of(self, name: str) -> list[dict]:
        """Entries of a model, one for each seed; empty if it is not measured."""
        other = re.compile(rf'{re.escape(with_seed(name, None))}\d+')
        return [run for key, run in self.models.items() if key == name or other.fullmatch(key)]

    def config_exists(self, name: str) -> bool:
        """Whether a model's name belongs to a config, measured or not."""
        stem = name.partition('+')[0]
        return any((self.root / 'configs').rglob(f'{stem}.py'))


def load_zoo(root: Path) -> Zoo:
    """Reads ``configs/*/metafile.yml`` and ``configs/*/published.yml``.

    Raises:
        ZooError: If a file is damaged, an entry is incomplete or contradicts itself, or a name is
            used twice.
    """
    models: dict[str, dict] = {}
    for path in sorted(root.glob('configs/*/metafile.yml')):
        content = read_yaml(path)
        collections = [entry.get('Name') for entry in content.get('Collections') or []]
        for entry in content.get('Models') or []:
            _check_entry(root, path, entry, collections)
            if entry['Name'] in models:
                raise ZooError(f'{path}: there is another model {entry["Name"]}; rename one.')
            models[entry['Name']] = entry
    published: dict[str, dict] = {}
    for path in sorted(root.glob('configs/*/published.yml')):
        for name, table in (read_yaml(path).get('Published') or {}).items():
            if not {'source', 'rows'} <= set(table) or not (
                'url' in table or all('url' in row for row in table['rows'])
            ):
                raise ZooError(f'{path}: {name} needs source, url (its own or one a row) and rows.')
            if name in published:
                raise ZooError(f'{path}: there is another published table {name}; rename one.')
            published[name] = table
    return Zoo(root, models, published)


def _check_entry(root: Path, path: Path, entry: dict, collections: list[str]) -> None:
    name, config = entry.get('Name'), entry.get('Config')
    where = f'{path}: model {name}'
    if not name or not config or not (root / config).is_file():
        raise ZooError(f'{where} needs a Name and an existing Config, it has {config}.')
    if Path(config).stem != name.partition('+')[0] or (root / config).parent != path.parent:
        raise ZooError(
            f'{where} must be named as its config {config} (with +VARIANT behind it for other '
            'settings) and stand in the metafile of its folder.'
        )
    if entry.get('In Collection') not in collections:
        raise ZooError(f'{where}: In Collection must be one of {collections}.')
    _check_measured(where, entry.get('Measured') or {})
    wanted = complete_entry(entry)
    if wrong := [key for key in {**wanted, **entry} if entry.get(key) != wanted.get(key)]:
        shown = {key: wanted.get(key) for key in wrong}
        raise ZooError(f'{where}: {wrong} are not as Measured says, which gives {shown}.')


def _check_measured(where: str, measured: dict) -> None:
    stages, data = measured.get('stages') or {}, measured.get('data') or {}
    missing = [key for key in REQUIRED if not measured.get(key)]
    missing += [] if 'images' in data.get('validation', {}) else ['data.validation.images']
    unknown = set(measured) - MEASURED | set(data) - {'training', 'validation'}
    unknown |= {stage for stage in stages if not STAGE_NAME.fullmatch(stage)}
    unknown |= {key for values in stages.values() for key in set(values) - STAGE}
    if missing or unknown:
        raise ZooError(
            f'{where}: Measured lacks {missing} and has the unknown keys {sorted(unknown)}.'
        )
    if not COMMIT.fullmatch(str(measured['commit'])):
        raise ZooError(f'{where}: {measured["commit"]!r} is no commit.')
    if found := ABSOLUTE_PATH.search(dump_yaml(measured)):
        raise ZooError(f'{where}: {found[0].strip()!r} is a path of one machine.')


def final_stage(stages: Mapping[str, dict]) -> str:
    """The stage that a run ends in: ``w4a4`` (or other bits), ``trained`` without quantization."""
    final = [stage for stage in stages if re.fullmatch(r'w\d+a\d+', stage)]
    final = [stage for stage in final if not stage.startswith('w32')] or final
    return final[-1] if final else list(stages)[-1]


def complete_entry(entry: dict) -> dict:
    """The entry with ``Metadata`` and ``Results`` made from ``Measured``, as mim orders keys."""
    stages, data = entry['Measured']['stages'], entry['Measured']['data']
    stage = final_stage(stages)
    detection = any(key.endswith('mAP') for key in stages[stage])
    metadata = {'Training Data': _data_name(data.get('training') or data['validation'])}
    if stage != 'trained':
        metadata['Quantization'] = stage.upper()
    metrics = {
        INDEX_NAMES[key]: value for key, value in stages[stage].items() if key in INDEX_NAMES
    }
    return {
        'Name': entry['Name'],
        'In Collection': entry['In Collection'],
        'Config': entry['Config'],
        'Metadata': metadata,
        'Results': [
            {
                'Task': 'Object Detection' if detection else 'Image Classification',
                'Dataset': _data_name(data['validation']),
                'Metrics': metrics,
            }
        ],
        'Measured': entry['Measured'],
    }


def _data_name(data: dict) -> str:
    return data.get('folder') or data['type']


def put_entry(root: Path, name: str, config: Path, measured: dict) -> None:
    """Writes what was measured into the metafile beside the config, in place of an older run.

    Raises:
        ZooError: If the entry or the metafile is not valid; the file is intact.
    """
    path = config.parent / 'metafile.yml'
    _check_measured(f'{path}: model {name}', measured)
    content = read_yaml(path)
    if not content.get('Collections'):
        content = {'Collections': [{'Name': config.parent.name}], **content}
    collections = [entry['Name'] for entry in content['Collections']]
    models = {entry['Name']: entry for entry in content.get('Models') or []}
    entry = complete_entry(
        {
            'Name': name,
            'In Collection': models.get(name, {}).get('In Collection', collections[0]),
            'Config': config.relative_to(root).as_posix(),
            'Measured': measured,
        }
    )
    _check_entry(root, path, entry, collections)
    models[name] = entry
    write_yaml(path, {**content, 'Models': list(models.values())})
