"""A small analysis as plain data."""

LAYERS = ('backbone.patch_embed.projection', 'backbone.layers.0.attn.qkv', 'head.fc')
ATTENTION = 'backbone.layers.0.attn'


def _error(sqnr: float | None) -> dict:
    return {'mae': 0.1, 'mse': 0.02, 'sqnr_db': sqnr, 'relative_l2': 0.1}


def _layer(kind: str, **errors: float | None) -> dict:
    attention = kind == 'attention'
    operands = ('q', 'k', 'v', 'probs') if attention else ('input',)
    return {
        'kind': kind,
        'activation_bits': dict.fromkeys(operands, 4),
        'weight_bits': None if attention else 4,
        'num_weights': 0 if attention else 1000,
        'errors': {case: _error(value) for case, value in errors.items()},
    }


def _statistics(clip_rate: float, median: float) -> dict:
    return {
        'bits': 4,
        'clip_rate': clip_rate,
        'sqnr_db': 20.0,
        'values': 5000,
        'scale': {
            'number': 32,
            'smallest': median / 2,
            'first_quartile': median * 0.8,
            'median': median,
            'third_quartile': median * 1.2,
            'largest': median * 3,
        },
    }


def sample() -> dict:
    """Complete: a classifier after Stage 2, with a budget, beside the files of its run."""
    layers = {
        LAYERS[0]: _layer('conv', weights=45.0, activations=None, both=44.0),
        LAYERS[1]: _layer('linear', weights=22.0, activations=18.5, both=16.9),
        ATTENTION: _layer('attention', activations=15.0),
        LAYERS[2]: _layer('linear', weights=48.0, activations=40.0, both=39.0),
    }
    cost = {
        LAYERS[0]: {'weights': 1e-4, 'activations': 0.0},
        LAYERS[1]: {'weights': 3e-3, 'activations': 2e-2},
        ATTENTION: {'activations': 5e-2},
        LAYERS[2]: {'weights': 1e-5, 'activations': 1e-4},
    }
    history = {
        str(step): {
            'mae': step * 1e-5,
            'mse': step * 1e-9,
            'layers': {name: {'mae': step * 1e-5, 'mse': step * 1e-9} for name in LAYERS},
        }
        for step in (1, 10, 100)
    }
    policy = {
        'preset': 'gplq',
        'rules': [{'pattern': r'^backbone\.layers\.0\.attn\.qkv$', 'weight': {'bits': 6}}],
    }
    quantizers = {f'{name}.input': _statistics(0.01, 0.05) for name in LAYERS}
    quantizers |= {f'{ATTENTION}.{op}': _statistics(0.02, 0.2) for op in ('q', 'k', 'v', 'probs')}
    return {
        'name': 'my_config, w4a4.pth',
        'config': 'configs/my_config.py',
        'checkpoint': 'work_dirs/my_config/w4a4.pth',
        'policy_file': 'work_dirs/my_config/analysis-w4a4/suggested_policy.py',
        'state': 'w4a4',
        'kind': 'classifier',
        'notes': ['A note with <angles> & an ampersand.'],
        'images': {'seed': 1, 'num_images': 8, 'image_ids': ['1', '2']},
        'bits': {'weights': 4.25, 'activations': 4.0},
        'layers': layers,
        'activations': quantizers,
        'scale_histogram': {
            'edges': [0.01, 0.1, 1.0],
            'counts': {'input': [60, 36], 'q': [0, 2], 'k': [1, 1], 'v': [2, 0], 'probs': [0, 2]},
        },
        'sensitivity': {'metric': 'kl', 'sites': {}, 'all': {}, 'cost': cost, 'all_cost': 0.09},
        'suggestion': {
            'weights': {
                'bits': {LAYERS[0]: 8, LAYERS[1]: 6, LAYERS[2]: 4},
                'now': dict.fromkeys(LAYERS, 4),
                'cost': 1e-3,
                'cost_now': 3.1e-3,
                'budget': '6.00 bits a weight',
                'size': '6.00 bits a weight',
                'size_now': '4.00 bits a weight',
            },
            'activations': None,
            'policy': policy,
        },
        'run': {
            'rows': [
                {
                    'title': 'FP32',
                    'bits': 'W32A32',
                    'metrics': {'top1': 97.0},
                    'feature_distance': None,
                },
                {
                    'title': 'Stage 2: weights',
                    'bits': 'W4A4',
                    'metrics': {'top1': 96.5},
                    'feature_distance': 0.1,
                },
            ],
            'seconds': {'act_qat': 28.9},
            'peak_memory_mb': {'act_qat': 900.0},
            'pca': {
                'num_components': 2,
                'explained_variance': 0.8,
                'spectrum': [0.5, 0.3, 0.2],
            },
            'weight_drift_history': history,
        },
        'curves': {
            'loss': [[10, 2.0], [20, 1.0]],
            'loss_pca_mimic': [[10, 0.5], [20, 0.2]],
            'lr': [[10, 1e-3], [20, 1e-3]],
            'quant_clip_rate': [[10, 0.02], [20, 0.01]],
        },
    }


def bare() -> dict:
    """As little as there can be: no summary, no curves, no sensitivities."""
    analysis = sample()
    analysis.update(sensitivity=None, suggestion=None, curves={})
    analysis['run'] = {
        'rows': [],
        'seconds': {},
        'peak_memory_mb': {},
        'pca': {},
        'weight_drift_history': {},
    }
    for layer in analysis['layers'].values():
        layer['errors'] = {k: v for k, v in layer['errors'].items() if k == 'activations'}
    return analysis
