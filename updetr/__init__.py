"""Understand, reproduce and use UP-DETR: unsupervised pre-training for detection transformers."""
__version__ = "0.1.0"

from importlib import import_module

# Loaded on first use, so that `import updetr` alone costs nothing.
_PUBLIC = {'build_backbone': 'backbone', 'fetch_weights': 'backbone', 'build_detr': 'detr', 'build_updetr': 'updetr',
           'best_of_group': 'updetr', 'group_mask': 'groups', 'build_criterion': 'losses', 'make_config': 'config',
           'load_updetr': 'checkpoint', 'open_dataset': 'datasets', 'check_dataset': 'check', 'load_official': 'handover',
           'open_pretrained': 'handover', 'hand_over': 'handover', 'finetune_config': 'finetune', 'Detector': 'detector',
           'oneshot_config': 'oneshot', 'OneShotDetector': 'oneshot_detector', 'open_panoptic': 'panoptic',
           'panoptic_config': 'panoptic_task', 'PanopticSegmenter': 'segmenter',
           'QueryPatchLocalizer': 'localizer'}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)


def __dir__(): return [*globals(), *_PUBLIC]
