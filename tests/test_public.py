"""What `import updetr` gives, used as a reader of the README would."""
import subprocess
import sys

import pytest
import torch

import updetr

SMALL = dict(backbone='resnet18', hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=32)


def test_import_alone_is_cheap():
    assert subprocess.run([sys.executable, '-c', 'import sys, updetr; assert "torch" not in sys.modules'], timeout=60).returncode == 0


@pytest.mark.parametrize('name', updetr.__all__)
def test_public_names_are_there(name):
    assert callable(getattr(updetr, name)) and name in dir(updetr)


def test_unknown_names_are_not():
    with pytest.raises(AttributeError, match='build_updert'): updetr.__getattr__('build_updert')


def test_pretraining_from_the_outside():
    model = updetr.build_updetr(**SMALL, num_queries=20, num_patches=4)
    criterion = updetr.build_criterion(model)
    images = [torch.randn(3, 64, 96), torch.randn(3, 80, 64)]
    outputs = model(images, torch.randn(2, 4, 3, 32, 32))
    assert outputs['pred_logits'].shape == (2, 20, 3) and outputs['pred_boxes'].shape == (2, 20, 4) and len(outputs['aux_outputs']) == 1
    assert outputs['pred_feature'].shape == (2, 20, 512) and outputs['gt_feature'].shape == (2, 4, 512)
    targets = [{'labels': torch.ones(4, dtype=torch.long), 'boxes': torch.rand(4, 4) * .3 + .3} for _ in images]
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    assert {'loss_ce', 'loss_bbox', 'loss_giou', 'loss_feature', 'loss_ce_0', 'class_error', 'cardinality_error'} <= set(losses)
    assert model.patch2query.weight.grad.abs().sum() > 0 and model.backbone[0].body.conv1.weight.grad is None


def test_detection_from_the_outside():
    model = updetr.build_detr(7, **SMALL, pre_norm=False, num_queries=10).eval()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert outputs['pred_logits'].shape == (2, 10, 8) and 'gt_feature' not in outputs
    targets = [{'labels': torch.tensor([3]), 'boxes': torch.rand(1, 4)},
               {'labels': torch.tensor([], dtype=torch.long), 'boxes': torch.zeros(0, 4)}]
    losses = updetr.build_criterion(model)(outputs, targets)
    assert 'loss_feature' not in losses and torch.isfinite(losses['loss_ce'])
