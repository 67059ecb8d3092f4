"""Weight gradients as matrix products: the same as the network's own."""

import copy

import pytest
import torch
from torch import nn

from models import detector, gradients


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_network(precision):
    torch.manual_seed(0)
    plain = detector.make_network()
    fast = copy.deepcopy(plain)
    gradients.speed_up_gradients(fast)
    assert sum(isinstance(module, gradients.Convolution) for module in fast.modules()) == 13
    images, labels = torch.randn(8, 3, 112, 56), torch.arange(8) % 2
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
    for (name, expected), found in zip(plain.named_parameters(), fast.parameters()):
        scale = expected.grad.norm()
        assert (expected.grad - found.grad).norm() < (1e-4 if precision == torch.float32 else 0.02) * scale, name


def test_state_is_that_of_the_plain_network():
    model = detector.make_network()
    names = list(model.state_dict())
    gradients.speed_up_gradients(model)
    assert list(model.state_dict()) == names
