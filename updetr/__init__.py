"""Understand, reproduce and use UP-DETR: unsupervised pre-training for detection transformers."""
__version__ = "0.1.0"

from importlib import import_module

# Loaded on first use, so that `import updetr` alone costs nothing.
_PUBLIC = {
    'model.backbone': ['build_backbone', 'fetch_weights'],
    'model.detr': ['build_detr'],
    'model.updetr': ['build_updetr', 'best_of_group', 'group_mask'],
    'model.losses': ['build_criterion'],
    'core.config': ['make_config'],
    'model.weights': ['load_updetr'],
    'data.datasets': ['open_dataset'],
    'data.check': ['check_dataset'],
    'model.pretrained': ['load_official', 'open_pretrained', 'hand_over'],
    'tasks.finetune': ['finetune_config'],
    'predict.detector': ['Detector'],
    'tasks.oneshot': ['oneshot_config'],
    'predict.oneshot_detector': ['OneShotDetector'],
    'tasks.panoptic': ['open_panoptic'],
    'tasks.panoptic_task': ['panoptic_config'],
    'predict.segmenter': ['PanopticSegmenter'],
    'predict.localizer': ['QueryPatchLocalizer'],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__():
    return [*globals(), *_HOME]
