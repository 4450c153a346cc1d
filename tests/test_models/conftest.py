"""What tests of models share."""

import pytest
import torch
from builders import randomize, vit_cfg
from mmengine.registry import MODELS


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp('float') / 'vit.pth'
    torch.save({'state_dict': randomize(MODELS.build(vit_cfg())).state_dict()}, path)
    return path
